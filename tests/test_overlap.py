"""The next step's completions drawn during this one's update: it happens, is corrected and bounded,
and a run that stops, loses its server or its process goes on as it was."""

from __future__ import annotations

import shutil
import threading

import pytest
from engine_server import EngineServer
from test_engine import SIZE, rows, words

from reasonrl.algos import Process
from reasonrl.chat.ahead import Ahead
from reasonrl.cli import main
from reasonrl.records import ScorerDown
from reasonrl.update import Learner

STEP = 6  # completions
MORE = {"eval_problems": 0, "cold_start_steps": 1, "steps": 4, "learning_rate": 0.01}
MORE |= {"save.every": 1, "save.keep": 9}
OVER = MORE | {"engine.overlap": "true"}


def numbers(run) -> list[dict]:
    """What must not differ between two runs that are the same."""
    return [{k: v for k, v in row.items() if not k.startswith(("time", "step_time"))}
            for row in rows(run)]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    with EngineServer("sglang", **SIZE) as server:
        assert main(words(server, out, **OVER)) == 0
    return out


def at_updates(monkeypatch, server, wanted: list[int]) -> list[int]:
    """The completions that the server has given when each update of RL is over, which waits until
    there are as many as wanted."""
    seen, step = [], Learner.step

    def waiting(self, *args, **options):
        done = step(self, *args, **options)
        if len(args) > 4:  # RL says how many updates, the cold start does not
            with server.ready:
                server.ready.wait_for(lambda: server.seen["/generate"] >= wanted[len(seen)], 20)
            seen.append(server.seen["/generate"])
        return done

    monkeypatch.setattr(Learner, "step", waiting)
    return seen


def test_the_next_completions_come_during_the_update(monkeypatch, tmp_path):
    for more, wanted in ((OVER, [2, 3, 4, 4]), (MORE, [1, 2, 3, 4])):
        with EngineServer("sglang", **SIZE) as server, monkeypatch.context() as patch:
            seen = at_updates(patch, server, [STEP * n for n in wanted])
            out = tmp_path / str(wanted[0])
            assert main(words(server, out, **more)) == 0
            assert seen == [STEP * n for n in wanted]  # nothing is asked twice, either
            pushed = [f.rsplit("/", 1)[1] for f in server.weights]
        over = more is OVER
        assert pushed == [f"weights-{n}" for n in ([1, 2, 3] if over else [1, 2, 3, 4])]
        lag = [row.get("sampling/lag") for row in rows(out)]
        assert lag == ([0.0, 1.0, 1.0, 1.0] if over else [None] * 4)
        gaps = [row["sampling/sampling_logp_difference/max"] for row in rows(out)]
        ratios = [row["sampling/importance_sampling_ratio/max"] for row in rows(out)]
        assert [gap > 0.01 for gap in gaps] == [over and n > 0 for n in range(4)]
        assert max(ratios) <= 2.0 and (ratios[-1] > 1.01) == over


def test_weights_are_pushed_only_when_all_is_drawn(tmp_path):
    """Evaluations push in between: the completions are still by the weights they were begun with,
    or the server's own word on that would have ended the run."""
    more = OVER | {"eval_problems": 2, "eval.every": 1}
    with EngineServer("sglang", **SIZE) as server:
        assert main(words(server, tmp_path / "run", **more)) == 0
        assert len(server.weights) == 5 and server.seen["/generate"] == 4 * STEP + 5 * 2
    assert [row["sampling/lag"] for row in rows(tmp_path / "run")] == [0.0, 1.0, 1.0, 1.0]


def test_a_resumed_run_is_the_unbroken_one(whole, tmp_path):
    """As if the process had died behind every checkpoint."""
    for step in (1, 2, 3):
        out = tmp_path / str(step)
        out.mkdir()
        for name in ("config.yaml", "metrics.jsonl", f"checkpoint-{step}"):
            (shutil.copytree if (whole / name).is_dir() else shutil.copy)(whole / name, out / name)
        with EngineServer("sglang", **SIZE) as server:
            assert main([*words(server, out, **OVER), "--resume"]) == 0
            assert server.seen["/generate"] == STEP * (4 - step - 1)  # what was drawn is kept
        assert numbers(out) == numbers(whole)


@pytest.mark.parametrize("fault", ["outside", "status-401"])
def test_a_server_that_fails_during_the_update_ends_the_step_that_wants_its_work(
    fault, tmp_path, capsys
):
    out = tmp_path / "run"
    with EngineServer("sglang", **SIZE) as server:
        server.faults = [*[""] * (1 + STEP), "", fault]  # in what is drawn for step 2
        assert main(words(server, out, **OVER)) == 4
        assert "rollout server" in capsys.readouterr().err.splitlines()[-1]
        assert [row["step"] for row in rows(out)] == [1]
        assert main([*words(server, out, **OVER), "--resume"]) == 0
    assert [row["sampling/lag"] for row in rows(out)] == [0.0, 0.0, 1.0, 1.0]  # drawn anew


def test_a_scorer_that_fails_gets_the_same_completions_again(whole, tmp_path, monkeypatch):
    out, score = tmp_path / "run", Process.score

    def down(self, rollout):
        if self.clock.step == 3:
            raise ScorerDown("the scorer is down")
        return score(self, rollout)

    with EngineServer("sglang", **SIZE) as server:
        with monkeypatch.context() as patch:
            patch.setattr(Process, "score", down)
            assert main(words(server, out, **OVER)) == 4
        assert main([*words(server, out, **OVER), "--resume"]) == 0
    assert numbers(out) == numbers(whole)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"engine.url": '""'}, "engine.overlap: needs engine.url"),
        ({"engine.correction": '"off"'}, "engine.overlap: needs engine.correction"),
        ({"filter.low": 0.1}, "engine.overlap: needs no filter"),
        ({"algorithm": "sft", "loss": "{name: reinforce}"}, "engine.overlap: sft draws no"),
    ],
)
def test_what_cannot_overlap_is_refused(more, said, tmp_path, capsys):
    with EngineServer("sglang", **SIZE) as server:
        assert main(words(server, tmp_path / "run", **OVER, **more)) == 2
    assert said in capsys.readouterr().err


def test_what_another_thread_raised_is_raised_where_it_is_asked_for():
    go = threading.Event()

    def work() -> int:
        assert go.wait(20)
        raise ScorerDown("lost")

    ahead = Ahead(work)
    go.set()
    for _ in range(2):
        with pytest.raises(ScorerDown, match="lost"):
            ahead.result()
    assert ahead.failed and not Ahead(lambda: 3).failed and Ahead(lambda: 3).result() == 3


def test_a_step_that_was_learned_from_is_not_drawn_again(whole, tmp_path):
    """The server is gone for the evaluation behind step 2, which no checkpoint holds yet."""
    more = OVER | {"eval.every": 2, "eval_problems": 2, "save.every": 0, "eval.at_start": "false"}
    with EngineServer("sglang", **SIZE) as server:
        assert main(words(server, tmp_path / "whole", **more)) == 0
    with EngineServer("sglang", **SIZE) as server:
        server.faults = [*[""] * (3 * STEP + 2), "refuse"]  # weights 3, for the evaluation
        out = tmp_path / "run"
        assert main(words(server, out, **more)) == 4
        assert main([*words(server, out, **more), "--resume"]) == 0
    one, two = ({row["step"]: row for row in numbers(run)} for run in (tmp_path / "whole", out))
    assert sorted(two) == [1, 3, 4] and two[3] == one[3]
