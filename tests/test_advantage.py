"""Groups, returns, steps, whitening, the five systems: numbers worked by hand or in numpy."""

from __future__ import annotations

import math

import pytest
import torch

import reasonrl as rr

F64 = torch.float64
Q = [[2.0, -1, 3], [-2.0, -2], [1.0, 0, -1, -4], [0.0, 4]]
LENGTHS = torch.tensor([3, 2, 4, 2])
CU = torch.tensor([0, 3, 5, 9, 11])
OUTCOME = torch.tensor([1.0, 0, 0, 1], dtype=F64)
ONE_GROUP = torch.zeros(4, dtype=torch.int64)
OUTCOME_TRUST = [1.0, 1, 1, 0, 0, 0, 0, 1]
THINKING = [0.2, 0.3, 0.1, 0.9, 0.8, 0.9, 0.7, 0.2]


def packed(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=F64)


def padded(rows: list[list[float]], fill: float = math.nan) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    x = torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=F64)
    return x, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def vec(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def close(got: torch.Tensor, *want: float, atol: float = 6e-7) -> None:
    torch.testing.assert_close(got.to(F64), vec(*want), rtol=1e-5, atol=atol)


def test_group_advantage_by_hand():
    r, g = vec(1, 0, 0, 1), torch.zeros(4, dtype=torch.int32)
    close(rr.group_advantage(r, g, kind="rloo"), 2 / 3, -2 / 3, -2 / 3, 2 / 3)
    close(rr.group_advantage(r, g, kind="dr_grpo"), 0.5, -0.5, -0.5, 0.5)
    std = math.sqrt(1 / 3)
    close(rr.group_advantage(r, g, eps=0.0), *(x / std for x in (0.5, -0.5, -0.5, 0.5)))
    close(rr.group_advantage(r, g, eps=0.0, ddof=0), 1, -1, -1, 1)
    close(rr.group_advantage(r, g, eps=0.5, ddof=0), 0.5, -0.5, -0.5, 0.5)


def test_groups_in_any_order_and_of_any_size():
    r = vec(1, 5, 0, 9, 3, 2)
    g = torch.tensor([7, -2, 7, 100, -2, 7])
    close(rr.group_advantage(r, g, kind="dr_grpo"), 0, 1, -1, 0, -1, 1)
    close(rr.group_advantage(r, g, kind="rloo"), 0, 2, -1.5, 0, -2, 1.5)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("value", [0.7, 0.1, 1e30, -3.0])
def test_dead_groups_are_exactly_zero(kind, value):
    r = torch.full((8,), value)
    assert (
        rr.group_advantage(r, torch.zeros(8, dtype=torch.int64), kind=kind, eps=0.0).tolist()
        == [0.0] * 8
    )
    assert rr.group_advantage(r[:1], torch.zeros(1, dtype=torch.int64), kind=kind).tolist() == [0.0]


def test_unscored_completions_are_outside_every_statistic():
    r, g = vec(1, math.nan, 0, math.inf, 4, math.nan), torch.tensor([0, 0, 0, 0, 1, 1])
    known = torch.tensor([True, False, True, False, True, False])
    close(rr.group_advantage(r, g, kind="rloo", scored=known), 1, 0, -1, 0, 0, 0)
    with pytest.raises(ValueError, match="reward must be finite where it is scored, got nan at 1"):
        rr.group_advantage(r, g)


def test_no_completion_at_all():
    empty = torch.empty(0)
    assert rr.group_advantage(empty, torch.empty(0, dtype=torch.int64)).shape == (0,)
    assert rr.returns(empty, cu_seqlens=torch.tensor([0])).shape == (0,)
    assert rr.step_reduce(empty, torch.empty(0, dtype=torch.int64), 3).tolist() == [0, 0, 0]
    assert rr.whiten(empty).shape == (0,)


def test_returns_count_unmasked_tokens_only():
    r = vec(1, 2, math.nan, 3, 4, 5)
    m = torch.tensor([1, 1, 0, 1, 1, 1])
    got = rr.returns(r, mask=m, cu_seqlens=torch.tensor([0, 4, 4, 6]), gamma=0.5)
    close(got, 1 + 0.5 * 3.5, 2 + 1.5, 0, 3, 6.5, 5)
    close(rr.returns(vec(1, 2, 3)), 6, 5, 3)
    close(rr.returns(vec(1, 2, 3), gamma=0.0), 1, 2, 3)


def test_returns_keep_nan_in_its_row():
    got = rr.returns(vec(1, 2, math.nan, 4, 5), cu_seqlens=torch.tensor([0, 2, 5]))
    assert got[:2].tolist() == [3, 2] and got[2].isnan() and got[3:].tolist() == [9, 5]


def test_step_reduce_by_hand():
    x = vec(3, 1, 2, math.nan, 5, 5, -4)
    step = torch.tensor([2, 0, 2, -1, 0, 2, 0])
    want = {
        "sum": (2, 0, 10), "mean": (2 / 3, 0, 10 / 3), "min": (-4, 0, 2), "max": (5, 0, 5),
        "last": (-4, 0, 5), "prod": (-20, 1, 30),
    }  # fmt: skip
    for how, numbers in want.items():
        close(rr.step_reduce(x, step, 3, how=how), *numbers)


def test_step_reduce_ties_and_nan():
    x = vec(2, 2, 1).requires_grad_()
    rr.step_reduce(x, torch.tensor([0, 0, 0]), 1, how="max").sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 0, 0]
    for how in ("sum", "mean", "min", "max", "last", "prod"):
        got = rr.step_reduce(vec(1, math.nan, 2, 3), torch.tensor([0, 0, 1, 1]), 2, how=how)
        assert got[0].isnan() and not got[1].isnan()


