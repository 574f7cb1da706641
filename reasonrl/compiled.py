"""The ops as one custom operator, so that `torch.compile(fullgraph=True)` sees a node and never
looks inside.

Used under torch.compile only. An op's arguments are written as a form, one word each, beside lists
of tensors, floats and integers; the operator reads them back and calls the same code as eager mode.
Losses make their gradients with the value, as the fast implementations do anyway; the other ops run
again in backward. Integer values are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LOSSES = ("policy_loss", "linear_policy_loss")
DIFFERENTIABLE = {
    "logp": (0,),
    "linear_logp": (0, 1, 3),
    "policy_loss": (0, 7),
    "linear_policy_loss": (0, 1, 9),
    "returns": (0,),
    "step_reduce": (0,),
    "step_expand": (0,),
    "whiten": (0,),
}
SPEC = (
    "ratio surrogate reduce clip_low clip_high dual_clip delta kl_coef kl entropy_coef "
    "entropy_reduce sapo_pos sapo_neg max_length"
).split()
CREDIT = (
    "outcome group scored token_reward step_reward step_scored step step_cu kind pay by_place "
    "divide verl_baseline gamma ddof eps outcome_weight process_weight"
).split()
METRICS = (
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "clip_ratio/dual_mean",
    "kl",
    "ratio/mean",
    "ratio/max",
    "tokens",
    "nonfinite",
    "rows/active",
)
INSIDE = {"spec": SPEC, "credit": CREDIT}
Eager = Callable[[str, str, tuple], Any]


def bind(eager: Eager) -> Eager:
    """Register the operator over `eager(op, impl, args)`; returns what runs instead while
    compiling."""

    @torch.library.custom_op("reasonrl::forward", mutates_args=())
    def forward(
        op: str, impl: str, form: str, tensors: Sequence[Tensor], floats: Sequence[float],
        ints: Sequence[int],
    ) -> list[Tensor]:  # fmt: skip
        args = read(form, tensors, floats, ints)
        if op not in LOSSES:
            with torch.no_grad():
                return outputs(eager(op, impl, args))
        return apart(lambda: with_grads(eager, op, impl, args))

    @torch.library.custom_op("reasonrl::backward", mutates_args=())
    def backward(
        op: str, impl: str, form: str, tensors: Sequence[Tensor], floats: Sequence[float],
        ints: Sequence[int], grads: Sequence[Tensor],
    ) -> list[Tensor]:  # fmt: skip
        args = read(form, tensors, floats, ints)
        return apart(lambda: again(eager, op, impl, args, list(grads)))

    forward.register_fake(shapes)
    backward.register_fake(
        lambda op, impl, form, tensors, floats, ints, grads: [
            torch.empty_like(x) for x in movable(op, read(form, tensors, floats, ints))
        ]
    )
    forward.register_autograd(slope, setup_context=keep)
    return call


def apart(work: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Run in a thread of its own: inside an operator this thread records no graph."""
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_on, stream, work).result()


def _on(stream: Any, work: Callable[[], list[Tensor]]) -> list[Tensor]:
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        return work()


def with_grads(eager: Eager, op: str, impl: str, args: tuple) -> list[Tensor]:
    leaves, args = fresh(op, args)
    loss, metrics = eager(op, impl, args)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    stacked = torch.stack([metrics[name] for name in METRICS])
    return [loss.detach(), stacked, *zeros(leaves, grads)]


def again(eager: Eager, op: str, impl: str, args: tuple, grads: list[Tensor]) -> list[Tensor]:
    leaves, args = fresh(op, args)
    out = outputs(eager(op, impl, args))
    return zeros(leaves, torch.autograd.grad(out, leaves, grads, allow_unused=True))


def call(op: str, impl: str, args: tuple) -> Any:
    """What an op returns, through the operator."""
    form, tensors, floats, ints = write(args)
    out = torch.ops.reasonrl.forward(op, impl, form, tensors, floats, ints)
    if op in LOSSES:
        metrics = out[1].detach().unbind()
        return out[0], dict(zip(METRICS, metrics, strict=True))
    if op in ("logp", "linear_logp"):
        return out[0], out[1] if len(out) > 1 else None
    return out[0]


