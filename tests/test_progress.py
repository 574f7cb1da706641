"""Progress of long commands: what is said, when, where; a clock that the test turns."""

from __future__ import annotations

import io
import json
import threading

import pytest

from reasonrl import cli, models, progress
from reasonrl.cli import main
from reasonrl.commands import waiting
from reasonrl.prm import PRM, Reading
from reasonrl.progress import Progress, phase, watched
from reasonrl.records import InputError, Problem
from reasonrl.rollout import Sampling, sample
from reasonrl.stepwise import Trace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def viewed(stream=None):
    clock = Clock()
    return Progress(stream, clock), clock


def test_plain_lines_after_two_seconds_and_then_now_and_then():
    stream = io.StringIO()
    view, clock = viewed(stream)
    with watched(view), phase("scoring", 8, "rows") as part:
        for second in range(45):
            clock.now = 100.0 + second
            view.look()
            if second == 1:
                assert stream.getvalue() == ""
            if second % 10 == 0:
                part.add(1, tokens=100)
    assert stream.getvalue().splitlines() == [
        "scoring 1/8 rows, 50 tokens/s, left 14s",
        "scoring 3/8 rows, 14 tokens/s, left 37s",
        "scoring 5/8 rows, 12 tokens/s, left 25s",
    ]
    view.clear()
    assert "\x1b" not in stream.getvalue()


def test_one_line_in_place_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    view, clock = viewed(stream)
    with watched(view), phase("reading", 4, "tables") as part:
        view.look()
        assert stream.getvalue() == ""
        clock.now += 4
        part.add(2)
        view.look()
    assert stream.getvalue() == "\r\x1b[2Kreading 2/4 tables, 0.5 tables\r"[: 4 + 30] + "\r"
    view.clear()
    assert stream.getvalue().endswith("\r\x1b[2K") and "\x1b[3" not in stream.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    plain, clock = viewed(Terminal())
    clock.now += 3
    plain.look()
    assert plain.stream.getvalue() == ""  # nothing is known yet
    clock.now += 17
    plain.look()
    assert plain.stream.getvalue() == "working, 20s\n"


def test_phases_inside_phases():
    view, clock = viewed()
    with watched(view):
        with phase("labelling", 64, "traces") as outer, phase("asking", 4, "replies") as inner:
            clock.now += 2
            inner.add(3)
            assert view.text() == (
                "labelling 0/64 traces · asking 3/4 replies, 1.5 replies/s, left 1s"
            )
            outer.add(16)
        with phase("sampling", 10, "completions") as outer:
            with phase("sampling", 5, "completions") as inner:  # half of what is asked for
                inner.add(2)
            assert inner is outer and view.text().startswith("sampling 2/10 completions")
        with pytest.raises(InputError), phase("loading a model"):
            clock.now += 61
            assert view.text() == "loading a model, 1m01s"
            raise InputError("no")
        assert view.phases == []


def test_nobody_watches():
    with phase("sampling", 2, "completions") as part:
        part.add(1, tokens=5)
    assert progress._current is None


def test_the_real_work_says_how_far_it_is(monkeypatch):
    """Sampling and scoring count what they did, and end where there is nothing left."""
    said: dict[str, tuple] = {}
    whole = progress.Phase.add

    def add(self, count=1, tokens=0):
        whole(self, count, tokens)
        said[self.name] = self.done, self.total, self.tokens

    monkeypatch.setattr(progress.Phase, "add", add)
    policy = models.load("tiny")
    ids = [policy.tokenizer.encode(text, add_special_tokens=False) for text in ("1+1=", "2+22=")]
    problems = [Problem(str(i), "") for i in range(2)]
    rollout = sample(policy, problems, ids, 3, Sampling(5), 0)
    made = sum(map(len, rollout.completion_ids))
    assert said["sampling"] == (6, 6, made)
    prm = PRM.new(policy, Reading(end=policy.tokenizer.eos_token_id))
    prm.score([Trace(str(i), "1+1=", [f"{i}\n", "so\n"]) for i in range(3)])
    assert said["scoring"][:2] == (3, 3) and said["reading"] == (3, 3, 0)
    assert said["scoring"][2] > 3 * 3


def slow(monkeypatch, after=0.0):
    """A command that ends when it has been looked at a few times."""
    monkeypatch.setattr(progress, "AFTER", after)
    monkeypatch.setattr(progress, "LOOK", 0.001)
    looks, seen = threading.Semaphore(0), Progress.look

    def look(self):
        seen(self)
        looks.release()

    monkeypatch.setattr(Progress, "look", look)
    build = cli._parser

    def parser():
        made = build()
        command = made._subparsers._group_actions[0].add_parser("slow")
        waiting.add(command)

        def run(options):
            with phase("going", 4, "miles") as part:
                part.add()
                for _ in range(0 if options.quiet else 3):
                    assert looks.acquire(timeout=60)
            print(json.dumps({"data": 1}))
            return 0

        command.set_defaults(run=run)
        return made

    monkeypatch.setattr(cli, "_parser", parser)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_command_keeps_its_output_clean(monkeypatch, capsys, quiet):
    slow(monkeypatch)
    assert main(["slow", *["--quiet"] * quiet]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"data": 1}
    assert ("going 1/4 miles" in err) is not quiet and len(err.splitlines()) <= 1
    assert progress._current is None


def test_nothing_is_said_before_its_time(monkeypatch, capsys):
    slow(monkeypatch, after=3600.0)
    assert main(["slow"]) == 0
    assert capsys.readouterr().err == ""


def test_lines_of_a_command_are_not_drawn_into(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    view, clock = viewed(stream)
    with watched(view):
        clock.now += 3
        view.look()
        progress.say("step 40/400")
    assert stream.getvalue().endswith("working, 3s\r\r\x1b[2K")
    assert capsys.readouterr().out == "step 40/400\n"
