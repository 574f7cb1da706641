"""Does the program pass its tests? Model-written code runs where it can do no harm, tell no lies.

    verify_code(["def f(x): return x + 1"], [["assert f(1) == 2"]])[0].value == 1.0

The completion runs in one confined process (_box.py: bubblewrap, or namespaces and Landlock; with
limits and a filter of system calls), the tests in another; only plain values cross, through this
process, so the code under test sees neither the tests nor the verdict. A score is the share of
tests passed (PRIME, arXiv 2502.01456, for code): a wrong program, one that raises, exits, hangs or
eats its memory fails the tests it fails. Tests that do not parse are unscorable; a process that
could not start or was killed from outside is infra; where no sandbox works, InputError says why.
Left out: packages outside the standard library, tests that hand functions to the program or look at
arguments it changed in place.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from reasonrl.records import Score, infra, scored, unscorable
from reasonrl.rewards._box import Box, Process, Stopped, choose
from reasonrl.watchdog import beat

FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
CODE = 1 << 17  # characters of a program, at most


class Refused(Exception):
    """The tests cannot be run as they are."""


def verify_code(
    completions: Sequence[str], tests: Sequence[Any], *, timeout: float = 5.0
) -> list[Score]:
    """The share of its tests that each completion's program passes, in [0, 1].

    The program is the last ```python fence, or the whole text where there is no fence. tests: for
    each completion a test program or a list of them (every top-level assert counts as one test), or
    a list of {"input": stdin, "output": stdout}, or {"inputs": [...], "outputs": [...]} with an
    optional "fn_name" (then inputs are lists of arguments); a dict may come as JSON text.
    `timeout` is seconds of work on one completion, all its tests. Blocking; safe from any thread.
    """
    if isinstance(completions, str) or len(completions) != len(tests):
        got = "a string" if isinstance(completions, str) else f"{len(tests)}"
        raise ValueError(f"tests must be one entry for each of the completions, got {got}")
    if not timeout > 0:
        raise ValueError(f"timeout must be > 0, got {timeout!r}")
    for i, completion in enumerate(completions):
        if not isinstance(completion, str):
            raise ValueError(f"completions[{i}] must be a string, got {type(completion).__name__}")
    box = choose()
    size = max(1, min(8, len(os.sched_getaffinity(0)), len(completions)))
    with ThreadPoolExecutor(size) as threads:
        pairs = zip(completions, tests, strict=True)
        return list(threads.map(lambda pair: _one(pair[0], pair[1], timeout, box), pairs))


def program(completion: str) -> str | None:
    """The program in a completion, or None: the last fence behind the thinking, or bare code."""
    text = completion.rpartition("</think>")[2]
    fences = FENCE.findall(text)
    code = fences[-1] if fences else "" if "```" in text else text
    return code if code.strip() else None


def _one(completion: str, tests: Any, timeout: float, box: Box) -> Score:
    beat()
    try:
        cases = _cases(tests)
    except Refused as error:
        return unscorable(str(error))
    code = program(completion)
    if code is None:
        return scored(0.0, "no program found in the completion")
    if len(code) > CODE:
        return scored(0.0, f"the program is longer than {CODE} characters")
    deadline = _Deadline(timeout)
    try:
        run = _run_scripts if isinstance(cases[0], tuple) else _run_tests
        results = run(code, cases, deadline, box)
    except Refused as error:
        return unscorable(str(error))
    except Stopped as error:
        return infra(str(error))
    failed = [reason for reason in results if reason]
    passed = len(results) - len(failed)
    reason = (
        f"{passed} of {len(results)} tests passed; first failure: {failed[0]}" if failed else ""
    )
    return scored(passed / len(results), reason)


def _cases(tests: Any) -> list[str] | list[tuple[str, str]]:
    """Test programs, or (stdin, stdout) pairs; Refused where the entry is neither."""
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        try:
            tests = json.loads(tests)
        except json.JSONDecodeError as error:
            raise Refused(f"the tests are not valid JSON: {error}") from None
    if isinstance(tests, str):
        tests = [tests]
    if isinstance(tests, Mapping):
        tests = _expanded(tests)
    if not isinstance(tests, Sequence) or not tests:
        raise Refused(f"expected tests, got {tests!r}")
    if all(isinstance(test, str) for test in tests):
        return list(tests)
    pairs = []
    for i, test in enumerate(tests):
        values = [test.get("input"), test.get("output")] if isinstance(test, Mapping) else []
        if len(values) != 2 or not all(isinstance(value, str) for value in values):
            raise Refused(f"test {i + 1}: expected a program or input and output, got {test!r}")
        pairs.append(tuple(values))
    return pairs


