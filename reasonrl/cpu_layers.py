"""What stands between the products of a transformers model on a CPU, by kernels of ours, on this
instance alone: RMSNorm, also with the residual before it, SwiGLU, the rotary embedding.

Plain torch makes eight passes for a norm and keeps several copies of its input for the gradient; a
kernel makes one and keeps the input. Under autocast a norm that only linear layers read gives what
they would have cast it to, and turned queries and keys come in the dtype of the values. The modules
stay what they are: their `forward` is a method bound to them, which a deep copy binds to the copy.
Away from a CPU, wherever a weight or an input is no plain tensor, and outside of this package's
attention, they compute as transformers has it.
"""

from __future__ import annotations

import importlib.util
import types
from typing import Any

import torch
from torch import Tensor, nn

from reasonrl import attention, checks, structure, whole_layer
from reasonrl.implementations import native, run
from reasonrl.whole_layer import DTYPES, TYPES


def fuse(model: nn.Module) -> bool:
    """Whether layers of the model are fused now."""
    if not importlib.util.find_spec("reasonrl._C"):
        return False
    norms = [(n, m) for n, m in model.named_modules() if structure.is_norm(m)]
    ways = {_gated: structure.is_gated, _attention: structure.turns, _layer: structure.is_layer}
    for name, norm in norms:
        linear = name.rpartition(".")[2] in structure.READ_BY_LINEAR
        norm.forward = types.MethodType(_narrow_norm if linear else _norm, norm)
    found = [(way, m) for m in model.modules() for way, fits in ways.items() if fits(m)]
    for way, module in found:
        module.forward = types.MethodType(way, module)
    return bool(norms or found)


def fused(model: nn.Module) -> bool:
    """Whether layers of the model are."""
    ways = (_norm, _narrow_norm, _gated, _attention, _layer)
    return any(structure.way(module) in ways for module in model.modules())


def joinable(model: nn.Module) -> list[tuple[nn.Module, list[nn.Linear]]]:
    """Fused modules with the plain linear layers that read one input: as one product of their
    weights, put into `joined`, they cost one call where little is multiplied."""
    names = {_gated: ("gate_proj", "up_proj"), _attention: ("q_proj", "k_proj", "v_proj")}
    found = []
    for module in model.modules():
        parts: list[Any] = [getattr(module, name) for name in names.get(structure.way(module), ())]
        biased = {part.bias is None for part in parts if type(part) is nn.Linear}
        if parts and all(type(part) is nn.Linear for part in parts) and len(biased) == 1:
            found.append((module, parts))
    return found


def lean(decoder: Any) -> bool:
    """Whether a decoder is `known`, without norms of heads, and its products are prepared."""
    if not known(decoder) or any(hasattr(x.self_attn, "q_norm") for x in decoder.layers):
        return False
    for layer in decoder.layers:
        attn, mlp = layer.self_attn, layer.mlp
        if not all("joined" in vars(x) for x in (attn, mlp)):
            return False
        if not all("forward" in vars(x) for x in (attn.o_proj, mlp.down_proj)):
            return False
    return True


def known(decoder: Any) -> bool:
    """Whether a decoder is embedding, known layers and norm, and nobody listens to any of its
    modules."""
    if not structure.of(decoder, "Model", structure.TURNED):
        return False
    if structure.way(decoder.norm) is not _norm:
        return False
    layers = [*decoder.layers]
    if not all(map(_known, layers)):
        return False
    own = decoder, decoder.embed_tokens, decoder.rotary_emb, decoder.norm
    modules = [*own, *(part for layer in layers for part in structure.parts(layer))]
    return not any(map(structure.heard, modules))


def plain(layer: Any) -> bool:
    """Whether it is a linear layer that computes as torch has it with all of its weight, and nobody
    listens to it."""
    if type(layer) is not nn.Linear or "forward" in vars(layer) or structure.heard(layer):
        return False
    weight = structure.weight(layer)
    return weight is not None and weight.shape == (layer.out_features, layer.in_features)


def _known(layer: Any) -> bool:
    """Whether a layer and its parts compute as this file has them."""
    own, norms = layer._modules, structure.norms(layer)
    ways = [structure.way(part) for part in (layer, own["self_attn"], own["mlp"], *norms)]
    return ways == [*WAYS, *[_norm] * (len(norms) - 2)]


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return _normed(self, hidden_states, torch.promote_types(self.weight.dtype, hidden_states.dtype))


def _narrow_norm(self: Any, hidden_states: Tensor) -> Tensor:
    return _normed(self, hidden_states, _narrow(self, hidden_states))