def test_step_expand_by_hand():
    v, step = vec(1, math.nan, 3), torch.tensor([[0, -1, 2], [0, 2, -1]])
    assert rr.step_expand(v, step).tolist() == [[1, 0, 3], [1, 3, 0]]
    assert rr.step_expand(v, step, where="last").tolist() == [[0, 0, 0], [1, 3, 0]]


def test_whiten_by_hand():
    close(rr.whiten(vec(1, 2, 3), eps=0.0), -1, 0, 1)
    close(rr.whiten(vec(1, math.inf, 3), mask=torch.tensor([1, 0, 1]), eps=2.0), -0.5, 0, 0.5)
    close(rr.whiten(vec(5.0)), 0)


def test_trust_paper_example():
    o, t, g = vec(*OUTCOME_TRUST), vec(*THINKING), torch.zeros(8, dtype=torch.int64)
    close(rr.trust_weight(o, t, g), *[0.535261] * 8)
    want = {
        0: (1.032116, 1.048174, 1.016058, 0.144521, 0.128463, 0.144521, 0.112405, 1.032116),
        750: (1.019479, 1.029219, 1.009740, 0.087656, 0.077917, 0.087656, 0.068177, 1.019479),
        1500: (1.011815, 1.017722, 1.005907, 0.053166, 0.047259, 0.053166, 0.041351, 1.011815),
    }
    advantage = {
        0: (0.935059, 0.968439, 0.901679, -0.910024, -0.943404, -0.910024, -0.976784, 0.935059),
        750: (0.935293, 0.954693, 0.915893, -0.920743, -0.940143, -0.920743, -0.959543, 0.935293),
        1500: (0.935371, 0.946846, 0.923896, -0.926765, -0.938239, -0.926765, -0.949714, 0.935371),
    }
    for step in want:
        r = rr.trust_reward(o, t, g, step, 1500)
        close(r, *want[step])
        close(rr.group_advantage(r, g), *advantage[step])


