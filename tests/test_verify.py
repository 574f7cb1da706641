"""Mathematical equality in killable workers: verdicts, hostile text, threads, asyncio, leaks."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reasonrl.rewards import verify
from reasonrl.rewards.verify import verify_math
from reasonrl.workers import Pool

RIGHT = [
    (r"\boxed{\frac12}", "0.5"),
    (r"\boxed{0.5}", r"\frac{1}{2}"),
    (r"\boxed{1,000}", "1000"),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{\{2,1\}}", r"\{1,2\}"),
    (r"\boxed{(1,2)}", "(1, 2)"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{1.5e3}", "1500"),
    (r"\boxed{x=5}", "5"),
    (r"\boxed{12\text{ cm}}", "12"),
    (r"\boxed{\text{Paris}}", "paris"),
    ("<answer>7</answer>", "7"),
    ("<think>so 3</think>It is 42.", "42"),
    ("The final answer is $x^2+1$.", "1+x^2"),
    ("3 + 4 = 7\n#### 7", "7.0"),
    (r"first \boxed{1}, no: \boxed{2}", "2"),
    (r"\frac{x}{2}+1", r"\frac{x+2}{2}"),
    ("Yes.", "yes"),
    (r"\boxed{(−∞, 2]}", r"(-\infty, 2]"),
    (r"\boxed{(A)}", "A"),
]
WRONG = [
    (r"\boxed{3}", "4"),
    (r"\boxed{(2,1)}", "(1,2)"),
    (r"\boxed{sipar}", "Paris"),
    (r"\boxed{2}, or \boxed{1}", "2"),
    (r"<think>\boxed{2}</think>\boxed{3}", "2"),
    (r"\boxed{10^{18}+1}", "1000000000000000000"),
    ("It has 3 sides", "4"),
    ("4", "four"),
]


def test_right_and_wrong():
    got = verify_math([c for c, _ in RIGHT + WRONG], [a for _, a in RIGHT + WRONG])
    assert [s.kind for s in got] == ["scored"] * len(got)
    for (completion, answer), score, want in zip(
        RIGHT + WRONG, got, [1.0] * len(RIGHT) + [0.0] * len(WRONG), strict=True
    ):
        assert score.value == want, (completion, answer)


def test_no_answer_is_zero_with_a_reason_and_a_bad_gold_is_unscorable():
    texts = ["I do not know", "", r"\boxed{}", r"\boxed{\frac{1}", r"\boxed{@@}"]
    for score in verify_math(texts, ["7"] * 5):
        assert (score.kind, score.value) == ("scored", 0.0) and score.reason
    for gold in ("", "  ", r"\frac{", "???", "1" * 9000):
        (score,) = verify_math([r"\boxed{3}"], [gold])
        assert score.kind == "unscorable" and score.value is None and "gold" in score.reason
    (score,) = verify_math([r"\boxed{" + "1+" * 5000 + "1}"], ["3"])
    assert (score.value, score.reason) == (0.0, "the answer is longer than 8192 bytes")


HANGING = [r"\boxed{9^{9^{9^9}}}", r"\boxed{10^{10^{10^{10}}}}"]
HOSTILE = [
    *HANGING,
    r"\boxed{(10^8)!}",
    r"\boxed{((((10!)!)!)!)!}",
    r"\boxed{\binom{1000000000}{500000000}}",
    r"\boxed{2^{100000000}}",
    r"\boxed{9^{999999999999}}",
    "\\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    "\\boxed{" + "\\frac{1}{" * 700 + "2" + "}" * 700 + "}",
    "\\boxed{" + "{" * 4000 + "1" + "}" * 4000 + "}",
    "\\boxed{" + "9" * 8000 + "}",
    "\\boxed{" * 3000,
    "$ " * 4000,
    r"\boxed{__import__('os').system('touch MARK')}",
    "__import__('os').system('touch MARK')",
    r"\boxed{exec(\"open('MARK','w')\")}",
    "\\boxed{\x00\ud800\uffff}",
    "\n" * 9000,
]


def test_hostile_text_costs_its_time_and_nothing_else(tmp_path):
    mark = tmp_path / "mark"
    texts = [text.replace("MARK", str(mark)) for text in HOSTILE]
    start = time.monotonic()
    got = verify_math([*texts, r"\boxed{4}"], ["5"] * len(texts) + ["4.0"], timeout=1.0)
    assert time.monotonic() - start < 60
    assert not mark.exists()
    assert got[-1].value == 1.0
    for text, score in zip(texts, got, strict=False):
        assert (score.kind, score.value) in (("scored", 0.0), ("infra", None)), text[:40]
    for score in got[: len(HANGING)]:
        assert score.kind == "infra" and score.reason == "timeout after 1 s"


def test_pairs_are_matched_by_id_and_remembered():
    verify_math([r"\boxed{\frac{1}{3}}"], ["1/3"])
    golds = [f"{i}/97" for i in range(40)]
    texts = [rf"\boxed{{\frac{{{i}}}{{97}}}}" for i in range(40)]
    texts[7], texts[21] = texts[21], texts[7]
    got = [s.value for s in verify_math(texts, golds)]
    assert got == [0.0 if i in (7, 21) else 1.0 for i in range(40)]
    start = time.monotonic()
    assert [s.value for s in verify_math(texts, golds)] == got
    assert time.monotonic() - start < 0.1


def test_threads_and_asyncio():
    handler = signal.getsignal(signal.SIGALRM)
    seen = []
    thread = threading.Thread(
        target=lambda: seen.extend(verify_math([r"\boxed{\frac14}"], ["0.25"]))
    )
    thread.start()
    thread.join(60)
    assert [s.value for s in seen] == [1.0]

    def one(i: int) -> float | None:
        return verify_math([rf"\boxed{{\frac{{{i}}}{{8}}}}"], [f"{i}/8"], timeout=20)[0].value

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(one, range(1, 13))) == [1.0] * 12

    async def both():
        inside = verify_math([r"\boxed{\frac15}"], ["0.2"])
        aside = await asyncio.gather(*(asyncio.to_thread(one, i) for i in range(20, 24)))
        return [inside[0].value, *aside]

    assert asyncio.run(both()) == [1.0] * 5
    assert signal.getsignal(signal.SIGALRM) is handler


def test_bad_calls():
    with pytest.raises(ValueError, match="answers must be 2 strings, got 1"):
        verify_math(["a", "b"], ["1"])
    with pytest.raises(ValueError, match=r"completions\[0\] must be a string, got int"):
        verify_math([3], ["3"])
    with pytest.raises(ValueError, match="timeout must be > 0, got 0"):
        verify_math(["3"], ["3"], timeout=0)
    assert verify_math([], []) == []


FAKE = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    act = task["act"]
    if act == "die":
        os._exit(3)
    if act == "hang":
        if os.fork() == 0:
            time.sleep(600)
        time.sleep(600)
    wrong = task["id"] + 1 if act == "lie" else task["id"]
    print(json.dumps({"id": wrong, "pid": os.getpid()}), flush=True)
"""