def write(args: Sequence[Any]) -> tuple[str, list[Tensor], list[float], list[int]]:
    words, tensors, floats, ints = [], [], [], []
    for x in args:
        if x is None:
            words.append("none")
        elif isinstance(x, Tensor):
            words.append("tensor")
            tensors.append(x)
        elif isinstance(x, str):
            words.append("=" + x)
        elif isinstance(x, bool):
            words.append("true" if x else "false")
        elif isinstance(x, int):
            words.append("int")
            ints.append(x)
        elif isinstance(x, float):
            words.append("float")
            floats.append(x)
        else:
            word = "credit" if hasattr(x, "token_reward") else "spec"
            inner = write([getattr(x, name) for name in INSIDE[word]])
            words += [word, inner[0]]
            tensors += inner[1]
            floats += inner[2]
            ints += inner[3]
    return ",".join(words), tensors, floats, ints


def read(form: str, tensors: Sequence[Any], floats: Sequence[float], ints: Sequence[int]) -> tuple:
    words, t, f, i = iter(form.split(",")), iter(tensors), iter(floats), iter(ints)

    def one(word: str) -> Any:
        if word.startswith("="):
            return word[1:]
        if word in INSIDE:
            return SimpleNamespace(**{name: one(next(words)) for name in INSIDE[word]})
        if word in ("tensor", "float", "int"):
            return next({"tensor": t, "float": f, "int": i}[word])
        return {"none": None, "true": True, "false": False}[word]

    return tuple(one(word) for word in words)


def movable(op: str, args: Sequence[Any]) -> list[Tensor]:
    return [args[i] for i in DIFFERENTIABLE.get(op, ()) if args[i] is not None]


def fresh(op: str, args: Sequence[Any]) -> tuple[list[Tensor], tuple]:
    """The differentiable inputs as leaves of a graph of their own, and the arguments with them."""
    args = list(args)
    places = [i for i in DIFFERENTIABLE.get(op, ()) if args[i] is not None]
    for i in places:
        args[i] = args[i].detach().requires_grad_()
    return [args[i] for i in places], tuple(args)


def outputs(out: Any) -> list[Tensor]:
    return [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]


def zeros(leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    pairs = zip(leaves, grads, strict=True)
    return [torch.zeros_like(x) if g is None else g.contiguous() for x, g in pairs]


def shapes(op, impl, form, tensors, floats, ints) -> list[Tensor]:
    """Empty outputs of the right shape, dtype and device."""
    args = read(form, tensors, floats, ints)
    first = args[0]
    full = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    if op in LOSSES:
        made = [first.new_empty((), dtype=full), first.new_empty((len(METRICS),), dtype=full)]
        return made + [torch.empty_like(x) for x in movable(op, args)]
    if op in ("logp", "linear_logp"):
        return [first.new_empty(first.shape[:1], dtype=full) for _ in range(1 + bool(args[-1]))]
    if op == "credit_advantage":
        tokens = first.step if first.token_reward is None else first.token_reward
        return [first.outcome.new_empty(tokens.shape)]
    if op == "trust":
        return [first.new_empty((3, *first.shape))]
    if op == "step_reduce":
        return [first.new_empty((args[2],))]
    if op == "step_expand":
        return [first.new_empty(args[1].shape)]
    return [torch.empty_like(first)]


def keep(ctx, inputs, output) -> None:
    op, impl, form, tensors, floats, ints = inputs
    ctx.known = (op, impl, form, floats, ints)
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, *(output[2:] if op in LOSSES else ()))


def slope(ctx, grads):
    op, impl, form, floats, ints = ctx.known
    tensors, made = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    places = [
        i for i in DIFFERENTIABLE.get(op, ()) if read(form, tensors, floats, ints)[i] is not None
    ]
    if op in LOSSES:
        found = [(grads[0] * g).to(g.dtype) for g in made]
    elif not places:
        found = []
    else:
        found = torch.ops.reasonrl.backward(
            op, impl, form, list(tensors), floats, ints, list(grads)
        )
    words = read(form, range(ctx.count), floats, ints)  # argument -> place among the tensors
    out: list[Tensor | None] = [None] * ctx.count
    for place, g in zip(places, found, strict=True):
        out[words[place]] = g
    # an empty list counts as a list of tensors, and wants one back
    return None, None, None, out, None if floats else [], None if ints else []
