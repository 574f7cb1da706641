"""300 hostile maths strings from four kinds of callers, and what 50,000 verdicts leave behind.

The short form takes every twentieth string and 1,000 verdicts; `make torture` all of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from reasonrl.rewards import verify
from reasonrl.rewards.verify import verify_math

TIMEOUT = 0.5  # seconds of work on one string; the wall clock may show 7 s at most


def hostile(mark: str) -> list[str]:
    """Towers (Math-Verify issue 65 among them), factorials, nests, code, rubbish: 300."""
    calls = [
        f"__import__('os').system('touch {mark}')",
        f"open('{mark}', 'w')",
        f"exec('open(\\'{mark}\\', \\'w\\')')",
        f"eval('open(\\'{mark}\\', \\'w\\')')",
        f"(lambda: open('{mark}', 'w'))()",
        f"[c for c in ().__class__.__base__.__subclasses__()][0]('{mark}')",
        f"sympify('open(\\'{mark}\\', \\'w\\')')",
        f"Symbol('x', __class__=open('{mark}', 'w'))",
        f"print(globals(), file=open('{mark}', 'w'))",
        f"getattr(__builtins__, 'open')('{mark}', 'w')",
    ]
    around = ("\\boxed{%s}", "$%s$", "%s", "\\text{%s}", "#### %s", "\\boxed{1+%s}")
    found = [form % call for call in calls for form in around]  # 60
    found += [rf"\boxed{{{a}^{{{b}^{{{c}^{c}}}}}}}" for a in (2, 9, 10) for b in (3, 9, 10, 99)
              for c in (5, 9, 10, 77, 999)]  # 60  # fmt: skip
    found += [rf"\boxed{{{base}^{{{10**n}}}}}" for base in (2, 7, 9.5) for n in range(6, 16)]  # 30
    found += [rf"\boxed{{(10^{{{n}}})!}}" for n in range(6, 16)]
    found += ["\\boxed{" + "(" * n + "9" + "!)" * n + "}" for n in range(3, 13)]
    found += [rf"\boxed{{\binom{{{10**n}}}{{{10**n // 2}}}}}" for n in range(6, 16)]
    found += ["\\boxed{" + "(" * n + "1" + ")" * n + "}" for n in range(300, 3300, 300)]
    found += ["\\boxed{" + "\\frac{1}{" * n + "2" + "}" * n + "}" for n in range(70, 770, 70)]
    found += ["\\boxed{" + "\\sqrt{" * n + "2" + "}" * n + "}" for n in range(70, 770, 70)]
    found += ["\\boxed{" + "{" * n + "1" + "}" * n + "}" for n in range(400, 4400, 400)]
    found += ["\\boxed{" + "9" * n + "}" for n in range(800, 8800, 800)]
    found += ["\\boxed{" + "x^2+" * n + "1}" for n in range(200, 2200, 200)]
    found += ["\\boxed{(x+y)^{" + str(10**n) + "}}" for n in range(3, 13)]
    found += [rf"\boxed{{\sum_{{i=1}}^{{10^{{{n}}}}} i^i}}" for n in range(3, 13)]
    found += [rf"\boxed{{\int_0^{{{n}}} e^{{x^{{x^x}}}} dx}}" for n in range(10)]
    found += ["$ " * n for n in range(400, 4400, 400)]
    found += ["\\boxed{" * n for n in range(300, 3300, 300)]
    found += [f"\\boxed{{{chr(c)}\ud800\x00}}" for c in (0, 1, 0x202E, 0x200B, 0xFFFF, 0xFEFF,
              0x0660, 0x221E, 0x1D7D8, 0x10FFFF)]  # fmt: skip
    return found


def one(text: str, gold: str) -> tuple[str, float | None, float]:
    began = time.monotonic()
    (score,) = verify_math([text], [gold], timeout=TIMEOUT)
    return score.kind, score.value, time.monotonic() - began


def mixed(texts: list[str]) -> list[tuple[str, str]]:
    """Every hostile string with a good answer behind it."""
    good = [(rf"\boxed{{\frac{{{i}}}{{9973}}}}", f"{i}/9973") for i in range(1, len(texts) + 1)]
    return [pair for text, right in zip(texts, good, strict=True) for pair in ((text, "5"), right)]


def in_threads(texts: list[str]) -> list[tuple[str, float | None, float]]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda pair: one(*pair), mixed(texts)))


def in_one_thread(texts: list[str]) -> list[tuple[str, float | None, float]]:
    found: list = []
    thread = threading.Thread(target=lambda: found.extend(one(*p) for p in mixed(texts)))
    thread.start()
    thread.join()
    return found


def in_asyncio(texts: list[str]) -> list[tuple[str, float | None, float]]:
    async def all_of_them():
        gate = asyncio.Semaphore(4)

        async def each(pair):
            async with gate:
                return await asyncio.to_thread(one, *pair)

        return await asyncio.gather(*(each(pair) for pair in mixed(texts)))

    return asyncio.run(all_of_them())


def in_a_process(texts: list[str]) -> list[tuple[str, float | None, float]]:
    """A process of its own, whose main thread asks."""
    script = (
        "import json, sys\nsys.path[:0] = sys.argv[1:]\nimport test_verify_hostile as t\n"
        "pairs = t.mixed(json.load(sys.stdin))\njson.dump([t.one(*p) for p in pairs], sys.stdout)"
    )
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", script, str(here), str(here.parent)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(row) for row in json.loads(done.stdout)]


CALLERS = {"threads": in_threads, "a thread": in_one_thread, "asyncio": in_asyncio,
           "a process": in_a_process}  # fmt: skip


def held(tmp_path: Path, caller: str, step: int) -> None:
    mark = tmp_path / "mark"
    texts = hostile(str(mark))
    assert len(texts) == len(set(texts)) == 300
    verify._cache.clear()
    found = CALLERS[caller](texts[::step])
    assert len(found) == 2 * len(texts[::step]) and not mark.exists()
    slowest = max(seconds for _, _, seconds in found)
    ends = [kind for kind, _, _ in found[::2]]
    print(f"{caller}: {len(ends)} hostile, slowest {slowest:.1f} s,"
          f" {ends.count('infra')} infra")  # fmt: skip
    assert slowest <= 7.0
    for (kind, value, _), text in zip(found[::2], texts[::step], strict=True):
        assert (kind, value) in (("scored", 0.0), ("infra", None), ("unscorable", None)), text[:60]
    assert [(kind, value) for kind, value, _ in found[1::2]] == [("scored", 1.0)] * len(ends)


@pytest.mark.parametrize("caller", CALLERS)
def test_hostile_strings_cost_their_time(caller, tmp_path):
    held(tmp_path, caller, 20)


@pytest.mark.torture
@pytest.mark.parametrize("caller", CALLERS)
def test_300_hostile_strings_cost_their_time(caller, tmp_path):
    held(tmp_path, caller, 1)


def nothing_left(count: int, tmp_path: Path) -> None:
    """Verdicts, a hanging string every 500: as many descriptors and processes as before."""
    me = psutil.Process()

    def ask(first: int, size: int) -> None:
        golds = [f"{i}/{100_003 + i % 7}" for i in range(first, first + size)]
        texts = [rf"\boxed{{\frac{{{2 * i}}}{{{2 * (100_003 + i % 7)}}}}}"
                 for i in range(first, first + size)]  # fmt: skip
        texts[0], golds[0] = rf"\boxed{{9^{{9^{{9^{first + 9}}}}}}}", "5"
        got = verify_math(texts, golds, timeout=10.0 if size < 500 else 2.0)
        assert [s.value for s in got[1:]] == [1.0] * (size - 1) and got[0].value is None

    def seen() -> tuple[int, int, int]:
        """Descriptors, children (other tests' may be among them), workers."""
        children = len(me.children(recursive=True))
        return len(os.listdir("/proc/self/fd")), children, len(verify._pool().all)

    ask(1, 500)
    before = seen()
    for first in range(1000, 1000 + count, 500):
        ask(first, 500)
    after = seen()
    print(f"{count} verdicts: descriptors, processes, workers {before} before, {after} after")
    assert after == before


def test_verdicts_leave_nothing_behind(tmp_path):
    nothing_left(1_000, tmp_path)


@pytest.mark.torture
def test_50000_verdicts_leave_nothing_behind(tmp_path):
    nothing_left(50_000, tmp_path)