def _narrow(norm: Any, x: Tensor) -> torch.dtype:
    """What linear layers alone will read."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return torch.promote_types(norm.weight.dtype, x.dtype)


def _normed(norm: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    if not _plain(x, norm.weight) or x.shape[-1:] != norm.weight.shape:
        return type(norm).forward(norm, x)
    return native("rms_norm")(x.contiguous(), norm.weight, norm.variance_epsilon, dtype)


def _gated(self: Any, x: Tensor) -> Tensor:
    if joined := vars(self).get("joined"):
        return self.down_proj(native("swiglu")(*joined(x)))
    gate, up = self.gate_proj(x), self.up_proj(x)
    if _plain(gate, up) and (gate.shape, gate.dtype) == (up.shape, up.dtype):
        return self.down_proj(native("swiglu")(gate.contiguous(), up.contiguous()))
    return self.down_proj(self.act_fn(gate) * up)


def _attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    cos, sin = position_embeddings
    fits = kwargs.get("plan") is not None and cos.shape[-1] == self.head_dim
    if not (fits and len(hidden_states) == 1 and _plain(hidden_states, cos)):
        given = hidden_states, position_embeddings, attention_mask
        return type(self).forward(self, *given, **kwargs)
    x, joined = hidden_states[0], vars(self).get("joined")
    parts = (self.q_proj, self.k_proj, self.v_proj)
    q, k, v = joined(x) if joined else (part(x) for part in parts)
    q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))  # (L, heads, d)
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    q, k = native("rotary")(q, k.to(q.dtype), cos[0], sin[0], v.dtype)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    lost = self.attention_dropout if self.training else 0.0
    given = attention_mask, self.scaling, lost
    out, weights = attention.attention(self, q, k, v, *given, **kwargs)
    return self.o_proj(out.reshape(1, len(cos[0]), -1)), weights


def _layer(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Tensor:
    if _known(self):
        plan = kwargs.get("plan")
        out = whole_layer.computed(self, hidden_states, position_embeddings, plan)
        if out is not None:
            return out
    given = dict(attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)
    given |= dict(past_key_values=past_key_values, position_embeddings=position_embeddings)
    x = self.input_layernorm(hidden_states)
    x, _ = self.self_attn(hidden_states=x, **given, **kwargs)
    total, x = _added(self.post_attention_layernorm, hidden_states, x)
    return total + self.mlp(x)


def _added(norm: Any, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The residual and x together, and their norm; by the module itself where somebody listens to
    it."""
    fits = _plain(residual, norm.weight) and _plain(x, x) and x.shape == residual.shape
    if (
        not fits or structure.heard(norm) or x.shape[-1:] != norm.weight.shape
        or torch.promote_types(residual.dtype, x.dtype) != residual.dtype
    ):  # fmt: skip
        total = residual + x
        return total, norm(total)
    known = norm.weight, norm.variance_epsilon, _narrow(norm, residual)
    return native("add_rms_norm")(residual.contiguous(), x.contiguous(), *known)


WAYS = [_layer, _attention, _gated, _narrow_norm, _narrow_norm]
for method in (_norm, _narrow_norm, _gated, _attention, _layer):
    method.__name__ = "forward"  # pickled by this name: read back, a module computes as before


def _plain(a: Tensor, b: Tensor) -> bool:
    """Whether the kernels take these: on a CPU, of a dtype they know, no DTensor."""
    known = type(a) in TYPES and type(b) in TYPES and a.dtype in DTYPES and b.dtype in DTYPES
    return known and a.is_cpu and b.is_cpu and not torch.compiler.is_compiling()


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
) -> Tensor:  # (..., D) in `dtype`
    """weight * n, n = x / sqrt(mean(x^2) + eps) as x's dtype holds it; fp32 inside."""
    checks.dtype("x", x, checks.ANY_FLOAT)
    width = x.shape[-1] if x.dim() else 0
    checks.tensor("weight", weight, (width,), "(D,)", checks.ANY_FLOAT, x.device)
    checks.choice("dtype", dtype, checks.ANY_FLOAT)
    return run("rms_norm", impl, x, weight, eps, dtype)


def swiglu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up, of one shape and dtype; fp32 inside."""
    checks.dtype("gate", gate, checks.ANY_FLOAT)
    checks.tensor("up", up, gate.shape, "gate's shape", (gate.dtype,), gate.device)
    return run("swiglu", impl, gate, up)


def add_rms_norm(
    x: Tensor,  # (..., D)
    delta: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # (..., D) in x's dtype, (..., D) in `dtype`
    """x + delta, and `rms_norm` of it."""
    checks.dtype("x", x, checks.ANY_FLOAT)
    checks.tensor("delta", delta, x.shape, "the shape of x", checks.ANY_FLOAT, x.device)
    width = x.shape[-1] if x.dim() else 0
    checks.tensor("weight", weight, (width,), "(D,)", checks.ANY_FLOAT, x.device)
    checks.choice("dtype", dtype, checks.ANY_FLOAT)
    return run("add_rms_norm", impl, x, delta, weight, eps, dtype)


def rotary(
    q: Tensor,  # (N, H, d)
    k: Tensor,  # (N, K, d)
    cos: Tensor,  # (N, d)
    sin: Tensor,  # (N, d)
    dtype: torch.dtype,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # (N, H, d) and (N, K, d) in `dtype`
    """The rotary embedding (Su et al. 2021, eq. 34) of heads whose halves are pairs; fp32 inside,
    no gradient by the angles."""
    checks.dtype("q", q, checks.ANY_FLOAT)
    if q.dim() != 3 or q.shape[2] % 2:
        raise ValueError(f"q must be (N, H, d) with an even d, got {tuple(q.shape)}")
    heads = k.shape[1] if k.dim() == 3 else 0
    checks.tensor("k", k, (len(q), heads, q.shape[2]), "(N, K, d)", (q.dtype,), q.device)
    checks.dtype("cos", cos, checks.ANY_FLOAT)
    for name, angle in (("cos", cos), ("sin", sin)):
        checks.tensor(name, angle, (len(q), q.shape[2]), "(N, d)", (cos.dtype,), q.device)
    checks.choice("dtype", dtype, checks.ANY_FLOAT)
    return run("rotary", impl, q, k, cos, sin, dtype)