@pytest.fixture
def pool(tmp_path: Path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    made = Pool(script, size=2, recycle=5)
    yield made
    made.close()


def tasks(*acts: str):
    return [{"id": i, "act": act, "timeout": 0.5} for i, act in enumerate(acts)]


def test_a_worker_that_dies_hangs_or_lies_costs_one_result(pool):
    start = time.monotonic()
    got = pool.run(tasks("go", "die", "hang", "go", "lie", "go"))
    assert time.monotonic() - start < 10
    reasons = {i: reply.get("failed") for i, reply in got.items()}
    assert reasons == {
        0: None,
        1: "the worker died",
        2: "timeout after 0.5 s",
        3: None,
        4: "the worker answered another task",
        5: None,
    }


def test_workers_are_recycled_and_leave_nothing_behind(pool):
    used = {reply["pid"] for reply in pool.run(tasks(*["go"] * 21)).values()}
    assert len(used) >= 4
    pool.run(tasks("hang"))
    groups = {worker.process.pid for worker in pool.all}
    pool.close()
    for pid in used | groups:
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, 0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.run(tasks("go"))


LEAK = r"""
import subprocess, sys
from reasonrl.rewards import verify
texts = [r"\boxed{\frac13}", r"\boxed{9^{9^{9^9}}}"]
print(verify.verify_math(texts, ["1/3", "1"], timeout=1)[0].value)
print(*(worker.process.pid for worker in verify._pool().all))
"""


def test_nothing_outlives_the_interpreter():
    run = subprocess.run([sys.executable, "-c", LEAK], capture_output=True, text=True, check=True)
    value, pids = run.stdout.splitlines()
    assert value == "1.0" and pids and not run.stderr
    for pid in map(int, pids.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_limits_hold_in_the_worker():
    verify_math([r"\boxed{\frac17}"], ["1/7"])
    worker = verify._pool().idle[0]
    limits = Path(f"/proc/{worker.process.pid}/limits").read_text()
    rows = {line[:26].strip(): line[26:].split()[0] for line in limits.splitlines()[1:]}
    assert int(rows["Max address space"]) <= 2 << 30 and rows["Max file size"] == "0"
    assert rows["Max cpu time"] != "unlimited" and rows["Max core file size"] == "0"
