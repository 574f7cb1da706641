"""The compiled CPU ops of reasonrl._C as differentiable torch functions; see reference.py.

Values come packed, contiguous, float32 and validated: values (N,), `cu` (B+1,) int64, `mask` (N,)
bool or None. Only pointers and sizes cross over. The loss and its gradients come from one call;
backward scales them. Sums are double, in an order fixed by the sizes alone: the same bits for any
number of threads. The ops with a head stand in native_linear.py, rewards to advantages in
native_credit.py. Legend: B completions, N packed tokens, S steps, V vocabulary.
"""

from __future__ import annotations

import importlib
import math
import sys
from array import array
from functools import cache
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RATIOS = {"token": 0, "sequence": 1, "sequence_token": 2}
SURROGATES = {"clip": 0, "cispo": 1, "sapo": 2, "gmpo": 3, "reinforce": 4}
KLS = {"k1": 0, "k2": 1, "k3": 2}
FORMS = {"rloo": 0, "grpo": 1, "reinforce": 2}
PAYS = {"return": 0, "step": 1}
KINDS = {"grpo": 0, "dr_grpo": 1, "rloo": 2}
HOWS = {"sum": 0, "mean": 1, "min": 2, "max": 3, "last": 4, "prod": 5}
RATIO_SUMS = (5, 6, 7)  # SUM_RATIO, SUM_RATIO_MAX, SUM_TOKENS of math.h
METRICS = (
    "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "clip_ratio/dual_mean",
    "kl", "ratio/mean", "ratio/max", "tokens", "nonfinite", "rows/active",
)  # fmt: skip


ELSEWHERE = {
    "native_linear": ("linear_logp", "linear_policy_loss"),
    "native_vocab": ("vocab_grads", "vocab_stats"),
    "native_attention": ("masked_softmax", "slot_attention", "turned_slot_attention"),
    "native_layers": (
        *("rms_norm", "add_rms_norm", "swiglu", "rotary"),
        *("add_rms_norm_", "joined_swiglu"),  # without a gradient, in less memory
    ),
    "native_decoder": ("decoder_layer",),
    "native_chain": ("Chain",),
    "native_draw": ("draw",),
    "native_adamw": ("adamw",),
    "native_decode": ("pack_linears", "DecodeLayer", "WholeDecoder", "DecodeBatch"),
    "native_credit": ("credit_advantage", "prime_advantage", "trust"),
}
FILES = {name: file for file, names in ELSEWHERE.items() for name in names}


def available() -> str | None:
    """None where the ops can run, otherwise what is missing."""
    try:
        core()
    except ImportError as error:
        return (
            f"reasonrl._C is not built ({error}); pip install -e . with a C++17 compiler builds it"
        )
    return None


@cache
def core() -> Any:
    return importlib.import_module("reasonrl._C")


def pointer(x: Tensor | None) -> int:
    return 0 if x is None or x.numel() == 0 else x.data_ptr()


def detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else (x.detach() if x.requires_grad else x).contiguous()


def threads() -> int:
    return torch.get_num_threads()


def logp(
    logits: Tensor,  # (N, V) fp32, bf16 or fp16
    target: Tensor,  # (N,) int64
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """log p of the target and the entropy of softmax(s), s = softcap tanh(u / softcap) / tau."""
    taken, ent = _Logp.apply(logits, target, temperature, softcap or 0.0, entropy)
    return taken, ent if entropy else None


def row_stats(logits: Tensor, target: Tensor, scale: tuple[float, float], entropy: bool):
    """(logp, entropy or None, stats) of a block of rows; the gradient needs `stats` (N, 3)."""
    n = logits.shape[0]
    taken = torch.empty(n, dtype=torch.float32)
    ent = torch.empty(n, dtype=torch.float32) if entropy else None
    stats = torch.empty(n, 3, dtype=torch.float32)
    view = core().Logits(pointer(logits), *logits.shape, DTYPES[logits.dtype], *scale)
    core().logp_forward(
        view, pointer(target), pointer(taken), pointer(ent), pointer(stats), threads()
    )
    return taken, ent, stats


def row_grad(
    logits: Tensor,  # (N, V)
    target: Tensor,
    stats: Tensor,
    scale: tuple[float, float],
    grad_logp: Tensor | None,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    out: Tensor,  # (K, V), may be the front of `logits`
    source: Tensor | None = None,  # (K,) int64, the row behind each row of `out`
) -> Tensor:
    view = core().Logits(pointer(logits), *logits.shape, DTYPES[logits.dtype], *scale)
    core().logp_backward(
        view, pointer(target), pointer(stats), pointer(grad_logp), pointer(grad_entropy),
        pointer(source), out.shape[0], pointer(out), threads(),
    )  # fmt: skip
    return out


class _Logp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, temperature, softcap, entropy):
        ctx.scale = (temperature, softcap)
        ctx.set_materialize_grads(False)
        taken, ent, stats = row_stats(logits, target, ctx.scale, True)
        ctx.save_for_backward(logits, target, stats)
        return taken, ent if entropy else None

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy=None):
        logits, target, stats = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return None, None, None, None, None
        out = torch.empty_like(logits)
        grad_logp, grad_entropy = detached(grad_logp), detached(grad_entropy)
        row_grad(logits, target, stats, ctx.scale, grad_logp, grad_entropy, out)
        return out, None, None, None, None


