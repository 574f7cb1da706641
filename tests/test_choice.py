"""Best of N: aggregation, votes, unscored completions, ties."""

from __future__ import annotations

import pytest

from reasonrl import Rewards, best_of_n, infra, scored, unscorable
from reasonrl.answer import ballot, final_answer
from reasonrl.records import Problem, Step

STEPS = {
    "a": [0.9, 0.2, 0.9],
    "b": [0.5, 0.5, 0.5],
    "c": [0.1, 0.9, 0.99],
    "d": [1.0, 0.3],
}


def prm(rollout):
    steps = [[Step(i, i + 1, r) for i, r in enumerate(STEPS[t])] for t in rollout.text]
    return Rewards(outcome=[scored(0.0)] * len(rollout.text), steps=steps)


@pytest.mark.parametrize(
    ("how", "best"), [("min", "b"), ("mean", "a"), ("last", "c"), ("prod", "d"), ("sum", "a")]
)
def test_steps_are_put_together(how, best):
    index, scores = best_of_n("p", list(STEPS), prm, how=how)
    assert list(STEPS)[index] == best and len(scores) == 4
    want = {"min": 0.2, "mean": 2 / 3, "last": 0.9, "prod": 0.162, "sum": 2.0}[how]
    assert scores[0].value == pytest.approx(want)


def outcomes(*values):
    return lambda rollout: Rewards(outcome=list(values))


def test_outcome_where_there_are_no_steps_and_ties_go_first():
    assert best_of_n("p", ["x", "y", "z"], outcomes(scored(1), scored(2), scored(2))).index == 1
    mixed = Rewards(outcome=[scored(0.4), scored(0.9)], steps=[[Step(0, 1, 0.5)], []])
    assert [s.value for s in best_of_n("p", ["x", "y"], lambda r: mixed).scores] == [0.5, 0.9]


def test_unscored_never_win_unless_nothing_is_scored():
    scores = outcomes(infra("judge down"), scored(-5), unscorable("no gold"), scored(float("nan")))
    choice = best_of_n("p", list("wxyz"), scores)
    assert choice.index == 1
    assert [s.kind for s in choice.scores] == ["infra", "scored", "unscorable", "unscorable"]
    with pytest.raises(
        ValueError, match=r"no completion could be scored \(infra: down; unscorable: x"
    ):
        best_of_n("p", ["a", "b"], outcomes(infra("down"), unscorable("x")))


def test_votes():
    texts = [r"\boxed{7}", "so it is 5", "<answer>5</answer>", "#### 5.", r"\boxed{ 7 }", ""]
    values = [0.9, 0.1, 0.3, 0.2, 0.8, 1.0]
    scores = outcomes(*map(scored, values))
    assert best_of_n("p", texts, scores).index == 5
    assert best_of_n("p", texts, scores, vote="majority").index == 2
    assert best_of_n("p", texts, scores, vote="weighted").index == 0
    down = outcomes(*map(scored, values[:2]), infra("x"), infra("x"), scored(0.8), scored(0.0))
    assert best_of_n("p", texts, down, vote="majority").index == 0


def test_the_scorer_sees_the_problem():
    seen = {}

    def look(rollout):
        seen["rollout"] = rollout
        return Rewards(outcome=[scored(1.0)] * len(rollout.text))

    best_of_n(Problem(id="7", prompt="2+2", answer="4"), ["4", "5"], look)
    assert seen["rollout"].problems[0].answer == "4" and seen["rollout"].group.tolist() == [0, 0]
    best_of_n([{"role": "user", "content": "hi"}], ["4"], look)
    assert seen["rollout"].problems[0].prompt[0]["content"] == "hi"


def test_bad_calls():
    with pytest.raises(ValueError, match="completions must be a non-empty list"):
        best_of_n("p", [], outcomes())
    with pytest.raises(
        ValueError, match="how must be one of min, mean, last, prod, sum, got 'max'"
    ):
        best_of_n("p", ["a"], outcomes(scored(1)), how="max")
    with pytest.raises(ValueError, match="vote must be one of"):
        best_of_n("p", ["a"], outcomes(scored(1)), vote="all")
    with pytest.raises(ValueError, match="the scorer must give 2 outcomes, got 1"):
        best_of_n("p", ["a", "b"], outcomes(scored(1)))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} and \boxed{ 3 }.", "3"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{}", None),
        ("<answer> 4 </answer>", "4"),
        (r"<answer>the \boxed{4}</answer>", "4"),
        (r"<think>\boxed{1}</think> it is 2", None),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        ("work\n#### 12\n", "12"),
        ("nothing", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_ballots():
    assert ballot("It is $1,234$.") == ballot(r"\boxed{1234}") == "1234"
    assert ballot("  ") is None and ballot("first\nYes.") == "yes"


def test_hostile_braces_cost_linear_time():
    assert final_answer("\\boxed{" * 200_000) is None
    assert final_answer("\\boxed{" * 50_000 + "3" + "}" * 50_000) == "3"
