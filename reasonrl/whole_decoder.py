"""A packed batch through a decoder on a CPU, layer by layer, where each layer is one function
(`whole_layer`) and nobody listens to any module: without the calls of transformers' modules between
them, which a small layer waits for as long as for a product.

    with whole_decoder.direct(): loss_of(batch).backward()

Then a decoder's gradients go straight into the weights' `grad`, without a graph of its layers: for
a process that learns alone, by one `backward` of each loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from reasonrl import angles, attention, cpu_layers, whole_layer
from reasonrl.implementations import native
from reasonrl.watchdog import beat

_direct: ContextVar[bool] = ContextVar("direct", default=False)


@contextlib.contextmanager
def direct() -> Iterator[None]:
    """For what this thread computes meanwhile."""
    token = _direct.set(True)
    try:
        yield
    finally:
        _direct.reset(token)


def computed(
    decoder: Any, ids: Tensor, positions: Tensor, plan: Any, rows: Tensor | None = None
) -> Tensor | None:
    """Last hidden states of ids (L,) at positions (L,): (N, D) of tokens `rows` (N,), which may be
    one several times, or (L, D); None where the modules must. Who is not among them ends with its
    last key."""
    if not isinstance(plan, attention.Packed) or not plan.by_blocks():
        return None
    if torch.compiler.is_compiling() or not cpu_layers.known(decoder):
        return None
    layers = list(decoder.layers)[: decoder.config.num_hidden_layers]
    if decoder.training and any(getattr(x, "gradient_checkpointing", 0) for x in layers):
        return None
    learns = _direct.get() and torch.is_grad_enabled()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not learns):
        x = decoder.embed_tokens(ids[None])
    where = _angles(decoder.rotary_emb, x, positions)
    every = [given for one in layers if (given := whole_layer.asked(one, x, where, plan))]
    if len(every) < len(layers):
        return None
    turn, (asked, back) = whole_layer.turn(where), _asked(rows, len(ids))
    found = _directly(decoder, ids, x.squeeze(0), turn, every, asked) if learns else None
    if found is None:
        x = decoder.embed_tokens(ids[None]) if learns else x
        found = _by_layers(x.squeeze(0), turn, every, asked)
        found = decoder.norm(found)
    return found if back is None else found.index_select(0, back)


def _by_layers(x: Tensor, turn: Any, every: Sequence[Any], asked: Tensor | None) -> Tensor:
    op = native("decoder_layer")
    for i, (known, *parts) in enumerate(every, 1):
        beat()
        x = op(x, *turn, known, *parts, asked if i == len(every) else None)
    return x


def _asked(rows: Tensor | None, count: int) -> tuple[Tensor | None, Tensor | None]:
    """Those tokens, each once and in order, and which of them every row is."""
    if rows is None:
        return None, None
    asked, back = torch.unique(rows, return_inverse=True)
    return (asked, back) if 0 < len(asked) < count else (None, rows)


def _angles(rotary: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:  # (1, L, d) both
    if not angles.fixed(rotary) or not len(positions):
        return rotary(x, positions[None])
    cos, sin = angles.table(rotary, x, int(positions.max()) + 1)
    return cos.index_select(0, positions)[None], sin.index_select(0, positions)[None]


def _directly(
    decoder: Any, ids: Tensor, x: Tensor, turn: Any, every: Sequence[Any], asked: Tensor | None
) -> Tensor | None:
    """By a chain, where all weights are tensors to which nobody listens."""
    table, norm = decoder.embed_tokens, decoder.norm
    layers = [(known, [w for part in parts for w in part]) for known, *parts in every]
    weights = [table.weight, norm.weight, *(w for _, given in layers for w in given)]
    learning = [w for w in weights if w is not None and w.requires_grad]
    if not (
        learning and not any(w._backward_hooks or w._post_accumulate_grad_hooks for w in learning)
        and type(table) is nn.Embedding and all(map(_plain, (table.weight, norm.weight)))
        and table.max_norm is None and not (table.scale_grad_by_freq or table.sparse)
    ):  # fmt: skip
        return None
    padding = -1 if table.padding_idx is None else table.padding_idx
    own = norm.weight, norm.variance_epsilon, padding, asked
    chain = native("Chain")(ids, x, table.weight, turn, layers, *own)
    if not chain.takes():
        return None
    # no weight: a head's words, which are the table's, would wait for the chain then
    return _Directly.apply(torch.empty(0, requires_grad=True), chain)


def _plain(weight: Any) -> bool:
    return weight.dtype == torch.float32 and weight.is_contiguous()


def _learn(weight: Tensor, grad: Tensor) -> None:
    weight.grad = grad if weight.grad is None else weight.grad.add_(grad)


class _Directly(torch.autograd.Function):
    """Called back for the sake of an empty leaf, it serves all weights."""

    @staticmethod
    def forward(ctx, leaf, chain):
        ctx.chain = chain
        return chain.forward(beat)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        chain, ctx.chain = ctx.chain, None
        if chain is None:
            raise RuntimeError(
                "whole_decoder.direct: a loss has one backward here, this is another"
            )
        chain.backward(grad, _learn, beat)
        return None, None
