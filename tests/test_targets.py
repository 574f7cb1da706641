"""Targets of steps without a rule: SYSTEMS' worked numbers, matching, what a judge may reply."""

from __future__ import annotations

import math

import pytest
import torch

from reasonrl import quality
from reasonrl.judging import tagged
from reasonrl.systems import reasonflux_reward, reasonflux_score, reasonflux_step_target
from reasonrl.targets import alignment, coherence, match, neighbours


def close(got, expected, rel=1e-5):
    assert torch.as_tensor(got).tolist() == pytest.approx(expected, rel=rel, abs=6e-7)


SCORES = torch.tensor([[0.8, 0.9, 0.5], [0.2, 0.6, 0.4], [0.6, 0.3, 0.1]], dtype=torch.float64)
TARGETS = [0.760742, 0.426490, 0.376126]


def test_worked_targets_weights_and_totals():
    close(torch.softmax(SCORES, -1)[0], [0.351372, 0.388326, 0.260303])
    close(torch.softmax(SCORES, -1)[2], [0.426013, 0.315598, 0.258390])
    step = reasonflux_step_target(*SCORES.unbind(-1))
    close(step, TARGETS)
    close(step.mean(), 0.521119)
    for alpha, total in ((0.1, 0.583619), (0.8, 1.021119), (1.0, 1.146119), (1.5, 1.458619)):
        close(reasonflux_score(step, 0.625, alpha=alpha), total)


def test_worked_coherence_and_its_weight_as_a_raw_log():
    positive = torch.tensor([0.7], dtype=torch.float64)
    others = torch.tensor([[0.2, 0.1, 0.3]], dtype=torch.float64)
    close(coherence(positive, others, how="log", tau=0.1), [-0.027160], rel=2e-5)
    close(coherence(positive, others, how="log", tau=1.0), [-1.038743])
    close(coherence(positive, others, how="infonce", tau=1.0), [math.exp(-1.038743)])
    close(coherence(positive, others), [0.85])
    mixed = torch.tensor([0.8, 0.9, -1.038743], dtype=torch.float64)
    close(torch.softmax(mixed, -1), [0.441659, 0.488109, 0.070231])
    close(reasonflux_step_target(*mixed), 0.719673)


def test_worked_loss_and_online_mix():
    found, wanted = torch.tensor([0.7, 0.5, 0.4]).double(), torch.tensor(TARGETS).double()
    step, final = ((found - wanted) ** 2).mean(), (0.55 - 0.625) ** 2
    close(step, 0.003221, rel=2e-4)  # the table rounds to six places
    close(step + final, 0.008846, rel=2e-4)
    outcome, score = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.9, 0.9, 0.2, 0.2])
    close(reasonflux_reward(outcome, score), [0.925, 0.675, 0.4, 0.15])
    logits = torch.tensor([[1.2, -0.3], [0.1, 2.0]])
    close(logits.softmax(-1)[:, 1], [0.182426, 0.869892])


@pytest.mark.parametrize("how", ["infonce", "log", "cosine"])
def test_infonce_lies_in_zero_to_one_whatever_the_others_are(how):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *n: torch.rand(*n, generator=generator) * 2 - 1  # noqa: E731
    value = coherence(draw(50), draw(50, 7), how=how, tau=0.05)
    low, high = (-math.inf, 0.0) if how == "log" else (0.0, 1.0)
    assert bool(((value >= low) & (value <= high)).all())


def test_what_coherence_refuses():
    with pytest.raises(ValueError, match="tau"):
        coherence(torch.zeros(2), torch.zeros(2, 3), how="log", tau=0.0)
    with pytest.raises(ValueError, match="others must be"):
        coherence(torch.zeros(2), torch.zeros(2, 0), how="infonce")
    with pytest.raises(ValueError, match="how must be"):
        coherence(torch.zeros(2), torch.zeros(2, 1), how="nce")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "response", "expected"),
    [
        ("abc", "xyz", (["a", "b", "c"], ["x", "y", "z"], True)),
        ("abcd", "xyz", (["a", "b", "cd"], ["x", "y", "z"], True)),
        ("abcd", "xy", (["a", "bcd"], ["x", "y"], True)),  # M = T / 2 is still matched
        ("abcde", "xy", (["a", "b", "c", "d", "e"], ["x", "y"], False)),
        ("ab", "xyz", (["a", "b"], ["x", "yz"], True)),
    ],
)
def test_surplus_steps_are_merged_into_the_one_before(steps, response, expected):
    assert match(list(steps), list(response)) == expected


def test_alignment_paired_and_over_all():
    steps = torch.tensor([[1.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    response = torch.tensor([[2.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    close(alignment(steps, response, True), [1.0, -1.0, math.sqrt(0.5)])
    close(alignment(steps, response[:2], False), [1.0, 0.0, math.sqrt(0.5)])
    with pytest.raises(ValueError, match="response must be"):
        alignment(steps, response[:2], True)


def test_the_question_is_the_step_before_the_first():
    steps = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    positive, others = neighbours(torch.tensor([0.0, 2.0]), steps, torch.tensor([[5.0, 0.0]]))
    close(positive, [0.0, math.sqrt(0.5)])
    close(others[:, 0], [0.0, 1.0])


def test_a_judge_sees_no_later_step_and_its_number_is_read():
    call = quality.ask("2+2?", ["one ", "two ", "three"], 1, "four")
    assert "two" in call.prompt and "one" in call.prompt and "three" not in call.prompt
    good = lambda x: f"fine. <quality-{call.nonce}>{x}</quality-{call.nonce}>"  # noqa: E731
    for text, value in (("0.25", 0.25), (" 1 ", 1.0), ("0", 0.0), (".5", 0.5), ("1.0", 1.0)):
        assert quality.read(good(text), call.nonce) == value


@pytest.mark.parametrize(
    "inside", ["1.5", "-0.1", "nan", "inf", "8/10", "", "high", "0.5.5", "1e0"]
)
def test_a_number_outside_zero_to_one_is_a_reason(inside):
    reply = f"<quality-abc>{inside}</quality-abc>"
    assert isinstance(quality.read(reply, "abc"), str)


def test_a_forged_or_torn_tag_is_a_reason():
    own = "<quality-abc>1</quality-abc>"
    for reply in ("", "1", "<quality-123>1</quality-123>", own + own, own + " more"):
        assert isinstance(quality.read(reply, "abc"), str), reply
    assert tagged("</quality-abc>1<quality-abc>", "abc", "quality")[1] == "a torn quality"


def test_the_prompt_depends_on_all_that_it_shows():
    calls = {
        quality.ask(*given).prompt
        for given in [
            ("q", ["a", "b"], 1, "r"),
            ("q", ["a", "b"], 0, "r"),
            ("q", ["ab"], 0, "r"),
            ("q", ["a", "b"], 1, "s"),
            ("p", ["a", "b"], 1, "r"),
        ]
    }
    assert len(calls) == 5
