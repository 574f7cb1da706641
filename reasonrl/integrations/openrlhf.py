"""A drop-in for `openrlhf.models.PolicyLoss` (OpenRLHF 0.11): same arguments, same tuple, our loss.

    openrlhf.models.PolicyLoss = reasonrl.integrations.openrlhf.PolicyLoss    # before the trainer

Token-level loss divides by the tokens, sample-level by the completions with a token, global counts
where the host hands them in, times `dp_size` as the host does. The tuple is as long as the
installed class's. Left out: the correction of the rollout engine's log-probabilities
(`is_correction_level` other than "off" is refused; use OpenRLHF's class for it).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reasonrl.integrations._host import host_version
from reasonrl.loss import LossSpec, policy_loss

TESTED = "0.11"


def tuple_length() -> int:
    """How many values the installed class returns: 4 in 0.11.0, 5 from 0.11.1 (and without it)."""
    version = host_version("openrlhf", TESTED)
    return 4 if version == "0.11.0" else 5


class PolicyLoss(nn.Module):
    """PPO (token ratios) or GSPO (sequence ratios), clipped, on dense advantages (B, T)."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        **correction: object,  # says nothing while the level is off
    ):
        super().__init__()
        if is_correction_level != "off":
            raise ValueError(
                f"is_correction_level: expected 'off', got {is_correction_level!r}; use OpenRLHF's "
                "own PolicyLoss for it"
            )
        known = ("is_correction_mode", "is_correction_gating", "is_correction_threshold")
        for name in correction:
            if name not in known:
                raise TypeError(f"PolicyLoss got an unknown argument {name!r}")
        if policy_loss_type not in ("ppo", "gspo"):
            raise ValueError(f"policy_loss_type: expected ppo or gspo, got {policy_loss_type!r}")
        by_row = policy_loss_type == "gspo"
        self.spec = LossSpec(
            ratio="sequence" if by_row else "token",
            reduce="token_mean" if token_level_loss and not by_row else "seq_mean",
            clip_low=clip_eps_low,
            clip_high=clip_eps_high,
            dual_clip=dual_clip,
        )
        self.length = tuple_length()

    def forward(
        self,
        log_probs: Tensor,  # (B, T)
        old_log_probs: Tensor,  # (B, T)
        advantages: Tensor,  # (B, T)
        action_mask: Tensor | None = None,  # (B, T)
        rollout_log_probs: Tensor | None = None,  # read by the correction only
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor | None, ...]:
        """(loss, share of clipped tokens, mean of old - new, None, None)[:length]."""
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        mask = mask != 0  # the host's is float
        if self.spec.reduce == "token_mean":
            count = mask.sum() if batch_num_tokens is None else batch_num_tokens
            scale = 1 if batch_num_tokens is None else dp_size
        else:
            alive = (mask.sum(-1) > 0).sum()
            count = alive if global_batch_size is None else global_batch_size
            scale = 1 if global_batch_size is None else dp_size
        count = torch.as_tensor(count, dtype=torch.float32).clamp(min=1e-8)
        out = policy_loss(
            log_probs, old_log_probs, advantages, self.spec, mask=mask, denominator=count
        )
        tokens = mask.sum().clamp(min=1)
        gap = torch.where(mask, (old_log_probs - log_probs).detach(), 0.0).sum() / tokens
        cut = out.metrics["clip_ratio/region_mean"]
        values = (out.loss * scale, cut, gap, None, None)
        return values[: self.length]