def loss_numbers(spec: Any) -> tuple[float, ...]:
    """A LossSpec as the fields of Loss in math.h; an option that is off never acts."""
    gmpo = spec.surrogate == "gmpo"
    low, high = -spec.clip_low, spec.clip_high
    return (
        RATIOS[spec.ratio], SURROGATES[spec.surrogate], KLS[spec.kl],
        low if gmpo else 1 + low, high if gmpo else 1 + high,
        math.inf if spec.delta is None else spec.delta,
        math.inf if spec.dual_clip is None else spec.dual_clip,
        spec.kl_coef, spec.entropy_coef, spec.sapo_pos, spec.sapo_neg,
    )  # fmt: skip


def divisors(spec: Any, counts: Tensor, denominator: Any) -> tuple[float, float]:
    """(divisor of the loss, divisor of the entropy part or 0 where it is the same)."""
    apart, divisor = 0.0, denominator
    if spec.reduce == "token_mean":
        divisor = int(counts.sum()) if denominator is None else denominator
    elif denominator is None:
        divisor = counts.numel() * (1 if spec.reduce == "seq_mean" else spec.max_length or 0)
    if spec.entropy_reduce == "token_mean" and spec.reduce != "token_mean":
        apart = float(max(int(counts.sum()), 1))
    return float(divisor) or 1.0, apart


class Policy:
    """One policy loss, given in one piece or in chunks of tokens: `add` each, then `result`."""

    def __init__(self, spec: Any, counts: Tensor, denominator: Any):
        self.spec, self.counts = spec, counts
        self.numbers = core().Loss(*loss_numbers(spec))
        self.divisor = divisors(spec, counts, denominator)
        self.sums = torch.zeros(core().SUM_COUNT, dtype=torch.float64)

    def add(self, logp, old_logp, advantage, ref_logp, entropy, is_weight, mask, cu):
        """dL/dlogp and dL/dentropy of these tokens; `cu` (B+1,) are their completions' offsets.

        advantage: (N,), or the CreditInput of rewards from which it follows (whole completions).
        """
        c = torch.empty_like(logp)
        eta = None if entropy is None else torch.empty_like(logp)
        dense = isinstance(advantage, Tensor)
        tokens = core().PolicyInput(
            logp.numel(), self.counts.numel(), pointer(logp), pointer(old_logp),
            pointer(advantage) if dense else 0, pointer(ref_logp), pointer(entropy),
            pointer(is_weight), pointer(mask), pointer(cu), pointer(self.counts),
            self.spec.reduce == "seq_mean", *self.divisor,
        )  # fmt: skip
        out = (pointer(c), pointer(eta), pointer(self.sums), threads())
        if dense:
            core().policy_loss(self.numbers, tokens, *out)
        else:
            core().credit_loss(self.numbers, tokens, advantage, *out)
        return c, eta

    def left_out(self, tokens: int) -> None:
        """Count unmasked tokens whose only trace is their ratio, 1."""
        if tokens:
            ratio, top, count = RATIO_SUMS
            self.sums[ratio] += tokens
            self.sums[top] = max(1.0, float(self.sums[top]))
            self.sums[count] += tokens

    def result(self) -> tuple[Tensor, Tensor]:  # loss 0-d, metrics (10,)
        loss, low, high, cut, kl, ratio, top, tokens, bad, active = self.sums.tolist()
        n = max(tokens, 1.0)
        values = [low / n, high / n, (low + high) / n, cut / n, kl / n, ratio / n]
        values = array("f", [*values, top, tokens, bad, active / n])
        found = torch.frombuffer(values, dtype=torch.float32)
        return torch.tensor(loss, dtype=torch.float32), found


def count_tokens(mask: Tensor | None, cu: Tensor) -> Tensor:  # (B,) int64
    counts = torch.empty(cu.numel() - 1, dtype=torch.int64)
    core().count_tokens(pointer(mask), pointer(cu), counts.numel(), pointer(counts))
    return counts


def named_metrics(values: Tensor) -> dict[str, Tensor]:
    return dict(zip(METRICS, values.unbind(), strict=True))


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
    """Loss, dL/dlogp, dL/dentropy and metrics in one call; every option of LossSpec is honoured."""
    if isinstance(advantage, Tensor):
        given = advantage.detach()
    else:
        given = importlib.import_module("reasonrl.kernels.native_credit").given(advantage, cu, mask)
    known = [detached(old_logp), given, *map(detached, (ref_logp, is_weight, mask, cu))]
    loss, values = _Policy.apply(logp, entropy, spec, known, denominator)
    return loss, named_metrics(values)


