"""The CUDA C++ ops of reasonrl._C for tensors on an NVIDIA GPU; formulas in reference.py.

What is known of them: the sources are compiled by nvcc for four architectures and executed line by
line on a CPU, under a SIMT model with sanitizers and a race detector (tests/test_cuda_on_cpu.py).
They have not been run or timed on a GPU. No atomics: the same bits in every run. Nothing here waits
for the device. Arguments as in native.py: packed, contiguous, validated.
Legend: B completions, N packed tokens, S steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonrl.kernels.native import (
    HOWS,
    KINDS,
    core,
    detached,
    loss_numbers,
    named_metrics,
    pointer,
)


def available() -> str | None:
    """None where the ops can run, otherwise what is missing."""
    try:
        module = core()
    except ImportError as error:
        return f"reasonrl._C is not built ({error}); pip install -e . builds it"
    if not hasattr(module, "cuda_policy"):
        return "reasonrl._C was built without CUDA; put nvcc on PATH and pip install -e . again"
    return module.cuda_missing() or None


def call(op: str, like: Tensor, *args: Any) -> None:
    """Launch on the current stream of the tensor's device."""
    with torch.cuda.device(like.device):
        getattr(core(), f"cuda_{op}")(*args, torch.cuda.current_stream().cuda_stream)


def count_tokens(mask: Tensor | None, cu: Tensor) -> Tensor:  # (B,) int64
    if mask is None:
        return cu.diff()
    counts = torch.zeros(cu.numel() - 1, dtype=torch.int64, device=cu.device)
    call("count_tokens", mask, pointer(mask), pointer(cu), counts.numel(), pointer(counts))
    return counts


def divisors(spec: Any, counts: Tensor, denominator: Any) -> Tensor:  # (2,) float64
    """Divisor of the loss; of the entropy part, 0 where it is the same. Stays on the device."""
    tokens = counts.sum().clamp(min=1).double()
    divisor = tokens
    if spec.reduce != "token_mean":
        rows = counts.numel() * (spec.max_length or 0 if spec.reduce == "fixed" else 1)
        divisor = torch.full_like(tokens, max(rows, 1))
    if denominator is not None:
        divisor = torch.as_tensor(denominator, dtype=torch.float64).to(tokens.device).reshape(())
    apart = spec.entropy_reduce == "token_mean" and spec.reduce != "token_mean"
    return torch.stack([divisor, tokens if apart else torch.zeros_like(tokens)])


