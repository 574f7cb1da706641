"""The CUDA C++ ops of reasonrl._C for tensors on an NVIDIA GPU; formulas in reference.py.

What is known of them: the sources are compiled by nvcc for four architectures and executed line by
line on a CPU, under a SIMT model with sanitizers and a race detector (tests/test_cuda_on_cpu.py).
What one NVIDIA H200 showed stands in bench/results. No float atomics: the same bits in every run.
Nothing here waits for the device. Arguments as in native.py: packed, contiguous, validated.
Legend: B completions, N packed tokens, S steps.
"""

from __future__ import annotations

import os
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from reasonrl.kernels.native import (
    FORMS,
    HOWS,
    KINDS,
    PAYS,
    core,
    detached,
    loss_numbers,
    named_metrics,
    pointer,
)
from reasonrl.kernels.native_credit import counted
from reasonrl.kernels.reference_credit import check_steps
from reasonrl.kernels.reference_segments import whiten


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


def divisors(
    spec: Any, cu: Tensor, n: int, mask: Tensor | None, denominator: Any
) -> tuple[Tensor | None, float, float]:
    """Divisor of the loss and of the entropy part (0 = the same): on the device where only it can
    know them (a count of unmasked tokens, a tensor), else as numbers, which cost no launch."""
    apart = spec.entropy_reduce == "token_mean" and spec.reduce != "token_mean"
    counted = apart or (spec.reduce == "token_mean" and denominator is None)
    foreign = isinstance(denominator, Tensor) and denominator.is_cuda
    rows = max(1, (cu.numel() - 1) * ((spec.max_length or 0) if spec.reduce == "fixed" else 1))
    if not (foreign or (counted and mask is not None)):
        tokens = float(max(n, 1))
        own = tokens if spec.reduce == "token_mean" else float(rows)
        return None, own if denominator is None else float(denominator), tokens if apart else 0.0
    tokens = count_tokens(mask, cu).sum().clamp(min=1).double()
    if denominator is not None:
        own = torch.as_tensor(denominator, dtype=torch.float64).to(cu.device).reshape(())
    else:
        own = tokens if spec.reduce == "token_mean" else torch.full_like(tokens, rows)
    return torch.stack([own, tokens if apart else torch.zeros_like(tokens)]), 0.0, 0.0


@cache
def ticket(device: torch.device, stream: int) -> Tensor:  # (1,) int32, 0 between launches
    return torch.zeros(1, dtype=torch.int32, device=device)


