"""The policy loss as independent choices: which ratio, which surrogate, which reduction, which KL.

GRPO, DAPO, Dr. GRPO, GSPO, CISPO, SAPO and GMPO are named values of one frozen LossSpec; none is a
branch here. Formulae: `kernels/reference.py`. Left out: learned values and critics. Try:
    spec = LossSpec.named("dapo", kl_coef=0.01)
    out = policy_loss(logp, old_logp, advantage, spec, mask=mask, ref_logp=ref_logp)
    out.loss.backward()
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from reasonrl import ops
from reasonrl.credit import StepCredit, TokenCredit
from reasonrl.records import LossOut

Ratio = Literal["token", "sequence", "sequence_token"]
Surrogate = Literal["clip", "cispo", "sapo", "gmpo", "reinforce"]
Reduce = Literal["token_mean", "seq_mean", "fixed"]
KL = Literal["k1", "k2", "k3"]
EntropyReduce = Literal["loss", "token_mean"]

RATIO_OF = {"gmpo": "sequence", "cispo": "token", "sapo": "token", "reinforce": "token"}

NAMED: dict[str, dict[str, Any]] = {
    "grpo": {"reduce": "seq_mean"},
    "bnpo": {},
    "dapo": {"clip_high": 0.28},
    "dr_grpo": {"reduce": "fixed"},
    "gspo": {"ratio": "sequence", "reduce": "seq_mean", "clip_low": 3e-4, "clip_high": 4e-4},
    "gspo_token": {
        "ratio": "sequence_token",
        "reduce": "seq_mean",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    "cispo": {"surrogate": "cispo", "clip_high": 4.0},
    "sapo": {"surrogate": "sapo", "reduce": "seq_mean"},
    "gmpo": {
        "ratio": "sequence",
        "surrogate": "gmpo",
        "reduce": "seq_mean",
        "clip_low": 0.4,
        "clip_high": 0.4,
    },
    "reinforce": {"surrogate": "reinforce"},
}


@dataclass(frozen=True)
class LossSpec:
    """A policy loss. `max_length` serves reduce="fixed", unless the call gives a `denominator`.

    ValueError: a word outside its list, a ratio that the surrogate does not know, delta or
    dual_clip outside the clip surrogate, delta < 1 + clip_high, dual_clip <= 1, cispo with
    clip_high <= -1, or a number that is no number.
    """

    ratio: Ratio = "token"
    surrogate: Surrogate = "clip"
    reduce: Reduce = "token_mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # bounds the loss of A < 0 at c |A| (arXiv 1912.09729)
    delta: float | None = None  # bounds the ratio from above (arXiv 2505.07291)
    kl_coef: float = 0.0
    kl: KL = "k3"
    entropy_coef: float = 0.0
    entropy_reduce: EntropyReduce = "loss"
    sapo_pos: float = 1.0
    sapo_neg: float = 1.05
    max_length: int | None = None

    def __post_init__(self) -> None:
        words = {
            "ratio": Ratio,
            "surrogate": Surrogate,
            "reduce": Reduce,
            "kl": KL,
            "entropy_reduce": EntropyReduce,
        }
        for name, allowed in words.items():
            if getattr(self, name) not in get_args(allowed):
                wanted = ", ".join(get_args(allowed))
                raise ValueError(f"{name} must be one of {wanted}, got {getattr(self, name)!r}")
        wanted = RATIO_OF.get(self.surrogate, self.ratio)
        if self.ratio != wanted:
            raise ValueError(
                f"surrogate={self.surrogate!r} needs ratio={wanted!r}, got {self.ratio!r}"
            )
        self._check_numbers()
        self._check_caps()

    def _check_numbers(self) -> None:
        least = -1.0 if self.surrogate == "cispo" else 0.0
        for name in ("clip_low", "clip_high", "kl_coef", "entropy_coef", "sapo_pos", "sapo_neg"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if self.surrogate == "cispo" and not self.clip_high > -1:
            raise ValueError(f"clip_high must be > -1 with surrogate='cispo', got {self.clip_high}")
        if self.clip_low < 0 or self.clip_high < least:
            raise ValueError(
                f"clip_low and clip_high must be >= 0, got {self.clip_low}, {self.clip_high}"
            )
        if not (math.isfinite(self.kl_coef) and math.isfinite(self.entropy_coef)):
            raise ValueError(
                f"kl_coef and entropy_coef must be finite, got {self.kl_coef}, {self.entropy_coef}"
            )
        for name in ("sapo_pos", "sapo_neg"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        if self.max_length is not None and (
            not isinstance(self.max_length, int) or self.max_length < 1
        ):
            raise ValueError(f"max_length must be an int >= 1, got {self.max_length!r}")

    def _check_caps(self) -> None:
        for name in ("delta", "dual_clip"):
            if getattr(self, name) is not None and self.surrogate != "clip":
                raise ValueError(f"{name} needs surrogate='clip', got {self.surrogate!r}")
        if self.delta is not None and not self.delta >= 1 + self.clip_high:
            raise ValueError(
                f"delta must be >= 1 + clip_high = {1 + self.clip_high}, got {self.delta}"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be > 1, got {self.dual_clip}")

    @classmethod
    def named(cls, name: str, **changes: Any) -> LossSpec:
        """The published loss of that name, with changes: `LossSpec.named("grpo", kl_coef=0.04)`."""
        if name not in NAMED:
            raise ValueError(f"name must be one of {', '.join(NAMED)}, got {name!r}")
        return cls(**(NAMED[name] | changes))


def policy_loss(
    logp: Tensor,  # (B, T) or (N,)
    old_logp: Tensor | None,  # same; None = on policy, ratio 1 in value, gradient kept
    advantage: Tensor | StepCredit | TokenCredit,  # same, or (B,), or the rewards it follows from
    spec: LossSpec,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    is_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    impl: str = "auto",
) -> LossOut:
    """sum_t a_t (w_t policy_t + kl_coef k_t - entropy_coef H_t), minimised, with a_t from the
    reduction.

    A credit in place of advantages (`reasonrl.credit`) goes from rewards to loss and gradient in
    one launch. `is_weight` (layout of logp or (B,), no gradient) is w. `denominator` replaces the
    divisor of the reduction: the number of completions (seq_mean), of tokens (token_mean), or
    B * max_length (fixed). Tokens with a non-finite input get coefficient 0, stay in the divisor
    and are counted in metrics["nonfinite"].
    """
    loss, metrics = ops.policy_loss(
        logp,
        old_logp,
        advantage,
        spec,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ref_logp=ref_logp,
        entropy=entropy,
        is_weight=is_weight,
        denominator=denominator,
        impl=impl,
    )
    return LossOut(loss, metrics)


def linear_policy_loss(
    hidden: Tensor,  # (B, T, D) or (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (B, T) or (N,) int
    old_logp: Tensor | None,
    advantage: Tensor | StepCredit | TokenCredit,
    spec: LossSpec,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    is_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    impl: str = "auto",
) -> LossOut:
    """`policy_loss` of the log-probabilities of `hidden @ weight.T + bias`, whose logits are never
    all held."""
    loss, metrics = ops.linear_policy_loss(
        hidden,
        weight,
        target,
        old_logp,
        advantage,
        spec,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ref_logp=ref_logp,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        is_weight=is_weight,
        denominator=denominator,
        impl=impl,
    )
    return LossOut(loss, metrics)
