"""RMSNorm and SwiGLU on the CPU, each one pass forward and one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonrl.kernels.native import DTYPES, core, pointer, threads


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
    dtype: torch.dtype,  # of the result
) -> Tensor:  # (..., D)
    """weight * x / sqrt(mean(x^2) + eps); x and a number a row are kept for the gradient."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps, dtype)
    return _normalised(x, weight, eps, dtype, None)[0]


def _normalised(x, weight, eps: float, dtype: torch.dtype, scale: Tensor | None):
    """The result, and what the kernel knows of the task."""
    y, width = torch.empty(x.shape, dtype=dtype), len(weight)
    kinds = DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[dtype]
    known = x.numel() // width, width, *kinds, eps
    task = core().NormTask(pointer(x), pointer(weight), pointer(scale), *known)
    core().rms_norm(task, pointer(y), threads())
    return y, known


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        scale = torch.empty(x.shape[:-1])
        y, ctx.known = _normalised(x, weight, eps, dtype, scale)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        task = core().NormTask(pointer(x), pointer(weight), pointer(scale), *ctx.known)
        core().rms_norm_grad(task, pointer(grad), pointer(grad_x), pointer(grad_weight), threads())
        return grad_x, grad_weight, None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of the same shape and dtype; both are kept for the gradient."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else _gated(gate, up)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    core().swiglu(_task(gate, up), pointer(out), threads())
    return out


def _task(gate: Tensor, up: Tensor):
    return core().GateTask(pointer(gate), pointer(up), gate.numel(), DTYPES[gate.dtype])


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad, grad_gate, grad_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        task = _task(gate, up)
        core().swiglu_grad(task, pointer(grad), pointer(grad_gate), pointer(grad_up), threads())
        return grad_gate, grad_up