def _expanded(tests: Mapping[str, Any]) -> list[Any]:
    """{"inputs", "outputs", "fn_name"} as single tests."""
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise Refused("expected inputs and outputs, two lists of the same length")
    name = tests.get("fn_name")
    if name is None:
        return [{"input": a, "output": b} for a, b in zip(inputs, outputs, strict=True)]
    if not isinstance(name, str) or not name.isidentifier():
        raise Refused(f"fn_name: expected a name, got {name!r}")
    calls = [f"{name}(*{a!r})" if isinstance(a, list) else f"{name}({a!r})" for a in inputs]
    return [f"assert {call} == {wanted!r}" for call, wanted in zip(calls, outputs, strict=True)]


class _Deadline:
    def __init__(self, seconds: float):
        self.seconds, self.left = seconds, seconds


def _ask(process: Process, question: dict, deadline: _Deadline) -> dict:
    """The answer of the completion's process; its time is taken off the deadline."""
    if deadline.left <= 0:
        raise Stopped("timeout", True)
    began = time.monotonic()
    try:
        process.send(question)
        return process.receive(deadline.left)
    except Stopped as stopped:
        if str(stopped) == "timeout":
            raise Stopped(f"timeout after {deadline.seconds:g} s", True) from None
        raise
    finally:
        deadline.left -= time.monotonic() - began


def _run_scripts(code: str, cases: Sequence[Any], deadline: _Deadline, box: Box) -> list[str]:
    """ "" or the reason for every (stdin, stdout) pair, each in a fresh process."""
    results = []
    for given, wanted in cases:
        question = {"do": "script", "code": code, "stdin": given}
        try:
            with Process("code", deadline.seconds, box) as process:
                answer = _ask(process, question, deadline)
        except Stopped as stopped:
            answer = {"error": "Stopped", "message": _fault(stopped)}
        if "error" in answer:
            results.append(f"{answer['error']}: {answer.get('message')}")
        elif _lines(answer.get("value")) == _lines(wanted):
            results.append("")
        else:
            results.append(f"printed {str(answer.get('value'))[:100]!r}, expected {wanted[:100]!r}")
    return results


def _lines(text: Any) -> list[str]:
    return [line.rstrip() for line in str(text).rstrip().splitlines()]


def _run_tests(code: str, cases: Sequence[Any], deadline: _Deadline, box: Box) -> list[str]:
    """ "" or the reason for every assert of the test programs."""
    seconds = deadline.seconds
    with Process("tests", seconds, box) as tests, Process("code", seconds, box) as process:
        _parsed(tests, cases, seconds)
        broken = ""  # once the program's process is gone, every further question fails with this
        names: Any = {}
        try:
            answer = _ask(process, {"do": "execute", "code": code}, deadline)
            names = answer.get("value", {})
            if "error" in answer:
                broken = f"{answer['error']}: {answer.get('message')}"
        except Stopped as stopped:
            broken = _fault(stopped)
        tests.send({"names": names if isinstance(names, dict) else {}})
        asked = False  # from then on the tests surely hold values that the program chose
        while True:
            try:
                message = tests.receive(10.0 + seconds)
            except Stopped as stopped:
                reason = f"the tests did not come to an end: {_fault(stopped)}"
                if not asked:
                    _end_alone(cases, seconds, box)
                return [reason]
            asked = True
            if "refused" in message:
                raise Refused(message["refused"])
            if "verdict" in message:
                found = message["verdict"]
                return [f"{broken} ({r})" if r and broken else r for r in found]
            reply: dict = {"error": "RuntimeError", "message": broken}
            if not broken:
                try:
                    reply = _ask(process, message, deadline)
                except Stopped as stopped:
                    broken = _fault(stopped)
                    reply = {"error": "RuntimeError", "message": broken}
            tests.send(reply)


def _fault(stopped: Stopped) -> str:
    """The reason, where the completion is to blame; else the exception goes on."""
    if not stopped.fault:
        raise stopped
    return str(stopped)


def _parsed(tests: Process, cases: Sequence[Any], seconds: float) -> None:
    """The tests are handed over before anything of the program is: whether they can be run."""
    tests.send({"tests": list(cases)})
    try:
        message = tests.receive(10.0 + seconds)
    except Stopped as stopped:
        raise Refused(f"the tests cannot be read: {_fault(stopped)}") from None
    if "refused" in message:
        raise Refused(message["refused"])


def _end_alone(cases: Sequence[Any], seconds: float, box: Box) -> None:
    """Refused where the tests do not come to an end even without the program's names."""
    with Process("tests", seconds, box) as tests:
        _parsed(tests, cases, seconds)
        tests.send({"names": {}})
        try:
            tests.receive(10.0 + seconds)
        except Stopped as stopped:
            raise Refused(f"the tests did not come to an end: {_fault(stopped)}") from None
