"""`linear_logp` and `linear_policy_loss` on the CPU: torch's matrix products, our epilogue.

u = hidden @ weight.T + bias is made for some rows at a time; the C++ epilogue turns that chunk into
log p, then, in place, into dL/du, from which dX = dU W and dW += dU^T X. With a token ratio
`linear_policy_loss` does this in one pass (6 N D V FLOP); its backward only scales. Sequence ratios
take chunks that end where completions end; one longer than a chunk makes it two passes (8 N D V).
Skipped exactly: before the forward masked rows, and on policy without a reference (so that no
metric needs their log p) rows without advantage; before the two gradient products all rows whose
coefficients are 0. The chunks and their products are native_head.py's.
Legend: N tokens, K rows in use, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonrl.kernels.native import (
    Policy,
    count_tokens,
    detached,
    named_metrics,
    row_stats,
)
from reasonrl.kernels.native_head import Head


def linear_logp(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """log p of the target and the entropy; chunks of logits, made again for the gradient."""
    scale = (temperature, softcap or 0.0)
    taken, ent = _LinearLogp.apply(hidden, weight, bias, target, scale, entropy)
    return taken, ent if entropy else None


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, scale, entropy):
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        head = Head(hidden, weight, bias, scale)
        taken, ent, stats = forward_only(head, target, entropy)
        ctx.save_for_backward(hidden, weight, bias, target, stats)
        return taken, ent

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy=None):
        hidden, weight, bias, target, stats = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return (None,) * 6
        head = Head(hidden, weight, bias, ctx.scale)
        head.want(*ctx.needs_input_grad[:3])
        c = torch.zeros(head.count) if grad_logp is None else grad_logp.contiguous()
        backward_only(head, target, stats, c, detached(grad_entropy))
        return *head.grads(), None, None, None


def forward_only(head: Head, target: Tensor, entropy: bool):
    """(logp, entropy or None, stats) of all rows in use."""
    taken, stats = torch.empty(head.count), torch.empty(head.count, 3)
    ent = torch.empty(head.count) if entropy else None
    for start, end in head.spans():
        u = head.logits(head.inputs(slice(start, end)))
        part = row_stats(u, target[start:end], head.scale, True)
        taken[start:end], stats[start:end] = part[0], part[2]
        if ent is not None:
            ent[start:end] = part[1]
    return taken, ent, stats


def backward_only(head: Head, target: Tensor, stats: Tensor, c: Tensor, eta: Tensor | None) -> None:
    """The gradients for given coefficients; rows without one are dropped before the logits."""
    live = c != 0 if eta is None else (c != 0) | (eta != 0)
    rows = live.nonzero()[:, 0]
    for part in rows.split(head.even(len(rows))) if len(rows) else ():
        whole = part.numel() == int(part[-1]) - int(part[0]) + 1
        pick = slice(int(part[0]), int(part[-1]) + 1) if whole else part
        x = head.inputs(pick)
        given = [None if t is None else t[pick] for t in (target, stats, c, eta)]
        head.grow(head.logits(x), x, *given, int(part[0]) if whole else part)


def linear_policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    old_logp: Tensor | None,
    advantage: Tensor,
    spec: Any,  # a LossSpec
    cu: Tensor,
    mask: Tensor | None,
    ref_logp: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    is_weight: Tensor | None,
    denominator: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of `linear_logp`; one pass gives loss, dX, dW and db, backward scales them."""
    known = [detached(x) for x in (old_logp, advantage, ref_logp, is_weight)]
    scale = (temperature, softcap or 0.0)
    loss, values = _LinearPolicy.apply(
        hidden, weight, bias, target, known, spec, cu, mask, scale, denominator
    )
    return loss, named_metrics(values)