class _Policy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, entropy, spec, known, denominator):
        old, advantage, ref, weight, mask, cu = known
        policy = Policy(spec, count_tokens(mask, cu), denominator)
        c, eta = policy.add(logp, old, advantage, ref, entropy, weight, mask, cu)
        ctx.save_for_backward(c, eta)
        loss, values = policy.result()
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    def backward(ctx, grad, _):
        c, eta = ctx.saved_tensors
        if float(grad) != 1.0:
            c, eta = c * grad, None if eta is None else eta * grad
        return c, eta, None, None, None


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
    core().group_advantage(
        pointer(reward), pointer(group), pointer(scored), reward.numel(), KINDS[kind], ddof, eps,
        pointer(out),
    )  # fmt: skip
    return out


def returns(token_reward: Tensor, cu: Tensor, mask: Tensor | None, gamma: float) -> Tensor:  # (N,)
    """R_t = r_t + gamma R_t+1 within each completion, over its unmasked tokens."""
    return _Returns.apply(token_reward, cu, mask, gamma)


class _Returns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reward, cu, mask, gamma, ahead=False):
        ctx.args = (cu, mask, gamma, ahead)
        out = torch.empty_like(reward)
        core().returns(
            pointer(reward), pointer(cu), pointer(mask), cu.numel() - 1, gamma, ahead,
            pointer(out), threads(),
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, grad):
        cu, mask, gamma, ahead = ctx.args
        return _Returns.apply(grad.contiguous(), cu, mask, gamma, not ahead), None, None, None, None


def whiten(value: Tensor, mask: Tensor | None, eps: float) -> Tensor:  # (N,)
    """(x - mean) / sqrt(unbiased var + eps) over the unmasked values; fewer than two give 0."""
    return _Whiten.apply(value, mask, eps)


class _Whiten(torch.autograd.Function):
    """y = x' / s:  dx = (g - mean(g) - y sum(g y) / (n - 1)) / s over the unmasked values."""

    @staticmethod
    def forward(ctx, value, mask, eps):
        out = torch.empty_like(value)
        args = (pointer(value), pointer(mask), value.numel(), eps, pointer(out), threads())
        core().whiten(*args)
        ctx.save_for_backward(value, mask, out)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, grad):
        value, mask, y = ctx.saved_tensors
        on = torch.ones_like(y, dtype=torch.bool) if mask is None else mask
        n = int(on.sum())
        x, g = (torch.where(on, t.double(), 0.0) for t in (value, grad))
        centred = torch.where(on, x - x.sum() / max(n, 1), 0.0)
        scale = (centred.square().sum() / max(n - 1, 1) + ctx.eps).sqrt()
        pull = (g * y).sum() / max(n - 1, 1) * y
        dx = torch.where(on, (g - g.sum() / max(n, 1) - pull) / scale, 0.0)
        return dx.to(value.dtype), None, None


def step_reduce(value: Tensor, step: Tensor, n_steps: int, how: str) -> Tensor:  # (S,)
    """One value a step; min and max give their gradient to the first of equal values."""
    return _StepReduce.apply(value, step, n_steps, HOWS[how])


class _StepReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, step, n_steps, how):
        out = value.new_empty(n_steps)
        index = torch.empty(n_steps, dtype=torch.int64)
        core().step_reduce(
            pointer(value), pointer(step), value.numel(), n_steps, how, pointer(out),
            pointer(index), threads(),
        )  # fmt: skip
        ctx.save_for_backward(value, step, index)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx, grad):
        value, step, index = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty_like(value)
        core().step_reduce_grad(
            pointer(value), pointer(step), value.numel(), index.numel(), ctx.how, pointer(index),
            pointer(grad), pointer(out), threads(),
        )  # fmt: skip
        return out, None, None, None


def step_expand(step_value: Tensor, step: Tensor, where: str) -> Tensor:  # (S,), (N,) -> (N,)
    """Give every token of a step, or only its last in memory order, the step's value."""
    return _StepExpand.apply(step_value, step, where == "last")


class _StepExpand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step_value, step, last):
        out = step_value.new_empty(step.numel())
        core().step_expand(
            pointer(step_value), pointer(step), step.numel(), step_value.numel(), last,
            pointer(out), threads(),
        )  # fmt: skip
        ctx.save_for_backward(step)
        ctx.last, ctx.steps = last, step_value.numel()
        return out

    @staticmethod
    def backward(ctx, grad):
        (step,) = ctx.saved_tensors
        how = HOWS["last" if ctx.last else "sum"]
        return _StepReduce.apply(grad.contiguous(), step, ctx.steps, how), None, None


def __getattr__(name: str) -> Any:
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file = f"reasonrl.kernels.{FILES[name]}"
    return getattr(sys.modules.get(file) or importlib.import_module(file), name)
