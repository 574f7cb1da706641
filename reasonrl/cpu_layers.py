"""RMSNorm and SwiGLU of a transformers model on a CPU, by a kernel of ours, on this instance alone.

Plain torch makes eight passes for a norm and keeps several copies of its input for the gradient; a
kernel makes one and keeps the input. Under autocast a norm that only linear layers read gives what
they would have cast it to. The modules stay what they are: their `forward` is a method bound to
them, which a deep copy binds to the copy. Away from a CPU, and wherever a weight or an input is no
plain tensor, they compute as transformers has it.
"""

from __future__ import annotations

import importlib.util
import types
from typing import Any

import torch
from torch import Tensor, nn

from reasonrl import checks
from reasonrl.implementations import native, run

# whose RMSNorm is w * x / rms, and whose decoder layers read their two norms by linear layers alone
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smollm3")
READ_BY_LINEAR = ("input_layernorm", "post_attention_layernorm")
SILU = ("SiLU", "SiLUActivation")
TYPES = (Tensor, nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fuse(model: nn.Module) -> bool:
    """Whether layers of the model are fused now."""
    if not importlib.util.find_spec("reasonrl._C"):
        return False
    norms = [(n, m) for n, m in model.named_modules() if _is_norm(m)]
    gated = [m for m in model.modules() if _is_gated(m)]
    for name, norm in norms:
        linear = name.rpartition(".")[2] in READ_BY_LINEAR
        norm.forward = types.MethodType(_narrow_norm if linear else _norm, norm)
    for mlp in gated:
        mlp.forward = types.MethodType(_gated, mlp)
    return bool(norms or gated)


def fused(model: nn.Module) -> bool:
    """Whether layers of the model are."""
    ways = (_norm, _narrow_norm, _gated)
    return any(getattr(vars(m).get("forward"), "__func__", None) in ways for m in model.modules())


def _of(module: nn.Module, end: str) -> bool:
    kind = type(module)
    home = kind.__module__.split(".")
    return (
        kind.__name__.endswith(end) and home[:2] == ["transformers", "models"] and home[2] in KNOWN
    )


def _is_norm(module: nn.Module) -> bool:
    return _of(module, "RMSNorm") and hasattr(module, "variance_epsilon")


def _is_gated(module: Any) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return (
        _of(module, "MLP")
        and all(hasattr(module, part) for part in parts)
        and type(module.act_fn).__name__ in SILU
    )


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return _normed(self, hidden_states, torch.promote_types(self.weight.dtype, hidden_states.dtype))


def _narrow_norm(self: Any, hidden_states: Tensor) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        return _normed(self, hidden_states, torch.get_autocast_dtype("cpu"))
    return _norm(self, hidden_states)


def _normed(norm: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    if not _plain(x, norm.weight) or x.shape[-1:] != norm.weight.shape:
        return type(norm).forward(norm, x)
    return native("rms_norm")(x.contiguous(), norm.weight, norm.variance_epsilon, dtype)


def _gated(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if _plain(gate, up) and (gate.shape, gate.dtype) == (up.shape, up.dtype):
        return self.down_proj(native("swiglu")(gate.contiguous(), up.contiguous()))
    return self.down_proj(self.act_fn(gate) * up)


for method in (_norm, _narrow_norm, _gated):
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