def policy_loss(
    logp: Tensor,  # (N,)
    old_logp: Tensor | None,
    advantage: Any,  # (N,), or a credit: rewards from which it follows
    spec: Any,  # a LossSpec
    cu: Tensor,
    mask: Tensor | None,
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    is_weight: Tensor | None,
    denominator: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, dL/dlogp, dL/dentropy and metrics in one launch, from advantages or from rewards.

    A divisor that only the device can count (unmasked tokens, no `denominator`) costs a few more.
    """
    given = advantage.detach() if isinstance(advantage, Tensor) else advantage
    known = [detached(old_logp), given, *map(detached, (ref_logp, is_weight, mask))]
    cu = cu.to(logp.device)
    loss, values = _Policy.apply(logp, entropy, spec, known, cu, denominator)
    return loss, named_metrics(values)


class _Policy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, entropy, spec, known, cu, denominator):
        old, advantage, ref, weight, mask = known
        dense = isinstance(advantage, Tensor)
        device, numbers = logp.device, core().Loss(*loss_numbers(spec))
        *apart, own, bonus = divisors(spec, cu, logp.numel(), mask, denominator)
        sizes = (logp.numel(), cu.numel() - 1, spec.reduce == "seq_mean")
        c = torch.empty_like(logp)
        eta = None if entropy is None else torch.empty_like(logp)
        loss, values = (torch.zeros(k, device=device) for k in ((), (10,)))
        items = core().cuda_policy_items(numbers, *sizes, not dense)
        sums = torch.empty(items, core().SUM_COUNT, dtype=torch.float64, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream if logp.is_cuda else 0
        tensors = (
            logp, old, advantage if dense else None, ref, entropy, weight, mask, cu, *apart, c, eta,
            sums, loss, values, ticket(device, stream),
        )  # fmt: skip
        task = core().PolicyTask(*(pointer(x) for x in tensors), *sizes, own, bonus)
        if dense:
            call("policy", logp, numbers, task)
        else:
            scratch = credit_scratch(advantage)
            call("core", logp, numbers, task, credit_task(advantage, cu, scratch))
        ctx.save_for_backward(c, eta)
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    def backward(ctx, grad, _):
        c, eta = ctx.saved_tensors
        return c * grad, None if eta is None else eta * grad, None, None, None, None


def credit_scratch(credit: Any) -> list[Tensor]:
    """What the kernel notes of completions (B, 3), (B,) and steps (S,), one after another."""
    rows = credit.outcome.numel()
    steps = 0 if credit.step_reward is None else credit.step_reward.numel()
    like = {"dtype": torch.float64, "device": credit.outcome.device}
    return [torch.empty(k, **like) for k in (3 * rows, rows, steps)]


def credit_task(credit: Any, cu: Tensor, scratch: list[Tensor]) -> Any:
    if credit.step is not None and os.environ.get("REASONRL_CHECK") == "1":
        check_steps(credit, cu)
    c, paid = credit, credit.token_reward is not None
    tensors = (
        c.outcome, c.group, c.scored, c.token_reward, c.step_reward, c.step_scored, c.step,
        c.step_cu,
    )  # fmt: skip
    return core().CreditTask(
        *(pointer(x) for x in tensors), paid, (FORMS if paid else KINDS)[c.kind], PAYS[c.pay],
        c.by_place, c.divide, c.verl_baseline, c.gamma, c.ddof, c.eps, c.outcome_weight,
        c.process_weight, *(pointer(x) for x in scratch),
    )  # fmt: skip


def credit_advantage(credit: Any, cu: Tensor, mask: Tensor | None) -> Tensor:  # (N,)
    """Outcome against its group, and the worth of steps or tokens against theirs, one launch."""
    tokens = credit.step if credit.token_reward is None else credit.token_reward
    out = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    scratch, cu = credit_scratch(credit), cu.to(tokens.device)
    call(
        "credit_advantage", out, credit_task(credit, cu, scratch), pointer(cu), pointer(mask),
        cu.numel() - 1, pointer(out),
    )  # fmt: skip
    return out


def prime_advantage(
    token_reward: Tensor,  # (N,)
    outcome: Tensor,  # (B,)
    group: Tensor,  # (B,) int64
    cu: Tensor,
    mask: Tensor | None,
    form: str,
    gamma: float,
    ddof: int,
    scored: Tensor | None,  # (B,) bool
    whiten_result: bool,
    verl_baseline: bool,
) -> Tensor:  # (N,)
    """Process returns and outcome against the group, one launch; whitening is torch's."""
    credit = SimpleNamespace(
        outcome=outcome, group=group, scored=scored, token_reward=token_reward.detach(),
        step_reward=None, step_scored=None, step=None, step_cu=None, kind=form, pay="return",
        by_place=False, divide=False, verl_baseline=verl_baseline, gamma=gamma, ddof=ddof, eps=0.0,
        outcome_weight=1.0, process_weight=1.0,
    )  # fmt: skip
    out = credit_advantage(credit, cu, mask)
    if not whiten_result:
        return out
    return whiten(out, counted(cu, mask, scored, out.numel()), 1e-8)


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


def by_step(step: Tensor, n_steps: int) -> tuple[Tensor | None, Tensor]:  # (N,), (S+1,)
    """The tokens in the order of their steps, stably (None: as they lie), and where each step
    starts."""
    ordered, order = step, None
    if not rising(step):
        narrow = step.int() if n_steps < 1 << 31 else step  # half the passes of a radix sort
        ordered, order = torch.sort(narrow, stable=True)
    edges = torch.arange(n_steps + 1, dtype=ordered.dtype, device=step.device)
    return order, torch.searchsorted(ordered, edges)


def rising(step: Tensor) -> bool:
    """Whether no step stands before an earlier one: a wait for the device, cheaper than a sort."""
    if step.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return bool((step[1:] >= step[:-1]).all())


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
        tokens = value.numel()
        return spread(grad.contiguous(), tokens, value, order, offsets, index, ctx.how), *[None] * 3


def spread(grad, tokens: int, value, order, offsets, index, how) -> Tensor:  # (S,) -> (N,)
    """Gradient of the reduction by the values; tokens in no step keep 0."""
    out = torch.zeros(tokens, dtype=grad.dtype, device=grad.device)
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
            return spread(step_value, step.numel(), None, *by_step(step, ctx.steps), None, how)
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
