"""Weights that lie in shards over the ranks (DeepSpeed ZeRO-3, FSDP2), in a loop that samples.

The shards belong to a twin of the policy, which accelerate wraps and only an update computes with.
All the rest of the loop has the policy itself: whole on every rank, filled from the shards behind
each update, and without memory during it. So a rank's peak is the larger of an update on shards
and a rollout with whole weights, and what is no update needs no collective. The moments of AdamW
(ZeRO 1 and 2 too) are saved as one process has them, so a run may go on with any number of ranks.
Left out: FSDP1, weights that no rank could hold, optimisers in CPU or NVMe memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from reasonrl.models import Policy
from reasonrl.records import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")


def kind(accelerator: Accelerator) -> str:
    """How the weights are sharded: "zero3", "fsdp2", or "" where every rank holds them whole."""
    name = accelerator.distributed_type.value
    if name == "FSDP":
        return "fsdp2"
    plugin: Any = getattr(accelerator.state, "deepspeed_plugin", None)
    return "zero3" if name == "DEEPSPEED" and plugin.zero_stage == 3 else ""


def set_up(accelerator: Accelerator) -> None:
    """Let every rank load its models whole: they are sharded later. InputError for FSDP1."""
    how = kind(accelerator)
    if how == "fsdp2":
        plugin: Any = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise InputError("FSDP version 1 hides the parameters; use fsdp_version: 2")
        plugin.cpu_ram_efficient_loading = False
    elif how == "zero3":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        accelerator.state.deepspeed_plugin.dschf = None  # type: ignore[union-attr]
        unset_hf_deepspeed_config()


class Shards:
    """`policy`, whole; `trained`, what an update computes with: itself where nothing is sharded."""

    def __init__(self, policy: Policy, accelerator: Accelerator):
        self.policy, self.kind = policy, kind(accelerator)
        self.trained = policy
        if self.kind:
            twin = copy.deepcopy(policy.model)
            self.trained = replace(policy, model=twin, engine=None, sharded=True)

    @contextmanager
    def update(self) -> Iterator[None]:
        """Inside it there are the shards alone; a collective at its end."""
        if not self.kind:
            yield
            return
        pairs = zip(self.policy.model.parameters(), self.trained.model.parameters(), strict=True)
        for parameter in self.policy.model.parameters():
            parameter.data = parameter.data.new_empty(0)
        yield
        for parameter, shard in pairs:
            parameter.data = _whole(shard)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return getattr(tensor, "to_local", lambda: tensor)()


def moments(optimizer: Any) -> list[Tensor]:
    """What this rank holds of AdamW's state."""
    state = _base(optimizer).state
    return [local(m) for of in state.values() for m in of.values() if isinstance(m, Tensor)]


def optimizer_state(optimizer: Any, parameters: Sequence[nn.Parameter], main: bool) -> dict:
    """The state_dict of an unsharded AdamW over `parameters`, on the main rank; a collective."""
    base, state = _base(optimizer), {}
    if base is optimizer.optimizer:  # torch's own: whole, or DTensors
        whole = optimizer.state_dict()
        for i, of in whole["state"].items():
            full = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in of.items()}
            state |= {i: full} if main else {}
        return whole | {"state": state}
    from deepspeed.utils import safe_get_full_optimizer_state

    if base.state:
        step = next(iter(base.state.values()))["step"]
        for i, parameter in enumerate(parameters):
            found = {k: safe_get_full_optimizer_state(parameter, k) for k in MOMENTS}
            state |= {i: {"step": step} | found} if main else {}
    group = {k: v for k, v in base.param_groups[0].items() if k != "params"}
    return {"state": state, "param_groups": [group | {"params": list(range(len(parameters)))}]}


def load_optimizer_state(
    optimizer: Any, parameters: Sequence[nn.Parameter], saved: dict[str, Any]
) -> None:
    """Take back what `optimizer_state` gave, on as many ranks as there are now; a collective."""
    base, state = _base(optimizer), saved["state"]
    if base is optimizer.optimizer:
        cut = {i: {k: _like(parameters[i], v) for k, v in of.items()} for i, of in state.items()}
        optimizer.load_state_dict(saved | {"state": cut})
        return
    if not state:
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    zero = optimizer.optimizer
    three = hasattr(zero, "fp32_partitioned_groups_flat")
    for flat in (
        zero.fp32_partitioned_groups_flat if three else zero.single_partition_of_fp32_groups
    ):
        base.state[flat] = {k: torch.zeros_like(flat.data) for k in MOMENTS}
        base.state[flat]["step"] = next(iter(state.values()))["step"].clone()
    if not three:
        zero._lazy_init_hp_params_optimizer_state()
    for i, parameter in enumerate(parameters):
        for name in MOMENTS:
            safe_set_full_optimizer_state(parameter, state[i][name].to(parameter.device), name)


def _base(optimizer: Any) -> Any:
    """torch's optimiser under accelerate's, and under DeepSpeed's where that is between them."""
    inner = optimizer.optimizer
    return inner if isinstance(inner, torch.optim.AdamW) else inner.optimizer


def _like(parameter: Any, value: Tensor) -> Tensor:
    """A whole moment as the parameter lies; other values as they are."""
    if not hasattr(parameter, "device_mesh") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _whole(shard: Any) -> Tensor:
    """A copy of the parameter, whole; a collective."""
    if hasattr(shard, "full_tensor"):
        return shard.detach().full_tensor()
    import deepspeed

    with deepspeed.zero.GatheredParameters([shard]):
        return shard.data.detach().clone()