def test_trust_as_released_and_aligned():
    o, t, g = vec(*OUTCOME_TRUST), vec(*THINKING), torch.zeros(8, dtype=torch.int64)
    t[3] = math.nan  # never asked for: the outcome is below 0.2
    r = rr.trust_reward(o, t, g, 0, 1500, score_wrong=False)
    close(r, 1.06, 1.09, 1.03, 0, 0, 0, 0, 1.06)
    high, low = 0.935038, -0.935038
    close(rr.group_advantage(r, g), high, 0.987965, 0.882112, low, low, low, low, high)
    g = torch.zeros(4, dtype=torch.int64)
    r = rr.trust_reward(vec(1, 1, 0, 0), vec(0.9, 0.7, 0.4, 0.2), g, 0, 1500)
    close(r, 1.27, 1.21, 0.12, 0.06)
    close(rr.group_advantage(r, g), 0.909970, 0.819725, -0.819725, -0.909970)


@pytest.mark.parametrize(
    ("total", "weights"),
    [
        (1500, (0.3, 0.214959, 0.110364)),
        (12000, (0.3, 0.287757, 0.264749)),
        (500, (0.3, 0.110364, 0.014936)),
    ],
)
def test_trust_annealing(total, weights):
    for step, weight in zip((0, 500, 1500), weights, strict=True):
        r = rr.trust_reward(vec(1, 0), vec(1, 0), torch.tensor([0, 0]), step, total)
        close(r, 1 + weight, 0)


def test_trust_gammas_that_the_paper_prints():
    for gap, gamma in ((0.3, 0.740818), (0.8, 0.449329), (0.713350, 0.49)):
        got = rr.trust_weight(vec(1, 0), vec(0, gap), torch.tensor([4, 4]))
        close(got, gamma, gamma)


def test_trust_degenerate_groups_and_float32_thresholds():
    o, t = (
        torch.tensor([0.9, 1.0, 0.1, 0.0, 0.9, 0.5]),
        torch.tensor([1.0, 0.5, 1.0, 0.5, 0.0, 1.0]),
    )
    g = torch.tensor([0, 0, 1, 1, 2, 2])
    assert rr.trust_reward(o, t, g, 0, 10)[:4].tolist() == o[:4].tolist()
    close(rr.trust_reward(o, t, g, 0, 10)[4:], 0.9, 0.8)
    close(rr.trust_reward(o, t, g, 0, 10, keep_degenerate=True)[:2], 1.2, 1.15)
    exact = rr.trust_weight(o.double(), t.double(), g)  # 0.5 is right, in float64 as in float32
    close(exact, 1, 1, 1, 1, 1, 1)


def test_trust_missing_thinking_takes_the_mean_of_its_group():
    o, t = vec(1, 1, 0, 0, 1, 0), vec(0.2, math.nan, 0.8, 0.4, math.nan, math.nan)
    g, known = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    gamma, mean = math.exp(0.2 - 0.6), (0.2 + 0.8 + 0.4) / 3
    got = rr.trust_reward(o, t, g, 0, 10, scored=known)
    want = [1 + 0.3 * gamma * 0.2, 1 + 0.3 * gamma * mean, 0.3 * gamma * 0.8, 0.3 * gamma * 0.4]
    close(got, *want, 1, 0)
    got = rr.trust_reward(o, t, g, 0, 10, scored=known, score_wrong=False)
    close(
        got, 1 + 0.3 * 0.2, 1 + 0.3 * 0.2 / 3, 0, 0, 1, 0
    )  # the zeros are known members of the mean
    with pytest.raises(ValueError, match="thinking must be finite"):
        rr.trust_reward(o, t, g, 0, 10)


def test_prime_cross_entropy():
    q = packed(Q).requires_grad_()
    loss = rr.implicit_prm_loss(q, torch.zeros_like(q), OUTCOME, cu_seqlens=CU)
    loss.backward()
    loss = loss.detach()
    assert float(loss) == pytest.approx(0.598139, rel=1e-5)
    per_token = vec(-0.005627, 0.005627, 0.005627, -0.005627).repeat_interleave(LENGTHS)
    torch.testing.assert_close(q.grad, per_token, rtol=1e-4, atol=5e-7)
    soft = rr.implicit_prm_loss(vec(0.3, -0.2, 0.1), vec(0, 0, 0), vec(0.5))
    assert float(soft) == pytest.approx(0.693160, rel=1e-5)
    x, mask = padded(Q)
    same = rr.implicit_prm_loss(x, torch.where(mask, 0.0, x), OUTCOME, mask=mask)
    assert float(same) == float(loss)
    close(rr.implicit_reward(x, x * 0 + 1, mask=mask)[0], 0.05, -0.1, 0.1, 0)


