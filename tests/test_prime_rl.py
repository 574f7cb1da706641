"""prime-rl's custom loss: a sum over each sample's tokens, so that the trainer's division fits."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from reasonrl import LossSpec
from reasonrl import policy_loss as ours
from reasonrl.integrations import prime_rl


@dataclass
class LossInputs:
    """The host's dataclass by its field names (0.8)."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


SIZES = (9, 4, 13)


def samples(seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(n, generator=generator)  # noqa: E731
    out = []
    for n in SIZES:
        old = -1 + 0.2 * draw(n)
        fields = {
            "trainer_logprobs": (old + 0.5 * draw(n)).requires_grad_(),
            "inference_logprobs": old,
            "ref_logprobs": old + 0.1 * draw(n),
            "advantages": draw(n),
            "loss_mask": torch.rand(n, generator=generator) < 0.7,
        }
        out.append(LossInputs(**(fields | changes)))
    return out


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"name": "grpo", "kl_coef": 0.1},
        {"name": "cispo"},
        {"name": "sapo"},
        {"name": "gspo"},
        {"name": "reinforce"},
        {"name": "dapo", "dual_clip": 3.0, "clip_low": 0.1},
    ],
    ids=str,
)
def test_the_trainers_division_gives_the_packed_token_mean(kwargs):
    batch = samples()
    outs = [prime_rl.policy_loss(inputs, **kwargs) for inputs in batch]
    tokens = sum(int(inputs.loss_mask.sum()) for inputs in batch)
    loss = sum(out.loss for out in outs) / tokens  # what prime-rl does with the sums
    grads = torch.autograd.grad(loss, [inputs.trainer_logprobs for inputs in batch])

    whole = torch.cat([i.trainer_logprobs.detach() for i in batch]).requires_grad_()
    pick = lambda name: torch.cat([getattr(i, name) for i in batch])  # noqa: E731
    name, changes = kwargs.get("name", "dapo"), {k: v for k, v in kwargs.items() if k != "name"}
    spec = LossSpec.named(name, **changes, reduce="token_mean")
    expected = ours(
        whole,
        pick("inference_logprobs"),
        pick("advantages"),
        spec,
        mask=pick("loss_mask"),
        cu_seqlens=torch.tensor([0, *SIZES]).cumsum(0),
        ref_logp=pick("ref_logprobs"),
    )
    (grad,) = torch.autograd.grad(expected.loss, whole)
    assert torch.allclose(loss, expected.loss, rtol=1e-5, atol=1e-7)
    assert (torch.cat(grads) - grad).norm() <= 1e-5 * grad.norm()
    assert set(outs[0].metrics) == set(expected.metrics)


def test_weights_multiply_the_policy_part():
    one = samples(loss_weights=torch.full((SIZES[0],), 0.25))[0]
    plain = prime_rl.policy_loss(samples()[0]).loss
    assert torch.allclose(prime_rl.policy_loss(one).loss, 0.25 * plain)


@pytest.mark.parametrize(
    ("changes", "kwargs", "message"),
    [
        ({}, {"reduce": "seq_mean"}, "reduce='seq_mean' cannot be chosen"),
        ({"ref_logprobs": None}, {"kl_coef": 0.1}, "ref_logprobs is None but kl_coef = 0.1"),
        ({"loss_weights": torch.ones(9)}, {"kl_coef": 0.1}, "loss_weights with kl_coef"),
        ({}, {"name": "ppo"}, "name must be one of"),
    ],
)
def test_what_cannot_be_is_refused(changes, kwargs, message):
    inputs = samples()[0]
    for name, value in changes.items():
        setattr(inputs, name, value)
    with pytest.raises(ValueError, match=message):
        prime_rl.policy_loss(inputs, **kwargs)
