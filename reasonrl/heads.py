"""The output head of a causal model as tensors, whole and inside the module that owns it.

    loss = at_head(model, hidden, lambda hidden, head: linear_policy_loss(hidden, head.weight, ...))

The function takes the place of the head's own forward for one call, so whatever shards the weight
gathers it and brings the gradient home as for any layer: ZeRO-3 and FSDP2 by their hooks, a DTensor
that is still sharded by `full_tensor`. A LoRA adapter on the head is added to the weight; the
multiplier of the logits (Cohere, Granite, Falcon-H1) goes into hidden and bias, the soft cap
(Gemma) to the function. What cannot be said as such a product is refused by `check`. Left out:
heads split by tensor parallelism, quantised heads, DoRA, dropout on a head's adapter (refused).
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
TOLERANCE = 1e-3  # of the largest logit, between the model's own and ours, in `verify`


@dataclass(frozen=True)
class Head:
    """u = hidden @ weight.T + bias; the logits are softcap * tanh(u / softcap), or u."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None


HeadCall = Callable[[Tensor, Head], Any]  # (hidden, head) -> tensor or tuple of tensors


def at_head(model: Any, hidden: Tensor, function: HeadCall, dtype: torch.dtype | None = None):
    """function(hidden, head), evaluated as the forward of the module that owns the head.

    hidden (..., D) already carries the model's logit multiplier. dtype: of hidden, weight and bias,
    None = the weight's own for all. ValueError where the head has no such form.
    """
    inner = _inner(model)
    layer, adapters = _layer(inner)
    config = _config(inner)
    softcap, scale = _softcap(config), _scale(config)

    def forward(hidden: Tensor) -> Any:
        weight, bias = _whole(layer.weight), _whole(layer.bias)
        for down, up, factor in adapters:
            weight = weight + factor * up(down(_identity(down))).T.to(weight.dtype)
        kind = weight.dtype if dtype is None else dtype
        if scale != 1.0:
            hidden, bias = hidden * scale, None if bias is None else bias * scale
        bias = None if bias is None else bias.to(kind)
        return function(hidden.to(kind), Head(weight.to(kind), bias, softcap))

    with _forward_of(layer, forward):
        return layer(hidden)


def attach(model: Any) -> None:
    """Let `model(..., head_call=f)` give f(last hidden states, head) from inside its own forward,
    so that wrappers around it (DDP, FSDP2, DeepSpeed, PEFT) see one ordinary call."""
    inner = _inner(model)
    original = inner.forward
    if getattr(original, "takes_head_call", False):
        return

    @functools.wraps(type(inner).forward)  # generate() reads the signature
    def forward(self, *args, head_call: HeadCall | None = None, **kwargs):
        if head_call is None:
            return original(*args, **kwargs)
        out = self.get_decoder()(*args, **kwargs, use_cache=False)
        return at_head(self, out.last_hidden_state, head_call)

    forward.takes_head_call = True  # type: ignore[attr-defined]
    inner.forward = types.MethodType(forward, inner)


def softcap_of(model: Any) -> float | None:
    """The bound of the model's logits, None without one."""
    return _softcap(_config(model))


def scale_of(model: Any) -> float:
    """What the model multiplies its logits by, before the soft cap."""
    return _scale(_config(model))


def alone(model: Any) -> bool:
    """Whether its logits are the product and nothing more."""
    config = _config(model)
    return _scale(config) == 1.0 and _softcap(config) is None


def _config(model: Any) -> Any:
    config = _inner(model).config
    return config.get_text_config() if config.sub_configs else config  # its search is slow


def _softcap(config: Any) -> float | None:
    found = [getattr(config, name, None) for name in SOFTCAPS]
    return next((float(value) for value in found if value), None)


def _scale(config: Any) -> float:
    for name in FACTORS:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / divisor


def check(model: Any) -> None:
    """ValueError where the logits are not a product with a weight that `at_head` can give."""
    _layer(_inner(model))


@torch.no_grad()
def verify(model: Any) -> None:
    """`check`, and the model's own logits of three tokens against ours; ValueError where they
    differ, which means a transformation of the logits that nothing here knows."""
    inner = _inner(model)
    layer, _ = _layer(inner)
    if layer.weight.numel() == 0 or hasattr(layer.weight, "full_tensor"):
        return  # sharded already: a forward of one rank alone would hang
    training = inner.training
    inner.eval()
    ids = torch.arange(3, device=layer.weight.device)[None]
    own = inner(input_ids=ids, use_cache=False).logits.float()
    hidden = inner.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    ours = at_head(inner, hidden, logits).float()
    inner.train(training)
    gap = float((own - ours).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(own.abs().max())):
        raise ValueError(
            f"{type(inner).__name__}: its logits differ from hidden @ weight.T by {gap:.2g}; it"
            " changes them in a way that is not known here"
        )


def logits(hidden: Tensor, head: Head) -> Tensor:
    """(..., V): for sampling and checks, never for training."""
    u = nn.functional.linear(hidden, head.weight, head.bias)
    return u if head.softcap is None else head.softcap * torch.tanh(u / head.softcap)


def _inner(model: Any) -> Any:
    """The transformers model under a PEFT one."""
    kind = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    if kind:
        raise ValueError("a model with learned prompts (prompt-learning PEFT) has no such head")
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _layer(inner: Any) -> tuple[nn.Linear, list[tuple[nn.Module, nn.Module, float]]]:
    """The linear layer that owns the weight, and the LoRA factors on top of it."""
    head = inner.get_output_embeddings()
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):  # PEFT's full copy
        active = [] if head.disable_adapters else [n for n in head.active_adapters if n]
        saved = [head.modules_to_save[n] for n in active if n in head.modules_to_save]
        head = saved[0] if saved else head.original_module
    adapters = []
    if hasattr(head, "lora_A") and hasattr(head, "base_layer"):
        head, adapters = head.base_layer, _lora(head)
    # a subclass with the same forward is a sharded one (FSDP2 renames the class)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(f"the head is a {type(head).__name__}, expected a linear layer or LoRA")
    return head, adapters


def _lora(layer: Any) -> list[tuple[nn.Module, nn.Module, float]]:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged:
        if layer.disable_adapters and layer.merged:
            raise ValueError("the head's LoRA adapter is merged and disabled at once; unmerge it")
        return []
    for name in names:
        refused = {
            "dropout": getattr(layer.lora_dropout[name], "p", 0.0) > 0,
            "a variant such as DoRA": name in getattr(layer, "lora_variant", {}),
            "a bias": bool(getattr(layer, "lora_bias", {}).get(name, False)),
        }
        for what, hit in refused.items():
            if hit:
                raise ValueError(
                    f"the head's LoRA adapter {name!r} has {what}, which is no product"
                )
    return [(layer.lora_A[n], layer.lora_B[n], float(layer.scaling[n])) for n in names]


def _identity(layer: Any) -> Tensor:
    weight = layer.weight
    return torch.eye(layer.in_features, dtype=weight.dtype, device=weight.device)


def _whole(value: Any) -> Any:
    """A DTensor that no hook has gathered, whole; its gradient goes back as the ranks' mean."""
    if value is None or not hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import Partial

    return value.full_tensor(grad_placements=[Partial("avg")] * value.device_mesh.ndim)


@contextlib.contextmanager
def _forward_of(layer: nn.Module, forward: Callable) -> Iterator[None]:
    """`layer` computes `forward` inside the block, behind its own hooks."""
    before = layer.__dict__.get("forward")
    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before  # type: ignore[method-assign]
