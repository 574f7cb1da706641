"""AReaL's actor loss: the mean over the micro-batch's tokens, packed or padded."""

import pytest
import torch

from reasonrl import LossSpec, policy_loss
from reasonrl.integrations.areal import grpo_loss_fn

SIZES = (6, 9, 4)


def batch(seed=0, padding=0):
    generator = torch.Generator().manual_seed(seed)
    n = sum(SIZES) + padding
    draw = lambda: torch.randn(n, generator=generator)  # noqa: E731
    old = -1 + 0.2 * draw()
    mask = torch.rand(n, generator=generator) < 0.6
    mask[sum(SIZES) :] = False
    data = {
        "logprobs": old,
        "prox_logp": old,
        "advantages": draw(),
        "loss_mask": mask.int(),
        "cu_seqlens": torch.tensor([0, *SIZES]).cumsum(0).int(),
    }
    return data, old + 0.5 * draw()


CASES = [
    ({}, LossSpec()),
    ({"eps_clip_higher": 0.4, "c_clip": 3.0}, LossSpec(clip_high=0.4, dual_clip=3.0)),
    ({"importance_sampling_level": "sequence"}, LossSpec(ratio="sequence")),
    ({"use_sapo_loss": True}, LossSpec(surrogate="sapo")),
]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(("options", "spec"), CASES, ids=str)
def test_the_loss_is_ours(options, spec, padding):
    data, new = batch(padding=padding)
    x, y = new.clone().requires_grad_(), new[: sum(SIZES)].clone().requires_grad_()
    options = {"eps_clip": 0.2, "behav_imp_weight_cap": 5.0, "current_version": 3} | options
    loss = grpo_loss_fn(x, torch.zeros_like(x), data, **options)
    loss.backward()
    cut = {k: v[: sum(SIZES)] for k, v in data.items() if k != "cu_seqlens"}
    whole = policy_loss(
        y,
        cut["logprobs"],
        cut["advantages"],
        spec,
        mask=cut["loss_mask"],
        cu_seqlens=data["cu_seqlens"],
    )
    whole.loss.backward()
    assert torch.allclose(loss, whole.loss, rtol=1e-6)
    assert (x.grad[: sum(SIZES)] - y.grad).norm() <= 1e-5 * y.grad.norm()
    assert bool((x.grad[sum(SIZES) :] == 0).all())


def test_the_clipped_loss_by_hand():
    data, new = batch()
    ratio = (new - data["logprobs"]).exp()
    advantage, mask = data["advantages"], data["loss_mask"]
    token = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    loss = grpo_loss_fn(new, new, data, eps_clip=0.2)
    assert torch.allclose(loss, (token * mask).sum() / mask.sum())


def test_what_cannot_be_is_refused():
    data, new = batch()
    for options, named in (
        ({"m2_threshold": 0.1}, "m2_threshold"),
        ({"use_decoupled_loss": True}, "use_decoupled_loss"),
        ({"importance_sampling_level": "step"}, "importance_sampling_level: .*'step'"),
    ):
        with pytest.raises(ValueError, match=named):
            grpo_loss_fn(new, new, data, eps_clip=0.2, **options)
    del data["cu_seqlens"]
    with pytest.raises(ValueError, match="need cu_seqlens"):
        grpo_loss_fn(new, new, data, eps_clip=0.2)
