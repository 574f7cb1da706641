"""TRL's GRPOTrainer with our log-probabilities, our loss and dense advantages (TRL 1.16).

    trainer = GRPOTrainer(model, reward_funcs=..., args=..., train_dataset=..., scorer=prm)

`fused=True` takes hidden states instead of logits (`linear_logp`) and computes the loss with
`policy_loss`, under TRL's own normalisation. `scorer` is any scorer of ours: its step or token
rewards become process returns against the group (PRIME, arXiv 2502.01456 eq. 5 without its outcome
part), added to TRL's own outcome advantage, so the loss sees (B, T). `thinking` pays for thinking
(trl_trust.py), `motivation` tells the policy its reward (trl_merf.py). What a path cannot honour is
refused when the trainer is built; a sharded, adapted or scaled head is not among it (heads.py).
Left out: images with `fused` (TRL's own path is taken).
"""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportArgumentType=false
# (the tests run the host's classes; a checker of types does not know what they hold)

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from torch import Tensor

from reasonrl import dense, heads, ops
from reasonrl.algos.sophia import Trust
from reasonrl.integrations._host import host_version
from reasonrl.integrations.trl_merf import Motivation
from reasonrl.integrations.trl_prm import PRMConfig, PRMTrainer
from reasonrl.integrations.trl_rewards import (
    code_reward,
    math_reward,
    scorer_reward,
    spec_reward,
)
from reasonrl.integrations.trl_rows import rollout_of, tokenizer_of
from reasonrl.integrations.trl_trust import Thinking, ThinkingOf
from reasonrl.loss import LossSpec, policy_loss
from reasonrl.records import Rewards, Rollout

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "Motivation",
    "PRMConfig",
    "PRMTrainer",
    "Trust",
    "code_reward",
    "math_reward",
    "scorer_reward",
    "spec_reward",
]
GRPOConfig = trl.GRPOConfig  # type: ignore  # TRL's own, so that one import is enough
TESTED = "1.16"
CLIP = ("grpo", "bnpo", "dr_grpo", "dapo")
REDUCE = {
    "grpo": "seq_mean",
    "sapo": "seq_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "dr_grpo": "fixed",
}
Scorer = Callable[[Rollout], Rewards]


