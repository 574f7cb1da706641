"""What SGLang and vLLM expect and answer: token ids in, token ids and their log-probabilities out,
new weights from a folder that both sides see.

SGLang 0.5: POST /generate and /update_weights_from_disk. vLLM 0.22 and later: POST /v1/completions
with `return_token_ids`, and, where the server was started with VLLM_SERVER_DEV_MODE=1,
/collective_rpc (reload_weights) and /reset_prefix_cache. Written from their documented interfaces
and tried against a server that speaks them; neither server was run here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reasonrl.chat.reply import Malformed, Trouble, brief
from reasonrl.records import InputError
from reasonrl.sampling import Sampling


@dataclass(frozen=True)
class Served:
    """A completion as a server gave it."""

    tokens: list[int]
    logp: list[float]  # of each token, under the distribution it was drawn from
    reason: str  # stop or length
    version: str | None = None  # of the weights that wrote it, where the server says


class SGLang:
    path = "/generate"

    def request(
        self, ids: Sequence[int], sampling: Sampling, seed: int, eos: Sequence[int]
    ) -> dict[str, Any]:
        chosen: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop_token_ids": list(eos),
            "sampling_seed": seed,
            "skip_special_tokens": False,
        }
        return {"input_ids": list(ids), "sampling_params": chosen, "return_logprob": True}

    def served(self, body: Mapping[str, Any], asked: Mapping[str, Any]) -> Served:
        about = _object(body, "meta_info")
        ending = about.get("finish_reason")
        reason = ending.get("type") if isinstance(ending, dict) else ending
        if reason == "abort":  # shed, or swept away by an update: asked again
            raise Trouble(f"it gave the request up: {brief(str(ending))}")
        rows = about.get("output_token_logprobs")
        if not isinstance(rows, list) or not all(isinstance(r, list) and len(r) > 1 for r in rows):
            raise Malformed("meta_info.output_token_logprobs is no list of [log p, token, ...]")
        tokens = _numbers([row[1] for row in rows], "output_token_logprobs", int)
        if "output_ids" in body and body["output_ids"] != tokens:
            raise Malformed("output_ids and output_token_logprobs are about different tokens")
        logp = _numbers([row[0] for row in rows], "output_token_logprobs", float)
        version = about.get("weight_version")
        return Served(tokens, logp, _reason(reason), None if version is None else str(version))

    def updates(self, folder: str, version: str) -> list[tuple[str, dict[str, Any]]]:
        fields = {"model_path": folder, "weight_version": version, "flush_cache": True}
        return [("/update_weights_from_disk", fields)]

    def updated(self, body: Mapping[str, Any]) -> None:
        if body.get("success") is not True:
            raise InputError(f"it refused the weights: {brief(str(body.get('message')))}")


@dataclass(frozen=True)
class VLLM:
    model: str  # the name it serves
    path = "/v1/completions"

    def request(
        self, ids: Sequence[int], sampling: Sampling, seed: int, eos: Sequence[int]
    ) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(ids),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop_token_ids": list(eos),
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }

    def served(self, body: Mapping[str, Any], asked: Mapping[str, Any]) -> Served:
        choices = body.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise Malformed("expected one choice")
        choice = choices[0]
        if "token_ids" not in choice:
            raise InputError("it returns no token_ids (vLLM 0.11 and later do)")
        if choice.get("prompt_token_ids", asked["prompt"]) != asked["prompt"]:
            raise InputError("it read other prompt tokens than it was sent")
        tokens = _numbers(choice["token_ids"], "token_ids", int)
        table = _object(choice, "logprobs")
        logp = _numbers(table.get("token_logprobs"), "token_logprobs", float)
        if choice.get("finish_reason") == "abort":
            raise Trouble("it gave the request up")
        return Served(tokens, logp, _reason(choice.get("finish_reason")))

    def updates(self, folder: str, version: str) -> list[tuple[str, dict[str, Any]]]:
        call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        return [("/collective_rpc", call), ("/reset_prefix_cache", {})]

    def updated(self, body: Mapping[str, Any]) -> None:
        """A status of 200 is its word."""


def encoded(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True).encode()


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = body.get(name)
    if not isinstance(found, dict):
        raise Malformed(f"{name} is no object")
    return found


def _reason(found: Any) -> str:
    if found not in ("stop", "length"):
        raise Malformed(f"finish_reason: expected stop or length, got {brief(str(found))}")
    return found


def _numbers(values: Any, name: str, kind: type) -> list[Any]:
    if not isinstance(values, list):
        raise Malformed(f"{name} is no list")
    for value in values:
        whole = isinstance(value, int) and not isinstance(value, bool)
        number = whole or (kind is float and isinstance(value, float) and math.isfinite(value))
        if not number:
            raise Malformed(f"{name} holds {brief(str(value))}")
    return [kind(v) for v in values]
