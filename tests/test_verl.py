"""verl's registries: our losses and estimators give the host's numbers where it has them too."""

import itertools
from types import SimpleNamespace

import hosts
import numpy
import pytest
import torch

from reasonrl import ops
from reasonrl.integrations import verl as ours
from reasonrl.loss import NAMED


class Config(SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)


def config(**changes):
    values = {
        "clip_ratio": 0.2,
        "clip_ratio_low": None,
        "clip_ratio_high": None,
        "clip_ratio_c": 3.0,
        "global_batch_info": {},
    }
    return Config(**(values | changes))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(6, 9, generator=generator)  # noqa: E731
    old = -1.0 + 0.1 * draw()
    mask = torch.rand(6, 9, generator=generator) < 0.7
    mask[2] = False
    return old, old + 0.6 * draw(), 2 * draw(), mask


@pytest.fixture(scope="module")
def core(require):
    """The released module, among stand-ins for what it imports and does not need here."""
    require("verl", None if hosts.version("verl") else f"pip --target {hosts.folder()} verl")
    with pytest.MonkeyPatch.context() as patch:
        yield hosts.verl_module("verl.trainer.ppo.core_algos", patch)


INFO = [
    {},
    {"dp_size": 2, "batch_num_tokens": 71, "global_batch_size": 11, "loss_scale_factor": 7},
]


def per_token(old, new, advantage, low, high, dual):
    """Clipped loss of every token, written out."""
    ratio = (new - old).exp()
    worse = -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    return torch.where(advantage < 0, torch.minimum(worse, -dual * advantage), worse)


@pytest.mark.parametrize("info", INFO, ids=["local", "global"])
@pytest.mark.parametrize("mode", ours.MODES)
def test_every_aggregation_by_hand(mode, info):
    old, new, advantage, mask = batch()
    x = new.clone().requires_grad_()
    chosen = config(clip_ratio_high=0.28, global_batch_info=info)
    loss, metrics = ours.loss("dapo")(
        old_log_prob=old, log_prob=x, advantages=advantage, response_mask=mask,
        loss_agg_mode=mode, config=chosen,
    )  # fmt: skip
    y = new.clone().requires_grad_()
    token = per_token(old, y, advantage, 0.2, 0.28, 3.0) * mask
    count = mask.sum(-1)
    dp, rows = info.get("dp_size", 1), info.get("global_batch_size", int((count > 0).sum()))
    expected = {
        "token-mean": token.sum() / info.get("batch_num_tokens", int(mask.sum())),
        "token-sum": token.sum(),
        "seq-mean-token-mean": (token.sum(-1) / count.clamp(min=1)).sum() / rows,
        "seq-mean-token-sum": token.sum() / rows,
        "seq-mean-token-sum-norm": token.sum() / rows / info.get("loss_scale_factor", 9),
    }[mode] * dp
    loss.backward()
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert (x.grad - y.grad).norm() <= 1e-5 * y.grad.norm()
    assert set(metrics) == {"actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"}
    assert 0 < metrics["actor/pg_clipfrac"] < 1


@pytest.mark.parametrize("name", ours.LOSSES)
def test_every_loss_takes_the_hosts_arguments(name):
    old, new, advantage, mask = batch()
    x = new.clone().requires_grad_()
    loss, _ = ours.loss(name)(
        old_log_prob=old, log_prob=x, advantages=advantage, response_mask=mask, config=config(),
        loss_agg_mode="seq-mean-token-mean", rollout_is_weights=torch.full_like(old, 0.5),
    )  # fmt: skip
    loss.backward()
    assert torch.isfinite(loss) and x.grad.abs().sum() > 0
    assert bool((x.grad[~mask] == 0).all())


def test_estimators():
    uids = numpy.array(["b", "a", "b", "a", "b", "a"], dtype=object)
    rewards = torch.zeros(6, 4)
    mask = torch.ones(6, 4, dtype=torch.long)
    mask[1, 2:] = 0
    rewards[:, 1] = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    group = torch.tensor([1, 0, 1, 0, 1, 0])
    for kind in ours.GROUPS:
        dense, returned = ours.outcome_estimator(kind)(
            token_level_rewards=rewards, response_mask=mask, index=uids, config=None
        )
        value = ops.group_advantage(rewards.sum(-1), group, kind=kind)
        assert torch.equal(dense, value[:, None] * mask) and dense is returned
    dense, _ = ours.process_estimator("rloo")(
        token_level_rewards=rewards, response_mask=mask, index=uids, config=None
    )
    # row 0: rates of its group .25, 0, 0; returns 1 at the first token, less 4 x the others' 0
    assert dense[0].tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0])
    # row 2: the others' mean rate is .125, four tokens to go
    assert dense[2].tolist() == pytest.approx([-0.5, -0.375, -0.25, -0.125])


def test_what_is_missing_is_named():
    old, new, advantage, mask = batch()
    with pytest.raises(ValueError, match="loss_agg_mode: expected one of"):
        ours.spec("dapo", "mean", config())
    with pytest.raises(ValueError, match="batch_num_tokens: expected the global count"):
        ours.divisor("token-mean", mask, dp_size=2)
    with pytest.raises(ValueError, match="index: expected the uids of 6"):
        ours.groups(None, mask)


def test_the_released_registries_take_them_and_vanilla_agrees(core):
    names = ours.register()
    assert ours.register() == names
    assert all(
        name in core.POLICY_LOSS_REGISTRY or name in core.ADV_ESTIMATOR_REGISTRY for name in names
    )
    old, new, advantage, mask = batch()
    assert {f"reasonrl_{name}" for name in NAMED} <= set(core.POLICY_LOSS_REGISTRY)
    kind = type("Config", (Config, core.ActorConfig), {})
    pairs = [("vanilla", "reasonrl_grpo"), ("gspo", "reasonrl_gspo_token")]
    cases = itertools.product(ours.MODES, INFO, pairs, (None, 0.5 + torch.rand(6, 9)))
    for mode, info, pair, weights in cases:
        chosen = kind(**vars(config(global_batch_info=info, clip_ratio=0.05)))
        arguments = {
            "old_log_prob": old, "advantages": advantage, "response_mask": mask,
            "loss_agg_mode": mode, "config": chosen, "rollout_is_weights": weights,
        }  # fmt: skip
        results = []
        for name in pair:
            x = new.clone().requires_grad_()
            loss, metrics = core.POLICY_LOSS_REGISTRY[name](log_prob=x, **arguments)
            loss.backward()
            results.append((loss.detach(), x.grad, metrics["actor/ppo_kl"]))
        (a, grad, kl), (b, own, kl2) = results
        assert torch.allclose(a, b, rtol=1e-5), mode
        assert (own - grad).norm() <= 1e-5 * grad.norm(), mode
        assert kl == pytest.approx(kl2, rel=1e-4)
