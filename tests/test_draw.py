"""Groups kept or dropped by accuracy: limits, surplus, staleness, state; nothing drawn twice."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from reasonrl.batch import merge, take
from reasonrl.config import Filter
from reasonrl.draw import Source
from reasonrl.records import Problem, Rollout, Score, infra, scored
from reasonrl.rollout import Sampling
from reasonrl.state_file import load_state, save_state


class Alone:
    num_processes = 1
    process_index = 0


class Dealt:
    """An algorithm whose group of problem n has right[n] right completions out of four."""

    def __init__(self, right, unfinished=(), unknown=()):
        self.right, self.unfinished, self.unknown = right, unfinished, unknown
        self.task, self.policy = self, SimpleNamespace(engine=None)
        self.seeds = []

    def problem(self, split, index):
        assert split == "train"
        return Problem(str(index), "")

    def problems(self, split, start, count):
        return [self.problem(split, i) for i in range(start, start + count)]

    def rollout(self, problems, group, sampling, seed):
        self.seeds.append(seed)
        rows = [(p, k) for p in problems for k in range(group)]
        return Rollout(
            problems=problems,
            prompt_ids=[[int(p.id)] for p in problems],
            group=torch.arange(len(problems)).repeat_interleave(group),
            completion_ids=[[int(p.id), k] for p, k in rows],
            text=[f"{p.id}.{k}" for p, k in rows],
            finished=[int(p.id) not in self.unfinished for p, k in rows],
            logp=[torch.tensor([-float(p.id), -float(k)]) for p, k in rows],
            pieces=[[0, 1, 2] for _ in rows],
        )

    def outcomes(self, rollout):
        if rollout.outcome is not None:
            return rollout.outcome
        out = []
        for text in rollout.text:
            n, k = map(int, text.split("."))
            out.append(infra("down") if n in self.unknown else scored(float(k < self.right[n])))
        return out


def source(algo, **limits):
    return Source(algo, Alone(), Filter(**limits))  # type: ignore[arg-type]


def draw(s, prompts=2):
    return s.draw(prompts, 4, Sampling(2), lambda number: number)


def ids(rollout):
    return [p.id for p in rollout.problems]


def test_without_limits_the_groups_come_as_they_are():
    s = source(Dealt([0] * 9))
    rollout, metrics = draw(s)
    assert ids(rollout) == ["0", "1"] and metrics == {} and not rollout.stale
    assert ids(draw(s)[0]) == ["2", "3"]


def test_groups_outside_the_limits_are_dropped_and_surplus_waits_a_step():
    #             0  1  2  3  4  5  6  7  8  9
    algo = Dealt([4, 1, 2, 3, 0, 0, 2, 2, 4, 4, 4, 4, 0, 0])
    s = source(algo, low=0.2, high=0.8, rounds=3)
    first, metrics = draw(s)
    assert ids(first) == ["1", "2"] and not first.stale  # 0 was all right; 3 came with 2
    assert metrics == {"filter/kept": 0.75, "filter/groups": 2.0, "filter/waiting": 1.0}
    assert algo.seeds == [0, 1]
    second, metrics = draw(s)
    assert ids(second) == ["3", "6"] and second.stale
    assert metrics["filter/waiting"] == 1.0 and metrics["filter/kept"] == 0.5
    third, metrics = draw(s)  # three rounds find nothing: the step is smaller, and says so
    assert ids(third) == ["7"] and metrics["filter/groups"] == 1.0
    assert s.drawn == 14


def test_nothing_survives_and_the_step_is_empty():
    rollout, metrics = draw(source(Dealt([4, 4]), low=0.2, high=0.8))
    assert rollout.problems == [] and rollout.text == []
    assert metrics["filter/groups"] == 0.0


def test_unknown_outcomes_do_not_count_and_cut_groups_can_be_dropped():
    algo = Dealt([2, 2, 2, 2], unfinished=(1,), unknown=(2,))
    assert ids(draw(source(algo, low=0.2, high=0.8), 4)[0]) == ["0", "1", "3"]
    assert ids(draw(source(algo, drop_clipped=True), 4)[0]) == ["0", "3"]


def test_the_grades_travel_with_the_groups():
    rollout, _ = draw(source(Dealt([1, 3]), low=0.2, high=0.8))
    assert [s.value for s in rollout.outcome] == [1, 0, 0, 0, 1, 1, 1, 0]


def test_what_waits_survives_a_checkpoint(tmp_path):
    right = [4, 1, 2, 3, 1, 1, 1, 1]
    s, other = (source(Dealt(right), low=0.2, high=0.8, rounds=3) for _ in range(2))
    draw(s)
    save_state(tmp_path / "waiting", s.state())
    other.drawn = s.drawn
    other.restore(load_state(tmp_path / "waiting"))
    a, b = draw(s)[0], draw(other)[0]
    assert ids(a) == ids(b) == ["3", "4"]
    assert a.text == b.text and a.stale and b.stale
    assert list(a.outcome) == list(b.outcome)
    assert all(torch.equal(x, y) for x, y in zip(a.logp, b.logp, strict=True))


def test_take_and_merge_are_inverse():
    rollout = Dealt([]).rollout([Problem(str(i), "") for i in range(3)], 2, None, 0)
    rollout = replace(rollout, outcome=[Score("scored", float(i)) for i in range(6)])
    parts = [take(rollout, [g]) for g in range(3)]
    whole = merge(parts)
    assert whole.text == rollout.text and whole.group.tolist() == rollout.group.tolist()
    swapped = take(rollout, [2, 0])
    assert swapped.text == ["2.0", "2.1", "0.0", "0.1"]
    assert swapped.group.tolist() == [0, 0, 1, 1]
    assert [s.value for s in swapped.outcome] == [4, 5, 0, 1]
    mixed = merge([replace(parts[0], outcome=None), parts[1]])
    assert mixed.outcome is None and len(mixed.text) == 4


@pytest.mark.parametrize("limits", [{"low": -0.1}, {"rounds": 0}])
def test_limits_are_checked(limits):
    with pytest.raises(ValueError):
        Filter(**limits)