PAPER = [
    [0.916667, 0.8, 0.833333],
    [-0.944444, -0.805556],
    [-0.955556, -0.983333, -0.961111, -0.888889],
    [0.922222, 0.894444],
]


def test_prime_paper_eq_5_in_both_layouts():
    got = rr.prime_advantage(0.05 * packed(Q), OUTCOME, ONE_GROUP, cu_seqlens=CU)
    torch.testing.assert_close(got, packed(PAPER), rtol=1e-5, atol=6e-7)
    x, mask = padded(Q)
    wide = rr.prime_advantage(0.05 * x, OUTCOME, ONE_GROUP, mask=mask)
    assert torch.equal(wide[mask], got) and wide[~mask].eq(0).all()


def test_prime_as_released():
    q = packed(Q) / (5 + 1e-6)
    got = rr.prime_advantage(q, OUTCOME, ONE_GROUP, cu_seqlens=CU, verl_baseline=True)
    want = [
        [1.666666, 1.155555, 1.444444],
        [-1.777778, -1.222222],
        [-1.822222, -2.066666, -2.044444, -1.755555],
        [1.688889, 1.711111],
    ]
    torch.testing.assert_close(got, packed(want), rtol=1e-5, atol=6e-7)
    white = rr.prime_advantage(
        q, OUTCOME, ONE_GROUP, cu_seqlens=CU, verl_baseline=True, whiten=True
    )
    want = [
        [1.108799, 0.816889, 0.981882],
        [-0.858425, -0.541131],
        [-0.883809, -1.023418, -1.010727, -0.845733],
        [1.121491, 1.134183],
    ]
    torch.testing.assert_close(white, packed(want), rtol=1e-5, atol=6e-7)
    plain = rr.prime_advantage(q, 0 * OUTCOME, ONE_GROUP, cu_seqlens=CU)
    close(plain[:3], 1.0, 0.533333, 0.666667)
    close(plain[5:], -1.155555, -1.266666, -1.177778, -0.888889, 1.022222, 0.911111)


def test_prime_verl_recipe_from_its_parts():
    r = vec(0.99999, -0.499995, 0, -0.99999, 0, 0.499995, 0, -0.499995, 0, 0, 0)
    process = rr.prime_advantage(r, 0 * OUTCOME, ONE_GROUP, cu_seqlens=CU, verl_baseline=True)
    outcome = rr.group_advantage(OUTCOME, ONE_GROUP, kind="rloo").repeat_interleave(LENGTHS)
    got = 5 * process + 5 * outcome
    close(got[:3], 8.333283, 1.111133, 3.888883)
    close(got[3:5], -8.888833, -2.777783)
    close(got[5:9], -1.111133, -4.999983, -5.555533, -2.777783)
    close(got[9:], 4.444433, 3.888883)
    white = rr.whiten(got)
    close(white[:5], 1.680179, 0.291366, 0.825525, -1.631618, -0.456469)
    close(white[5:], -0.135974, -0.883796, -0.990628, -0.456469, 0.932357, 0.825525)


def test_prime_grpo_and_reinforce_forms():
    r, o, g = vec(1, 3, 0, 0), vec(1, 0), torch.tensor([0, 0])
    cu = torch.tensor([0, 2, 4])
    std = math.sqrt(2)  # of the mean token rewards 2 and 0
    got = rr.prime_advantage(r, o, g, cu_seqlens=cu, form="grpo")
    half = 0.5 / math.sqrt(0.5)
    close(got, (0 + 2) / std + half, 2 / std + half, -2 / std - half, -1 / std - half)
    got = rr.prime_advantage(r, o, g, cu_seqlens=cu, form="reinforce", gamma=0.5)
    close(got, 1 + 1.5 + 1, 3 + 1, 0, 0)