class GRPOTrainer(trl.GRPOTrainer):  # type: ignore  # (a checker takes this file for the host)
    """`trl.GRPOTrainer` with more arguments; everything else is TRL's.

    scorer: `scorer(rollout) -> Rewards` with `steps` or `token` rewards; None = TRL's advantages.
    thinking, trust: Trust-GRPO, `thinking(rollout)` gives Scores in [0, 1]. motivation: MeRF.
    fused: our loss and log-prob path; ValueError for options it does not have (see the message).
    """

    def __init__(
        self,
        *args: Any,
        scorer: Scorer | None = None,
        thinking: ThinkingOf | None = None,
        trust: Trust | None = None,
        motivation: Motivation | None = None,
        fused: bool = True,
        **kwargs: Any,
    ):
        if trust is not None and thinking is None:
            raise ValueError("trust: expected a scorer as thinking= beside it, got None")
        if not isinstance(motivation, Motivation | None):
            raise ValueError(f"motivation: expected a Motivation, got {type(motivation).__name__}")
        super().__init__(*args, **kwargs)
        self.scorer, self.fused, self.motivation = scorer, fused, motivation
        self.thinking = None if thinking is None else Thinking(self, thinking, trust or Trust())
        host_version("trl", TESTED)
        if fused:
            self._check_fused()
        if scorer is not None:
            self._check_scorer()

    def _check_fused(self) -> None:
        refused = {
            "loss_type": self.loss_type in ("luspo", "vespo"),
            "top_entropy_quantile": self.top_entropy_quantile < 1.0,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
            "use_bias_correction_kl": self.beta != 0.0 and self.args.use_bias_correction_kl,
            "router_aux_loss_coef": self.aux_loss_enabled,
            "importance_sampling_level": self.importance_sampling_level != "token"
            and self.loss_type not in CLIP,
        }
        for option, hit in refused.items():
            if hit:
                value = getattr(self.args, option, None)
                raise ValueError(
                    f"{option}: {value!r} with loss_type {self.loss_type!r} has no fused path; use "
                    "fused=False"
                )
        if self.args.delta is not None and self.loss_type not in CLIP:
            warnings.warn(
                f"delta: TRL ignores it for loss_type {self.loss_type!r}, so it is dropped",
                stacklevel=3,
            )
        base = self.accelerator.unwrap_model(self.model)
        try:
            self.loss_spec()  # TRL takes bounds that ours does not
            heads.verify(base)
        except ValueError as error:
            raise ValueError(f"{error}; use fused=False") from None
        heads.attach(base)

    def _check_scorer(self) -> None:
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        if rows % self.num_generations:
            raise ValueError(
                f"scorer: the {rows} completions of one process must be whole groups of "
                f"num_generations={self.num_generations}"
            )

    def loss_spec(self) -> LossSpec:
        """TRL's options as ours."""
        kind = self.loss_type
        fields: dict[str, Any] = {"reduce": REDUCE[kind], "kl_coef": self.beta}
        if kind in CLIP:
            fields |= {"clip_low": self.epsilon_low, "clip_high": self.epsilon_high}
            fields |= {"ratio": self.importance_sampling_level, "delta": self.args.delta}
        elif kind == "cispo":  # TRL's bound is absolute
            fields |= {"surrogate": "cispo", "clip_high": self.epsilon_high - 1}
        else:
            fields |= {"surrogate": "sapo"}
            fields |= {"sapo_pos": self.args.sapo_temperature_pos}
            fields |= {"sapo_neg": self.args.sapo_temperature_neg}
        if kind == "dr_grpo":
            fields["max_length"] = self.max_completion_length
        return LossSpec(**fields)

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **vision,
    ):
        seen = any(value is not None for value in vision.values())
        if not self.fused or seen or compute_aux_loss:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **vision,
            )
        heads.attach(self.accelerator.unwrap_model(model))  # a reference comes unprepared
        logps, entropies = [], []
        for rows in torch.arange(len(input_ids)).split(batch_size or max(1, len(input_ids))):
            ids, mask = input_ids[rows], attention_mask[rows]
            target = ids[:, -logits_to_keep:]
            real = mask[:, -logits_to_keep:].bool()

            def taken(hidden: Tensor, head: heads.Head, target: Tensor = target) -> Any:
                return ops.linear_logp(
                    hidden[:, -logits_to_keep - 1 : -1].contiguous(),
                    head.weight,
                    target,
                    bias=head.bias,
                    temperature=self.temperature,
                    softcap=head.softcap,
                    entropy=compute_entropy,
                )

            with self.accelerator.autocast():  # through the wrapper, which sees one ordinary call
                out = model(input_ids=ids, attention_mask=mask, head_call=taken)
            logp, entropy = out if isinstance(out, tuple) else (out, None)
            logps.append(torch.where(real, logp, 0.0))
            if entropy is not None:
                entropies.append(torch.where(real, entropy, 0.0))
        return torch.cat(logps), torch.cat(entropies) if entropies else None, None

    def _compute_loss(self, model, inputs):
        # the adaptive entropy controller is TRL's own state: its loss runs on our log-probs
        if not self.fused or self.use_adaptive_entropy:
            return super()._compute_loss(model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        vision = {name: inputs.get(name) for name in VISION}
        logp, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, inputs["completion_ids"].size(1), compute_entropy=True, **vision
        )
        assert entropy is not None  # it was asked for
        spec = self.loss_spec()
        training = self.model.training
        accumulated = self.current_gradient_accumulation_steps if training else 1
        denominator = None
        if self.loss_type in ("dapo", "cispo"):
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            share = accumulated / self.args.steps_per_generation if training else 1.0
            denominator = tokens * share
        weight = None
        if self.use_vllm and self.vllm_importance_sampling_correction:
            weight = inputs["importance_sampling_ratio"].expand_as(logp)
        out = policy_loss(
            logp,
            inputs.get("old_per_token_logps"),
            inputs["advantages"],
            spec,
            mask=mask,
            ref_logp=inputs.get("ref_per_token_logps") if self.beta else None,
            is_weight=weight,
            denominator=denominator,
        )
        loss = out.loss if denominator is not None else out.loss / accumulated
        mode = "train" if training else "eval"
        self._record(mode, out.metrics, logp.detach(), entropy.detach(), inputs, mask)
        if self._entropy_bonus_enabled:
            mean = (entropy * mask).sum() / mask.sum().clamp(min=1.0)
            self._metrics[mode]["policy_loss"].append(
                self.accelerator.gather(out.loss.detach()).nanmean().item()
            )
            if training and self.accelerator.sync_gradients:
                self._metrics[mode]["entropy_coef"].append(self.entropy_coef)
            loss = loss - self.entropy_coef * mean / accumulated
        return loss

    def _record(self, mode, metrics, logp, entropy, inputs, mask) -> None:
        """TRL's metrics under TRL's names; means over the tokens of all processes."""
        log = self._metrics[mode]
        count = mask.sum().float()
        wanted = {"entropy": (entropy * mask).sum() / count.clamp(min=1.0)}
        if self.beta:
            wanted["kl"] = metrics["kl"]
        by_row = self.importance_sampling_level == "sequence" and inputs["advantages"].dim() == 1
        if self.loss_type in CLIP and not by_row:
            wanted |= {f"clip_ratio/{n}_mean": metrics[f"clip_ratio/{n}_mean"] for n in SIDES}
        elif self.loss_type == "cispo":
            wanted["cispo_clip_ratio"] = metrics["clip_ratio/high_mean"]
        values = torch.stack([value.float() * count for value in wanted.values()] + [count])
        *sums, total = self.accelerator.reduce(values, reduction="sum")
        for name, value in zip(wanted, sums, strict=True):
            log[name].append((value / total.clamp(min=1.0)).item())
        if self.loss_type in CLIP:
            low, high = self._clipped_rows(logp, inputs, mask)
            if by_row:  # TRL counts completions then
                for name, rows in zip(SIDES, (low, high, low + high), strict=True):
                    mean = self.accelerator.gather(rows).mean().item()
                    log[f"clip_ratio/{name}_mean"].append(mean)
            log["clip_ratio/low_min"].append(self.accelerator.gather(low).min().item())
            log["clip_ratio/high_max"].append(self.accelerator.gather(high).max().item())

    def _clipped_rows(self, logp, inputs, mask) -> tuple[Tensor, Tensor]:
        """(B,) each completion's share of tokens cut below and above."""
        old = inputs.get("old_per_token_logps")
        gap = torch.zeros_like(logp) if old is None else (logp - old) * mask
        count = mask.sum(1).clamp(min=1.0)
        if self.importance_sampling_level == "sequence":
            gap = (gap.sum(1) / count)[:, None].expand_as(gap)
        advantage = inputs["advantages"]
        advantage = advantage[:, None] if advantage.dim() == 1 else advantage
        ratio = gap.exp()
        if self.args.delta is not None:
            ratio = ratio.clamp(max=self.args.delta)
        low = (ratio < 1 - self.epsilon_low) & (advantage < 0)
        high = (ratio > 1 + self.epsilon_high) & (advantage > 0)
        return (low * mask).sum(1) / count, (high * mask).sum(1) / count

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.thinking is None:
            return found
        return self.thinking.pay(self, inputs, completion_ids_list, found)

    def _generate_and_score_completions(self, inputs):
        if self.motivation is not None and self.model.training:
            inputs = self.motivation.rows(self, inputs)
        output = super()._generate_and_score_completions(inputs)
        if self.thinking is not None:
            output["advantages"] = self.thinking.advantages(self, output["advantages"])
        if self.scorer is None:
            return output
        group = self.num_generations if self.model.training else self.num_generations_eval
        mask = output["completion_mask"].bool()
        rollout = rollout_of(
            inputs,
            _unpadded(output["completion_ids"], mask),
            tokenizer_of(self),
            group,
            prompt_ids=_unpadded(output["prompt_ids"], output["prompt_mask"].bool()),
        )
        rewards = self.scorer(rollout)
        token, shown = dense.token_rewards(rewards, rollout)
        flat = torch.zeros(mask.shape, dtype=torch.float32)
        for b, values in enumerate(token):
            flat[b, mask[b].nonzero()[:, 0].cpu()] = values
        process = ops.prime_advantage(
            flat,
            torch.zeros(len(mask)),
            rollout.group,
            mask=mask.cpu(),
            scored=dense.known(rewards, token),
        )
        advantage = output["advantages"]
        advantage = advantage[:, None] if advantage.dim() == 1 else advantage
        output["advantages"] = (advantage + process.to(advantage)) * mask
        self._logs["extra"]["step_rewards"].extend(gather_object(shown))
        return output


SIDES = ("low", "high", "region")
VISION = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes"),
    *("num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