class _LinearPolicy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, known, spec, cu, mask, scale, denominator):
        counts = count_tokens(mask, cu)
        keep = None if mask is None or bool(mask.all()) else mask
        idle = without_effect(hidden, weight, bias, known, spec, cu, keep)
        rows = keep
        if idle is not None:
            rows = ~idle if keep is None else keep & ~idle
        if rows is not None:
            left = count_tokens(rows, cu)
            rows = rows.nonzero()[:, 0]
            target, known = target[rows], [None if x is None else x[rows] for x in known]
            cu = torch.cat([cu[:1] * 0, left.cumsum(0)])
        head = Head(hidden, weight, bias, scale, rows)
        head.want(*ctx.needs_input_grad[:3])
        policy = Policy(spec, counts, denominator)
        policy.left_out(0 if idle is None else int(idle.sum()))
        spans = head.spans() if spec.ratio == "token" else whole_spans(head, cu)
        if spans is None:
            two_passes(head, policy, target, known, cu)
        else:
            one_pass(head, policy, target, known, cu, spans)
        ctx.save_for_backward(*head.grads())
        loss, values = policy.result()
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    def backward(ctx, grad, _):
        unit = float(grad) == 1.0
        grads = [
            None if g is None else g if unit else g * grad.to(g.dtype) for g in ctx.saved_tensors
        ]
        return *grads, None, None, None, None, None, None, None


def without_effect(hidden, weight, bias, known, spec, cu, keep) -> Tensor | None:  # (N,) bool
    """Unmasked rows whose part in loss, gradients and metrics is known before their log p.

    Those with advantage 0 (with a sequence ratio: of completions without any other) where nothing
    else acts: their ratio is 1, they have no KL and no entropy bonus. None where there are none. A
    row or weight that is not finite is left to be found; products that overflow are not foreseen.
    """
    old, advantage, ref, _ = known
    if old is not None or ref is not None or spec.entropy_coef:
        return None
    if int(advantage.count_nonzero()) == advantage.numel():
        return None
    idle = advantage == 0
    if spec.ratio != "token":
        mine = idle if keep is None else idle | ~keep
        busy = count_tokens(~mine, cu)
        idle &= (busy == 0).repeat_interleave(cu.diff(), output_size=len(idle))
    if keep is not None:
        idle &= keep
    if not bool(idle.any()):
        return None
    whole = [weight.sum(dtype=torch.float32)] + ([] if bias is None else [bias.sum()])
    if not all(bool(torch.isfinite(x)) for x in whole):
        return None
    at = idle.nonzero()[:, 0]
    idle[at] = torch.isfinite(hidden[at]).all(-1)
    return idle


def whole_spans(head: Head, cu: Tensor) -> list[tuple[int, int]] | None:
    """Chunks that end where completions end; None where a completion is longer than a chunk."""
    ends = cu.tolist()
    spans, start = [], 0
    for here, following in zip(ends, [*ends[1:], ends[-1]], strict=True):
        if following - here > head.size:
            return None
        if here > start and (following - start > head.size or here == head.count):
            spans.append((start, here))
            start = here
    return spans


def one_pass(head: Head, policy: Policy, target, known, cu, spans) -> None:
    """Each chunk of logits gives its loss and its gradients before the next one takes its place."""
    entropy = policy.spec.entropy_coef != 0
    for start, end in spans:
        x = head.inputs(slice(start, end))
        given, ids, inside = known, target, cu
        if end - start < head.count:
            given = [None if k is None else k[start:end] for k in known]
            ids, inside = target[start:end], (cu.clamp(start, end) - start).contiguous()
        u, (old, advantage, ref, weight) = head.logits(x), given
        taken, ent, stats = row_stats(u, ids, head.scale, entropy)
        c, eta = policy.add(taken, old, advantage, ref, ent, weight, None, inside)
        if head.growing():
            head.grow(u, x, ids, stats, c, eta, start)


def two_passes(head: Head, policy: Policy, target, known, cu) -> None:
    """All log-probabilities first, then the coefficients, then the gradients of the live rows."""
    taken, ent, stats = forward_only(head, target, policy.spec.entropy_coef != 0)
    old, advantage, ref, weight = known
    c, eta = policy.add(taken, old, advantage, ref, ent, weight, None, cu.contiguous())
    if head.growing():
        backward_only(head, target, stats, c, eta)
