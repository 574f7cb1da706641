"""RMSNorm, SwiGLU and the rotary embedding on the CPU, each one pass forward and one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonrl.kernels.native import DTYPES, core, pointer, threads
from reasonrl.kernels.native_attention import whole_rows


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
    dtype: torch.dtype,  # of the result
) -> Tensor:  # (..., D)
    """weight * x / sqrt(mean(x^2) + eps); x and a number a row are kept for the gradient."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps, dtype)
    return _normalised(x, None, weight, eps, dtype, None)[0]


def add_rms_norm(
    x: Tensor,  # (..., D)
    delta: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
    dtype: torch.dtype,  # of the result
) -> tuple[Tensor, Tensor]:  # (..., D) in x's dtype, (..., D)
    """x + delta, and its norm."""
    if torch.is_grad_enabled():
        return _AddRMSNorm.apply(x, delta, weight, eps, dtype)
    y, total, _ = _normalised(x, delta, weight, eps, dtype, None)
    return total, y


def add_rms_norm_(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """The same without a gradient, the sum in the place of x; gives the norm alone."""
    y, width = torch.empty(x.shape, dtype=dtype), len(weight)
    kinds = DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[dtype]
    here = pointer(x)
    task = core().NormTask(here, pointer(weight), 0, x.numel() // width, width, *kinds, eps)
    added = (0, 0, 0) if delta is None else (pointer(delta), here, DTYPES[delta.dtype])
    core().rms_norm(task, *added, pointer(y), threads())
    return y


def joined_swiglu(both: Tensor) -> Tensor:  # (N, 2 D), gate and up, contiguous -> (N, D)
    """swiglu of what one product gave, without a gradient."""
    rows, width = both.shape[0], both.shape[1] // 2
    out = torch.empty((rows, width), dtype=both.dtype)
    gate, up = both.data_ptr(), both.data_ptr() + width * both.element_size()
    task = core().GateTask(gate, up, rows, width, 2 * width, DTYPES[both.dtype])
    core().swiglu(task, pointer(out), threads())
    return out


def _normalised(x, delta, weight, eps: float, dtype: torch.dtype, scale: Tensor | None):
    """The result, the sum that was normalised, and what the kernel knows of the task."""
    y, width = torch.empty(x.shape, dtype=dtype), len(weight)
    total = x if delta is None else torch.empty_like(x)
    kinds = DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[dtype]
    known = x.numel() // width, width, *kinds, eps
    task = core().NormTask(pointer(x), pointer(weight), pointer(scale), *known)
    added = pointer(delta), pointer(total), 0 if delta is None else DTYPES[delta.dtype]
    core().rms_norm(task, *added, pointer(y), threads())
    return y, total, known


def _norm_grad(ctx, grad, grad_sum, delta: torch.dtype | None):
    """By the rows, by what was added, by the weight."""
    x, weight, scale = ctx.saved_tensors
    grad, grad_x = grad.contiguous(), torch.empty_like(x)
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    alike = delta in (None, x.dtype)  # one gradient for both
    grad_delta = None if alike else torch.empty(x.shape, dtype=delta)
    grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[-3] else None
    task = core().NormTask(pointer(x), pointer(weight), pointer(scale), *ctx.known)
    given = (pointer(g) for g in (grad, grad_sum, grad_x, grad_delta, grad_weight, None))
    core().rms_norm_grad(task, *given, 0 if alike else DTYPES[delta], threads())
    return grad_x, grad_x if alike else grad_delta, grad_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        scale = torch.empty(x.shape[:-1])
        y, _, ctx.known = _normalised(x, None, weight, eps, dtype, scale)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        grad_x, _, grad_weight = _norm_grad(ctx, grad, None, None)
        return grad_x, grad_weight, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps, dtype):
        scale = torch.empty(x.shape[:-1])
        y, total, ctx.known = _normalised(x, delta, weight, eps, dtype, scale)
        ctx.save_for_backward(total, weight, scale)
        ctx.delta, ctx.dtype = delta.dtype, dtype
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    def backward(ctx, grad_sum, grad):  # type: ignore[override]
        if grad is None:  # nobody looked at the norm
            grad = torch.zeros(ctx.saved_tensors[0].shape, dtype=ctx.dtype)
        return *_norm_grad(ctx, grad, grad_sum, ctx.delta), None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of the same shape, strides and dtype, rows any way apart; both are kept for
    the gradient."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else _gated(gate, up)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype)
    core().swiglu(_task(gate, up), pointer(out), threads())
    return out


def _task(gate: Tensor, up: Tensor):
    count, width = gate.numel(), gate.shape[-1]
    size = (1, count, count) if gate.is_contiguous() else (count // width, width, gate.stride(-2))
    return core().GateTask(pointer(gate), pointer(up), *size, DTYPES[gate.dtype])


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad = grad.contiguous()
        grad_gate, grad_up = torch.empty_like(grad), torch.empty_like(grad)
        given = (pointer(g) for g in (grad, grad_gate, grad_up, None))
        core().swiglu_grad(_task(gate, up), *given, gate.shape[-1], threads())
        return grad_gate, grad_up


def rotary(
    q: Tensor,  # (N, H, d), d even, rows any way apart
    k: Tensor,  # (N, K, d), of q's dtype, the same
    cos: Tensor,  # (N, d)
    sin: Tensor,  # (N, d), of cos' dtype
    dtype: torch.dtype,  # of the results
) -> tuple[Tensor, Tensor]:
    """x cos + rotate_half(x) sin of every head; the angles alone are kept for the gradient."""
    if torch.is_grad_enabled():
        return _Rotary.apply(q, k, cos, sin, dtype)
    return _turned(q, k, cos, sin, dtype, False)


def _turned(q, k, cos, sin, dtype: torch.dtype, back: bool) -> tuple[Tensor, Tensor]:
    q, k = whole_rows(q), whole_rows(k)
    q_out, k_out = torch.empty(q.shape, dtype=dtype), torch.empty(k.shape, dtype=dtype)
    kinds = (DTYPES[x] for x in (q.dtype, cos.dtype, dtype))
    given = (pointer(x) for x in (q, k, cos, sin, q_out, k_out))
    sizes = q.shape[0], q.shape[1], *k.shape[1:], q.stride(0), k.stride(0)
    task = core().RotaryTask(*given, *sizes, *kinds)
    core().rotary(task, back, threads())
    return q_out, k_out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, dtype):
        ctx.save_for_backward(cos, sin)
        ctx.dtype = q.dtype
        return _turned(q, k, cos, sin, dtype, False)

    @staticmethod
    def backward(ctx, grad_q, grad_k):  # type: ignore[override]
        both = grad_q.contiguous(), grad_k.contiguous()
        return *_turned(*both, *ctx.saved_tensors, ctx.dtype, True), None, None, None
