"""What measure.py found, as tables: seed by seed, differences, lengths, generators."""

from __future__ import annotations

import math

import downstream
from arms import ARMS, CROSS, LENGTHS, PAIRS, PROBLEMS, USES

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # two-sided, n seeds
SAMPLED = (  # key of a run's last steps, scale, digits shown
    ("judge/accuracy", 100, 1),
    ("completions/mean_length", 1, 1),
    ("judge/length_price", 1, 2),
)


def final(arm: dict) -> float:
    """Accuracy at the end of a run, in percent."""
    return 100 * (arm["accuracy"] if "accuracy" in arm else arm["evals"][-1]["accuracy"])


def interval(values: list[float], digits: int = 1) -> str:
    """Mean and 95 % t-interval over seeds."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return f"{mean:+.{digits}f} (one seed)"
    half = T95[n] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) / math.sqrt(n)
    return f"{mean:+.{digits}f} ({mean - half:+.{digits}f}..{mean + half:+.{digits}f})"


def table(whole: dict) -> str:
    rows = whole["seeds"]
    arms = [arm for arm in ARMS if any(arm in row for row in rows)]
    uses = [use for use in USES if any(use in row for row in rows)]
    lines = [
        "Percent right: judges (arm by arm) on held-out judged answers, half of them right;"
        f" policies on {PROBLEMS} held-out problems. Greedy.",
        "",
        *grid(rows, arms),
        "",
        "The policy before, and after learning from a judge (dpo, online: from long):",
        "",
        *grid(rows, ["base", *uses]),
        "",
        "| difference | seeds | points, mean and 95 % t-interval |",
        "|---|---|---|",
    ]
    for a, b, what in PAIRS:
        gaps = [final(row[a]) - final(row[b]) for row in rows if a in row and b in row]
        if gaps:
            lines.append(f"| {what} ({a} - {b}) | {len(gaps)} | {interval(gaps)} |")
    lines += [*lengths(rows), *crossed(rows), *downstream.said(points(rows))]
    cpu = [sum(row[a]["cpu_seconds"] for a in ("base", *arms, *uses) if a in row) for row in rows]
    lines += [
        "",
        f"Training took {min(cpu):.0f} to {max(cpu):.0f} processor seconds a seed."
        f" Measured {whole['date']}, {whole['machine']}; other jobs were running.",
    ]
    return "\n".join(lines) + "\n"


def grid(rows: list[dict], arms: list[str]) -> list[str]:
    lines = [f"| seed | {' | '.join(arms)} |", f"|{'---|' * (1 + len(arms))}"]
    for row in rows:
        values = [f"{final(row[a]):.1f}" if a in row else "" for a in arms]
        lines.append(f"| {row['seed']} | {' | '.join(values)} |")
    return lines


def lengths(rows: list[dict]) -> list[str]:
    """What the price on length does to it, on the held-out judged answers."""
    arms = [arm for arm in LENGTHS if any(arm in row for row in rows)]
    if not arms:
        return []
    lines = [
        "",
        "Judges of three lengths, greedy on held-out answers, and sampled in the last 20 steps:",
        "",
        "| judge | right | tokens | right, sampled | tokens, sampled | price, sampled |",
        "|---|---|---|---|---|---|",
    ]
    for arm in arms:
        there = [row[arm] for row in rows if arm in row]
        cells = [plain([final(r) for r in there]), plain([r["evals"][-1]["length"] for r in there])]
        ends = [r["sampled"] for r in there]
        for key, scale, digits in SAMPLED:
            cells.append(plain([scale * e[key] for e in ends], digits) if all(ends) else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines.append("")
    for arm, what in (("wordy_rl", "from 32 to 48 tokens"), ("wordy_dear", "from 8 to 32 tokens")):
        pairs = [(row[arm], row["wordy_free"]) for row in rows if {arm, "wordy_free"} <= {*row}]
        gaps = [
            interval([scale * (a["sampled"][key] - b["sampled"][key]) for a, b in pairs])
            for key, scale, _ in SAMPLED[:2]
            if pairs
        ]
        lines += [f"A price {what} over none, sampled: {' points, '.join(gaps)} tokens."] * bool(
            gaps
        )
    return lines


def crossed(rows: list[dict]) -> list[str]:
    """Judges against answers of the model that they learned from, and of the other one."""
    there = [row for row in rows if all("on_other" in row.get(arm, {}) for arm in CROSS)]
    if not there:
        return []
    lines = ["", "| judge learned from answers of | on the policy's | on the other's |"]
    lines.append("|---|---|---|")
    on = {a: [(final(r[a]), 100 * r[a]["on_other"]) for r in there] for a in CROSS}
    for arm, who in zip(CROSS, ("the policy", "the other", "both"), strict=True):
        own, other = ([v[i] for v in on[arm]] for i in (0, 1))
        lines.append(f"| {who} ({arm}) | {plain(own)} | {plain(other)} |")
    pairs = list(zip(on["long"], on["long_other"], strict=True))
    family = [(a[0] - a[1] + b[1] - b[0]) / 2 for a, b in pairs]
    both = [
        sum(p) / 2 - (sum(a) + sum(b)) / 4 for p, (a, b) in zip(on["long_pool"], pairs, strict=True)
    ]
    answers = [final(r["other"]) for r in there]
    lines += [
        "",
        f"{len(there)} seeds; the other model is right on {plain(answers)} of the problems.",
        f"Judging answers of the model learned from, over the other's: {interval(family)}.",
        f"Learning from both over one of them, mean of both benches: {interval(both)}.",
    ]
    return lines


def points(rows: list[dict]) -> list[downstream.Point]:
    """Every judge that a policy learned from: how good it is, and what the policy gained."""
    return [
        downstream.Point(row["seed"], by, how, final(row[by]), final(row[use]) - final(row["base"]))
        for row in rows
        for use, (how, by) in USES.items()
        if use in row and by in row
    ]


def plain(values: list[float], digits: int = 1) -> str:
    """As `interval`, of something that is no difference."""
    return interval(values, digits).replace("+", "")