def test_prime_dead_parts_and_unscored():
    r, g, cu = vec(1, 3, 2, math.nan, 5), torch.tensor([0, 0, 0, 0]), torch.tensor([0, 2, 3, 4, 5])
    known = torch.tensor([True, True, False, False])
    r[4] = math.inf
    got = rr.prime_advantage(r, vec(1, 0, math.nan, 7), g, cu_seqlens=cu, scored=known, form="grpo")
    half = 0.5 / math.sqrt(0.5)  # mean token rewards 2 and 2: the process part is dead
    close(got, half, half, -half, 0, 0)
    lone = rr.prime_advantage(vec(1, 2), vec(1), torch.tensor([0]))
    assert lone.tolist() == [0, 0]


def test_reasonflux_worked_example():
    target = rr.reasonflux_step_target(vec(0.8, 0.2, 0.6), vec(0.9, 0.6, 0.3), vec(0.5, 0.4, 0.1))
    close(target, 0.760742, 0.426490, 0.376126)
    assert float(rr.reasonflux_step_target(vec(0.8), vec(0.9), vec(-1.038743))) == pytest.approx(
        0.719673, rel=1e-5
    )
    for alpha, want in ((0.1, 0.583619), (0.8, 1.021119), (1.0, 1.146119), (1.5, 1.458619)):
        assert float(rr.reasonflux_score(target, 0.625, alpha=alpha)) == pytest.approx(
            want, rel=1e-5
        )
    batch, keep = padded([[0.5, 0.7], [0.2], []])
    close(rr.reasonflux_score(batch, vec(1, 0, 0.3), mask=keep), 1.6, 0.2, 0.3)
    got = rr.reasonflux_reward(vec(1, 0, 1, 0), vec(0.9, 0.9, 0.2, 0.2))
    close(got, 0.925, 0.675, 0.4, 0.15)


def test_libra_and_dpo():
    verdict, label = vec(1, 1, 1, 0, 0, math.nan), torch.tensor([1, 1, 1, 1, 1, 1])
    length = torch.tensor([3000, 6000, 9000, 3000, 7000, 6000])
    got = rr.libra_reward(verdict, label, length, l_exp=4000, l_max=8000)
    close(got, 1, 0.5, 0, 0, -0.75, -0.5)
    got = rr.libra_reward(vec(1, 1), label[:2], torch.tensor([10, 11]), l_exp=10, l_max=10)
    close(got, 1, 0)
    loss = rr.dpo_loss(vec(-1, -2), vec(-2, -2), vec(-3, -1), vec(-2, -1), beta=0.5)
    want = (math.log(1 + math.exp(-1.0)) + math.log(2)) / 2
    assert float(loss) == pytest.approx(want, rel=1e-9)


def test_systems_refuse_bad_input():
    with pytest.raises(ValueError, match=r"outcome must lie in \[0, 1\], got 1.5"):
        rr.implicit_prm_loss(vec(1), vec(1), vec(1.5))
    with pytest.raises(ValueError, match="verdict must hold 0 and 1, got 0.5"):
        rr.libra_reward(vec(0.5), torch.tensor([1]), torch.tensor([1]), l_exp=1, l_max=2)
    with pytest.raises(ValueError, match="l_max must be >= l_exp"):
        rr.libra_reward(vec(1), torch.tensor([1]), torch.tensor([1]), l_exp=3, l_max=2)
    with pytest.raises(ValueError, match="verl_baseline needs form='rloo', got 'grpo'"):
        rr.prime_advantage(vec(1), vec(1), torch.tensor([0]), form="grpo", verl_baseline=True)
    with pytest.raises(ValueError, match="token_reward must be finite"):
        rr.prime_advantage(
            vec(math.nan, 1), vec(1, 0), torch.tensor([0, 0]), cu_seqlens=torch.tensor([0, 1, 2])
        )
    with pytest.raises(ValueError, match=r"final_score must be \(2,\), got \(\)"):
        rr.reasonflux_score(torch.zeros(2, 3), 0.5)
