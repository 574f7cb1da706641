"""LossSpec: its named values, and every refusal with its text."""

from __future__ import annotations

import math

import pytest
import torch

from reasonrl import LossSpec, policy_loss


def test_named_is_the_table():
    assert LossSpec.named("grpo") == LossSpec(reduce="seq_mean")
    assert LossSpec.named("bnpo") == LossSpec()
    assert LossSpec.named("dapo") == LossSpec(clip_high=0.28)
    assert LossSpec.named("dr_grpo", max_length=8) == LossSpec(reduce="fixed", max_length=8)
    assert LossSpec.named("gspo").clip_high == 4e-4 and LossSpec.named("gspo").clip_low == 3e-4
    assert LossSpec.named("gspo_token").ratio == "sequence_token"
    assert LossSpec.named("cispo").clip_high == 4.0
    assert LossSpec.named("sapo").sapo_neg == 1.05
    assert LossSpec.named("gmpo").clip_low == 0.4
    assert LossSpec.named("reinforce", kl_coef=0.1).kl_coef == 0.1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ratio": "word"}, "ratio must be one of token, sequence, sequence_token, got 'word'"),
        ({"surrogate": "ppo"}, "surrogate must be one of clip, cispo, sapo, gmpo, reinforce"),
        ({"reduce": "sum"}, "reduce must be one of token_mean, seq_mean, fixed, got 'sum'"),
        ({"kl": "k4"}, "kl must be one of k1, k2, k3, got 'k4'"),
        ({"entropy_reduce": "x"}, "entropy_reduce must be one of loss, token_mean"),
        ({"surrogate": "gmpo"}, "surrogate='gmpo' needs ratio='sequence', got 'token'"),
        ({"surrogate": "cispo", "ratio": "sequence"}, "needs ratio='token', got 'sequence'"),
        ({"surrogate": "sapo", "ratio": "sequence"}, "needs ratio='token'"),
        ({"surrogate": "reinforce", "ratio": "sequence_token"}, "needs ratio='token'"),
        ({"surrogate": "sapo", "delta": 2.0}, "delta needs surrogate='clip', got 'sapo'"),
        ({"surrogate": "cispo", "dual_clip": 2.0}, "dual_clip needs surrogate='clip'"),
        ({"delta": 1.1}, r"delta must be >= 1 \+ clip_high = 1.2, got 1.1"),
        ({"dual_clip": 1.0}, "dual_clip must be > 1, got 1.0"),
        ({"surrogate": "cispo", "clip_high": -1.0}, "clip_high must be > -1"),
        ({"clip_low": -0.1}, "clip_low and clip_high must be >= 0"),
        ({"kl_coef": math.nan}, "kl_coef must be a number, got nan"),
        ({"sapo_pos": 0.0}, "sapo_pos must be > 0"),
        ({"max_length": 0}, "max_length must be an int >= 1, got 0"),
    ],
    ids=str,
)
def test_spec_refuses(change, text):
    with pytest.raises(ValueError, match=text):
        LossSpec(**change)


def test_calls_refuse_what_they_cannot_honour():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="max_length or denominator must be given"):
        policy_loss(x, x, x, LossSpec.named("dr_grpo"))
    with pytest.raises(ValueError, match="entropy must be given where entropy_coef = 0.1"):
        policy_loss(x, x, x, LossSpec(entropy_coef=0.1))
    with pytest.raises(ValueError, match="ref_logp must be given where kl_coef = 0.1"):
        policy_loss(x, x, x, LossSpec(kl_coef=0.1))
    with pytest.raises(ValueError, match="name must be one of grpo, bnpo"):
        LossSpec.named("ppo")
    assert LossSpec(surrogate="cispo", clip_high=-0.8).clip_high == -0.8
