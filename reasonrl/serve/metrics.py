"""Counts of a server in Prometheus' text format: counters, gauges read when asked, durations.

Names begin with `reasonrl_`. One event loop writes and reads, so there is no lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
HELP = {
    "requests_total": "requests by path and status",
    "scores_total": "scores by scorer and kind (scored, unscorable, infra)",
    "refused_total": "connections or requests turned away, by reason",
    "request_seconds": "from a request's last byte to its reply",
}


class Metrics:
    def __init__(self) -> None:
        self.counts: dict[str, Counter[tuple[tuple[str, str], ...]]] = {}
        self.gauges: dict[str, Callable[[], float]] = {}
        self.buckets, self.sum = [0] * (len(BOUNDS) + 1), 0.0

    def add(self, name: str, count: int = 1, **labels: str) -> None:
        self.counts.setdefault(name, Counter())[tuple(sorted(labels.items()))] += count

    def value(self, name: str, **labels: str) -> int:
        return self.counts.get(name, Counter())[tuple(sorted(labels.items()))]

    def took(self, seconds: float) -> None:
        at = next((i for i, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))
        self.buckets[at] += 1
        self.sum += seconds

    def text(self) -> str:
        lines: list[str] = []
        for name, values in sorted(self.counts.items()):
            lines += [f"# HELP reasonrl_{name} {HELP.get(name, name)}"]
            lines += [f"# TYPE reasonrl_{name} counter"]
            for labels, count in sorted(values.items()):
                lines.append(f"reasonrl_{name}{_labels(dict(labels))} {count}")
        for name, read in sorted(self.gauges.items()):
            lines += [f"# TYPE reasonrl_{name} gauge", f"reasonrl_{name} {read():g}"]
        name, seen = "reasonrl_request_seconds", 0
        lines += [f"# HELP {name} {HELP['request_seconds']}", f"# TYPE {name} histogram"]
        for bound, count in zip((*BOUNDS, "+Inf"), self.buckets, strict=True):
            seen += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {seen}')
        lines += [f"{name}_sum {self.sum:.6f}", f"{name}_count {seen}", ""]
        return "\n".join(lines)


def _labels(labels: Mapping[str, str]) -> str:
    def quoted(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    inside = ",".join(f'{name}="{quoted(value)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""
