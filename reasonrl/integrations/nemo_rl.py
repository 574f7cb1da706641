"""NeMo-RL's loss function and advantage estimator (NeMo-RL 0.6), on our ops.

    loss_fn = reasonrl.integrations.nemo_rl.PolicyLoss(master_config["loss_fn"])
    estimator = reasonrl.integrations.nemo_rl.AdvantageEstimator("process")

Every tensor of the batch is (B, S) over prompt and response; the first position predicts nothing,
so all but `next_token_logprobs` lose it. The divisor is the host's global count of valid tokens or
sequences, and the sum over micro-batches is the loss. Left out: corrections between generation and
training log-probabilities (refused by name), logits (`input_type` is LOGPROB).
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reasonrl import ops
from reasonrl.integrations._host import host_version
from reasonrl.loss import LossSpec, policy_loss

TESTED = "0.6"
NAMES = {  # NeMo-RL's option -> ours
    "ratio_clip_min": "clip_low",
    "ratio_clip_max": "clip_high",
    "ratio_clip_c": "dual_clip",
    "reference_policy_kl_penalty": "kl_coef",
    "reference_policy_kl_type": "kl",
}
REFUSED = (
    *("use_importance_sampling_correction", "truncated_importance_sampling_ratio"),
    *("use_kl_in_reward", "use_cispo", "positive_example_nll_weight"),
)
OF_KL = ("use_on_policy_kl_approximation", "kl_input_clamp_value", "kl_output_clamp_value")
KINDS = ("process", "grpo", "dr_grpo", "rloo")


class LossType(enum.Enum):
    """The host's enum by value, where the host is not installed."""

    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType(enum.Enum):
    """The host's enum by value, where the host is not installed."""

    LOGPROB = "logprob"


class PolicyLoss:
    """A `LossFunction` of NeMo-RL. cfg: the options of its ClippedPGLossConfig, as they are.

    changes: fields of our LossSpec on top (`surrogate="gmpo"`). ValueError names an option that has
    no counterpart; with a KL penalty that includes the host's clamps of it (set them to null).
    """

    def __init__(self, cfg: Mapping[str, Any], **changes: Any):
        host_version("nemo-rl", TESTED)
        refused = REFUSED + (OF_KL if cfg.get("reference_policy_kl_penalty") else ())
        for name in refused:
            if cfg.get(name):
                raise ValueError(f"NeMo-RL loss: {name}={cfg[name]!r} has no counterpart here")
        by_token = bool(cfg.get("token_level_loss", True))
        fields = {ours: cfg[theirs] for theirs, ours in NAMES.items() if theirs in cfg}
        fields["reduce"] = "token_mean" if by_token else "seq_mean"
        if cfg.get("sequence_level_importance_ratios"):
            fields["ratio"] = "sequence"
        if cfg.get("disable_ppo_ratio"):
            fields |= {"surrogate": "reinforce", "dual_clip": None}
        self.on_policy = bool(cfg.get("force_on_policy_ratio", False))
        self.spec = LossSpec(**(fields | changes))
        wanted = "TOKEN_LEVEL" if self.spec.reduce == "token_mean" else "SEQUENCE_LEVEL"
        if self.spec.reduce == "fixed":
            raise ValueError("NeMo-RL loss: reduce='fixed' has no divisor there; token or sequence")
        self.loss_type = _host("LossType", LossType)[wanted]
        self.input_type = _host("LossInputType", LossInputType)["LOGPROB"]

    def __call__(
        self,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(this micro-batch's share of the loss, metrics); kwargs: next_token_logprobs (B, S-1)."""
        if "next_token_logprobs" not in kwargs:
            got = ", ".join(kwargs) or "nothing"
            raise ValueError(f"NeMo-RL loss: expected next_token_logprobs (B, S-1), got {got}")
        mask = (data["token_mask"][:, 1:] != 0) & (data["sample_mask"] != 0)[:, None]
        count = global_valid_toks if self.spec.reduce == "token_mean" else global_valid_seqs
        count = torch.as_tensor(count, dtype=torch.float32).reshape(()).clamp(min=1)
        ref = data.get("reference_policy_logprobs") if self.spec.kl_coef else None
        if self.spec.kl_coef and ref is None:
            raise ValueError(
                f"NeMo-RL data: reference_policy_logprobs is missing, but"
                f" reference_policy_kl_penalty = {self.spec.kl_coef}"
            )
        out = policy_loss(
            kwargs["next_token_logprobs"],
            None if self.on_policy else data["prev_logprobs"][:, 1:],
            data["advantages"][:, 1:],
            self.spec,
            mask=mask,
            ref_logp=None if ref is None else ref[:, 1:],
            denominator=count,
        )
        metrics = {name: float(value) for name, value in out.metrics.items()}
        valid = float((data["sample_mask"] != 0).sum())
        return out.loss, metrics | {"loss": float(out.loss.detach()), "num_valid_samples": valid}


class AdvantageEstimator:
    """NeMo-RL's `compute_advantage` on our ops.

    kind="process": returns of token rewards against the group, plus the leave-one-out outcome
    (PRIME, arXiv 2502.01456 eq. 5). The token rewards (B, S) come as `token_rewards`, or under that
    key of `repeated_batch`. grpo, dr_grpo, rloo: the outcome alone.
    """

    def __init__(self, kind: str = "process", *, eps: float = 1e-6, whiten: bool = False):
        host_version("nemo-rl", TESTED)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind, self.eps, self.whiten = kind, eps, whiten

    def compute_advantage(
        self,
        prompt_ids: Tensor,  # (B,) or (B, P): equal rows are one group
        rewards: Tensor,  # (B,)
        mask: Tensor,  # (B, S)
        valid_mask: Tensor | None = None,  # (B,)
        **kwargs: Any,
    ) -> Tensor:  # (B, S)
        group = torch.unique(prompt_ids, dim=0, return_inverse=True)[1]
        scored = None if valid_mask is None else valid_mask != 0
        keep = mask != 0
        if self.kind != "process":
            value = ops.group_advantage(
                rewards.float(), group, kind=self.kind, scored=scored, eps=self.eps
            )
            return torch.where(keep, value[:, None], 0.0)
        token = kwargs.get("token_rewards")
        if token is None:
            token = (kwargs.get("repeated_batch") or {}).get("token_rewards")
        if token is None:
            raise ValueError(
                "NeMo-RL batch: kind='process' needs token_rewards (B, S), an argument or a key of"
                " repeated_batch; got neither"
            )
        return ops.prime_advantage(
            token.float(), rewards.float(), group, mask=keep, scored=scored, whiten=self.whiten
        )


def _host(name: str, own: type[enum.Enum]) -> Any:
    try:
        return getattr(importlib.import_module("nemo_rl.algorithms.loss.interfaces"), name)
    except ModuleNotFoundError:
        return own