def policy_loss(
    logp: Tensor,  # (N,)
    old_logp: Tensor | None,
    advantage: Tensor,
    spec: Any,  # a LossSpec
    cu: Tensor,
    mask: Tensor | None,
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    is_weight: Tensor | None,
    denominator: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, dL/dlogp, dL/dentropy and metrics in two launches (three with a mask)."""
    known = [detached(x) for x in (old_logp, advantage, ref_logp, is_weight, mask)]
    cu = cu.to(logp.device)
    loss, values = _Policy.apply(logp, entropy, spec, known, cu, denominator)
    return loss, named_metrics(values)


class _Policy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, entropy, spec, known, cu, denominator):
        old, advantage, ref, weight, mask = known
        counts = count_tokens(mask, cu)
        divisor = divisors(spec, counts, denominator)
        c = torch.empty_like(logp)
        eta = None if entropy is None else torch.empty_like(logp)
        numbers = core().Loss(*loss_numbers(spec))
        sizes = (logp.numel(), counts.numel(), spec.reduce == "seq_mean")
        rows = core().cuda_policy_items(numbers, *sizes)
        sums = torch.empty(rows, core().SUM_COUNT, dtype=torch.float64, device=logp.device)
        result = torch.empty(11, dtype=torch.float32, device=logp.device)
        tensors = (
            logp, old, advantage, ref, entropy, weight, mask, cu, counts, divisor, c, eta, sums,
            result,
        )  # fmt: skip
        task = core().PolicyTask(*(pointer(x) for x in tensors), *sizes)
        call("policy", logp, numbers, task)
        ctx.save_for_backward(c, eta)
        loss, values = result[0].clone(), result[1:]
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    def backward(ctx, grad, _):
        c, eta = ctx.saved_tensors
        return c * grad, None if eta is None else eta * grad, None, None, None, None


def group_advantage(
    reward: Tensor,  # (B,)
    group: Tensor,  # (B,) int64
    kind: str,
    scored: Tensor | None,  # (B,) bool
    ddof: int,
    eps: float,
) -> Tensor:  # (B,)
    """Rewards relative to their group, any ids in any order; dead groups exactly 0."""
    reward, out = reward.detach().contiguous(), torch.empty_like(reward)
    call(
        "group_advantage", reward, pointer(reward), pointer(group), pointer(scored),
        reward.numel(), KINDS[kind], ddof, eps, pointer(out),
    )  # fmt: skip
    return out


def returns(token_reward: Tensor, cu: Tensor, mask: Tensor | None, gamma: float) -> Tensor:  # (N,)
    """R_t = r_t + gamma R_t+1 within each completion, over its unmasked tokens."""
    return _Returns.apply(token_reward, cu.to(token_reward.device), mask, gamma)


class _Returns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reward, cu, mask, gamma, ahead=False):
        ctx.args = (cu, mask, gamma, ahead)
        out = torch.empty_like(reward)
        call(
            "returns", reward, pointer(reward), pointer(cu), pointer(mask), cu.numel() - 1, gamma,
            ahead, pointer(out),
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, grad):
        cu, mask, gamma, ahead = ctx.args
        return _Returns.apply(grad.contiguous(), cu, mask, gamma, not ahead), None, None, None, None


def by_step(step: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:  # (N,), (S+1,)
    """The tokens in the order of their steps, stably, and where each step starts."""
    ordered, order = torch.sort(step, stable=True)
    edges = torch.arange(n_steps + 1, device=step.device)
    return order, torch.searchsorted(ordered, edges)


def step_reduce(value: Tensor, step: Tensor, n_steps: int, how: str) -> Tensor:  # (S,)
    """One value a step; min and max give their gradient to the first of equal values."""
    return _StepReduce.apply(value, *by_step(step, n_steps), HOWS[how])


class _StepReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, order, offsets, how):
        steps = offsets.numel() - 1
        out = value.new_empty(steps)
        index = torch.empty(steps, dtype=torch.int64, device=value.device)
        call(
            "step_reduce", value, pointer(value), pointer(order), pointer(offsets), steps, how,
            pointer(out), pointer(index),
        )  # fmt: skip
        ctx.save_for_backward(value, order, offsets, index)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx, grad):
        value, order, offsets, index = ctx.saved_tensors
        return spread(grad.contiguous(), value, order, offsets, index, ctx.how), None, None, None


def spread(grad, value, order, offsets, index, how) -> Tensor:  # (S,) -> (N,)
    """Gradient of the reduction by the values; tokens in no step keep 0."""
    out = torch.zeros(order.shape, dtype=grad.dtype, device=grad.device)
    call(
        "step_reduce_grad", grad, pointer(value), pointer(order), pointer(offsets), grad.numel(),
        how, pointer(index), pointer(grad), pointer(out),
    )  # fmt: skip
    return out


def step_expand(step_value: Tensor, step: Tensor, where: str) -> Tensor:  # (S,), (N,) -> (N,)
    """Give every token of a step, or only its last in memory order, the step's value."""
    how = HOWS["last" if where == "last" else "sum"]
    return _StepExpand.apply(step_value, step, how)


class _StepExpand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step_value, step, how):
        ctx.save_for_backward(step)
        ctx.how, ctx.steps = how, step_value.numel()
        if how == HOWS["last"]:
            return spread(step_value, None, *by_step(step, ctx.steps), None, how)
        out = step_value.new_empty(step.numel())
        call(
            "step_expand", step_value, pointer(step_value), pointer(step), step.numel(),
            pointer(out),
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, grad):
        (step,) = ctx.saved_tensors
        out = _StepReduce.apply(grad.contiguous(), *by_step(step, ctx.steps), ctx.how)
        return out, None, None
