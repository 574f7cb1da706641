"""A verl reward manager whose rewards stand at their steps (verl 0.9, batch path).

    reward.reward_manager.source=importlib reward.reward_manager.name=StepRewardManager
    reward.reward_manager.module.path=pkg://reasonrl.integrations.verl_rewards
    reward.reward_model.enable=True reward.reward_model.enable_resource_pool=False
    reward.custom_reward_function.path=my_rewards.py algorithm.adv_estimator=reasonrl_process

`compute_score` gets what verl gives it, and returns a number, or a dict with `score` and either
`token_rewards` (one a response token) or `step_rewards` with `step_ends` (the token after each
step). verl's own manager keeps only the number; here `run_single` hands the vector on and
`assemble_rm_scores` lays it over the response, the outcome on its last token. The streaming path
(inside the agent loop) takes numbers only, in verl: use the batch path, as above. Left out: scores
of a served reward model (verl's own `compute_score_disrm`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from verl.experimental.reward_loop.reward_manager.base import (  # type: ignore
    RewardManagerBase,
)

from reasonrl import ops


class StepRewardManager(RewardManagerBase):
    """verl's reward manager interface; scores may be vectors over the response."""

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ):
        super().__init__(config, tokenizer, compute_score)
        if compute_score is None:
            raise ValueError("StepRewardManager needs reward.custom_reward_function, got none")
        self.router = {}
        if reward_router_address is not None:
            self.router["reward_router_address"] = reward_router_address
            self.router["reward_model_tokenizer"] = reward_model_tokenizer

    async def run_single(self, data: Any) -> dict[str, Any]:
        """{"reward_score": number or list over the response, "reward_extra_info": {...}}."""
        item = data[-1:][0]  # of several sequences the last counts, as in verl's own managers
        ids, length = _response(item)
        extra = dict(item.non_tensor_batch.get("extra_info") or {})
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        arguments = {
            "data_source": item.non_tensor_batch["data_source"],
            "solution_str": text,
            "ground_truth": item.non_tensor_batch["reward_model"]["ground_truth"],
            "extra_info": extra | {"response_ids": ids.tolist()},
            **self.router,
        }
        if inspect.iscoroutinefunction(self.compute_score):
            result = await self.compute_score(**arguments)
        else:
            result = await self.loop.run_in_executor(None, lambda: self.compute_score(**arguments))
        outcome = float(result["score"]) if isinstance(result, Mapping) else float(result)
        rewards = token_rewards(result, length, outcome)
        return {
            "reward_score": rewards.tolist(),
            "reward_extra_info": {"acc": outcome, "process": float(rewards.sum()) - outcome},
        }

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: Sequence[Any]) -> Tensor:
        """(B, T) fp32; a number goes to the last response token, a list lies over the response."""
        responses = data.batch["responses"]
        mask = data.batch["attention_mask"][:, data.batch["prompts"].size(1) :]
        out = torch.zeros(responses.shape, dtype=torch.float32, device=responses.device)
        for row, (score, length) in enumerate(zip(scores, mask.sum(1).tolist(), strict=True)):
            if isinstance(score, int | float):
                out[row, max(length - 1, 0)] = float(score)
                continue
            if len(score) != length:
                raise ValueError(
                    f"verl response {row}: {len(score)} rewards for {length} tokens; was it"
                    " tokenised again?"
                )
            out[row, :length] = torch.as_tensor(score, dtype=torch.float32)
        return out


def token_rewards(result: Any, length: int, outcome: float) -> Tensor:
    """(length,): the process rewards, and the outcome on the last token."""
    out = torch.zeros(length)
    if isinstance(result, Mapping) and "token_rewards" in result:
        given = torch.as_tensor(result["token_rewards"], dtype=torch.float32)
        if given.shape != out.shape:
            raise ValueError(
                f"compute_score: token_rewards must have {length} values (the response's tokens),"
                f" got {tuple(given.shape)}"
            )
        out = given.clone()
    elif isinstance(result, Mapping) and "step_rewards" in result:
        value = torch.as_tensor(result["step_rewards"], dtype=torch.float32)
        ends = torch.as_tensor(result.get("step_ends", ()), dtype=torch.long)
        wrong = len(set(ends.tolist())) != len(value) or len(ends) != len(value)
        if wrong or bool((ends < 1).any() or (ends > length).any()):
            raise ValueError(
                f"compute_score: step_ends must hold one token position in 1..{length} for each of"
                f" {len(value)} step_rewards, got {ends.tolist()}"
            )
        step = torch.full((length,), -1, dtype=torch.long)
        step[ends - 1] = torch.arange(len(ends))
        out = ops.step_expand(value, step, where="last")
    if length:
        out[-1] += outcome
    return out


def _response(item: Any) -> tuple[Tensor, int]:
    responses = item.batch["responses"]
    length = int(item.batch["attention_mask"][-responses.shape[-1] :].sum())
    return responses[:length], length
