"""SophiaVL-R1's fused reward and advantage: every implementation against the formula."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from reasonrl import ops


def by_hand(outcome, thinking, group, weight, scored, score_wrong, keep, trust, threshold=0.5):
    """Reward and gamma, completion by completion, in Python numbers."""
    o, t = outcome.tolist(), thinking.tolist()
    reward, gamma = [0.0] * len(o), [0.0] * len(o)
    for g in set(group.tolist()):
        rows = [b for b in range(len(o)) if int(group[b]) == g]
        value = {}
        for b in rows:
            if not score_wrong and o[b] < 0.2:
                value[b] = 0.0
            elif bool(scored[b]):
                value[b] = t[b]
        right = [v for b, v in value.items() if o[b] >= threshold]
        wrong = [v for b, v in value.items() if o[b] < threshold]
        factor = 1.0
        if trust and right and wrong:
            factor = math.exp(min(0.0, sum(right) / len(right) - sum(wrong) / len(wrong)))
        mean = sum(value.values()) / len(value) if value else 0.0
        one_sided = all(o[b] > 0.85 for b in rows) or all(o[b] < 0.15 for b in rows)
        for b in rows:
            thought = 0.0 if one_sided and not keep else value.get(b, mean)
            reward[b], gamma[b] = o[b] + factor * weight * thought, factor
    return reward, gamma


def draw(seed: int, count: int):
    """Outcomes of which none stands on a threshold; groups in any order, of any size."""
    rng = torch.Generator().manual_seed(seed)
    levels = torch.tensor([0.0, 0.05, 0.3, 0.6, 0.95, 1.0])
    outcome = levels[torch.randint(6, (count,), generator=rng)]
    thinking = torch.rand(count, generator=rng)
    group = torch.randint(max(1, count // 5), (count,), generator=rng) * 7 - 3
    return outcome, thinking, group, torch.rand(count, generator=rng) < 0.7


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("count", [0, 1, 2, 8, 97])
def test_against_the_formula(impl, count):
    for i, options in enumerate(product((True, False), repeat=3)):
        score_wrong, keep, trust = options
        outcome, thinking, group, scored = draw(10 * count + i, count)
        out = ops.trust_advantage(
            outcome, thinking, group, 30, 100, alpha=0.4, score_wrong=score_wrong,
            keep_degenerate=keep, trust=trust, scored=scored, impl=impl,
        )  # fmt: skip
        weight = 0.4 * math.exp(-0.3)
        reward, gamma = by_hand(outcome, thinking, group, weight, scored, score_wrong, keep, trust)
        torch.testing.assert_close(out.reward, torch.tensor(reward), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out.gamma, torch.tensor(gamma), rtol=1e-6, atol=0)
        wanted = ops.group_advantage(out.reward, group, impl="reference")
        torch.testing.assert_close(out.advantage, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind, ddof", [("grpo", 1), ("grpo", 0), ("dr_grpo", 1), ("rloo", 1)])
def test_native_equals_the_reference(kind, ddof):
    outcome, thinking, group, scored = draw(5, 301)
    given = {"kind": kind, "ddof": ddof, "eps": 1e-4, "scored": scored}
    fast = ops.trust_advantage(outcome, thinking, group, 1, 10, **given, impl="native")
    slow = ops.trust_advantage(outcome, thinking, group, 1, 10, **given, impl="reference")
    for mine, wanted in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_thresholds_are_float32(impl):
    """0.2, 0.5, 0.9 and 0.1 as the data holds them: at the bound is right, asked, one-sided."""
    o = torch.tensor([0.9, 1.0, 0.1, 0.0, 0.5, 0.2])
    t = torch.tensor([0.5, 0.25, 1.0, 0.5, 0.2, 0.6])
    g = torch.tensor([0, 0, 1, 1, 2, 2])
    out = ops.trust_advantage(o, t, g, 0, 10, score_wrong=False, impl=impl)
    assert out.reward[:4].tolist() == o[:4].tolist()
    assert out.gamma[4].item() == pytest.approx(math.exp(-0.4), rel=1e-6)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_unknown_thinking_may_hold_anything(impl):
    o, g = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 0])
    t, known = torch.tensor([0.4, math.nan, math.inf]), torch.tensor([True, False, False])
    out = ops.trust_advantage(o, t, g, 0, 10, scored=known, impl=impl)
    torch.testing.assert_close(out.reward, o + 0.3 * 0.4)
    assert bool(out.advantage.isfinite().all())
    with pytest.raises(ValueError, match="thinking"):
        ops.trust_advantage(o, t, g, 0, 10, impl=impl)


def test_compiled_whole():
    outcome, thinking, group, _ = draw(3, 40)

    @torch.compile(fullgraph=True, backend="eager")
    def both(o, t):
        return ops.trust_advantage(o, t, group, 2, 10).advantage * 2

    wanted = ops.trust_advantage(outcome, thinking, group, 2, 10).advantage * 2
    assert torch.equal(both(outcome, thinking), wanted)
