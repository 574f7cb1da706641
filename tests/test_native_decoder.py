"""A decoder layer as one function on the CPU: where packed tokens stand, attention over them
against dense float64 masks, and what a backward makes again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_native import isa, native  # noqa: F401, fixtures
from test_native_layers import angles
from test_parity import within

from reasonrl import places
from reasonrl.kernels import native_decoder, native_layers, native_packed, reference
from reasonrl.kernels.native_packed import Heads

FULL, HALF = torch.float32, torch.bfloat16
LAYOUTS: dict[str, Any] = {
    "two groups": [(0, 5, [3, 7, 1]), (16, 2, [4, 0])],
    "a prompt alone": [(0, 6, [])],
    "some without completions": [(0, 3, []), (3, 4, [2, 2]), (11, 1, [])],
    "one token each": [(0, 1, [1])],
    "an empty completion": [(0, 2, [0]), (2, 3, [5, 0])],
}


def length(layout) -> int:
    return sum(count + sum(sizes) for _, count, sizes in layout)


def dense(layout) -> torch.Tensor:
    """Whether token i sees token j, one at a time."""
    sees = torch.zeros(length(layout), length(layout), dtype=torch.bool)
    for start, count, sizes in layout:
        for i in range(start, start + count):
            sees[i, start : i + 1] = True
        at = start + count
        for size in sizes:
            for i in range(at, at + size):
                sees[i, start : start + count] = True
                sees[i, at : i + 1] = True
            at += size
    return sees


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_token_stands_where_it_sees_what_it_may(layout):
    packing, total = places.packing(layout), length(layout)
    seen = torch.zeros(total, total, dtype=torch.long)
    asked = torch.zeros(total, dtype=torch.long)
    for part in packing.parts:
        sees = part.sees.expand(len(part.queries), -1, -1, -1)[:, 0]
        assert sees.any(-1).all()  # also of places without a token: no row of weights is 0 / 0
        for n, row in enumerate(part.queries.tolist()):
            for w, token in enumerate(row):
                if token < 0:
                    continue
                asked[token] += 1
                for s, key in enumerate(part.keys[n].tolist()):
                    if sees[n, w, s]:
                        assert key >= 0  # a place without a token is not seen
                        seen[token, key] += 1
    assert asked.eq(1).all() and torch.equal(seen, dense(layout).long())
    for back, name in ((packing.queries, "queries"), (packing.keys, "keys")):
        first, place = back
        flat = [getattr(part, name).flatten() for part in packing.parts]
        for token in range(total):
            mine = place[first[token] : first[token + 1]].tolist()
            want = [
                2 * at + p
                for p, x in enumerate(flat)
                for at in (x == token).nonzero()[:, 0].tolist()
            ]
            assert sorted(mine) == sorted(want) and mine


@pytest.mark.parametrize("kind", [FULL, HALF], ids=str)
@pytest.mark.parametrize("sizes", [(9, 3, 64), (4, 4, 6), (2, 1, 16)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_packed_attention_and_its_gradients(isa, layout, sizes, kind):  # noqa: F811
    (heads, groups, size), total, sees = sizes, length(layout), dense(layout)
    qkv = torch.randn(total, (heads + 2 * groups) * size).to(kind)
    cos, sin = angles(total, size)
    up = torch.randn(total, heads, size).to(kind)
    widths = [heads * size, groups * size, groups * size]

    def split(x):
        return [part.unflatten(1, (-1, size)) for part in x.split(widths, 1)]

    def plain(dtype):
        leaf = qkv.to(dtype).requires_grad_()
        q, k, v = split(leaf)
        q, k = reference.rotary(q, k, cos.to(dtype), sin.to(dtype), dtype)
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * 0.3
        p = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        out = torch.einsum("hij,jhd->ihd", p, v)
        (grad,) = torch.autograd.grad(out, leaf, up.to(dtype))
        return [out.detach(), *(x.detach() for x in split(grad))]

    packing = places.packing(layout)

    def turned(x):
        q, k, v = split(x)
        return Heads(q, cos, sin), Heads(k, cos, sin), Heads(v)

    out, weights = native_packed.attend(*turned(qkv), packing, 0.3)
    into = torch.full_like(qkv, torch.nan)
    native_packed.attend_grad(up, *turned(qkv), weights, packing, 0.3, split(into))
    found = [out, *split(into)]
    for truth, yard, got in zip(plain(torch.float64), plain(kind), found, strict=True):
        assert got.dtype == kind
        # q, k, the scores, their weights, their gradients and sums: each is rounded to the type
        extra = 0.0 if kind == FULL else 2 * torch.finfo(kind).eps * float(truth.abs().max())
        within(got, truth, yard, 3, rounding=extra, scale=float(truth.abs().max()) * 4)


@pytest.mark.parametrize("kept", [0, 1 << 24])
@pytest.mark.parametrize("together, runs", [(1, 12), (300, 9), (700, 3)])
def test_products_in_runs_and_weights_made_again(native, monkeypatch, together, runs, kept):  # noqa: F811
    """The same numbers, a run at a time, by whole blocks or by one key head of a block."""
    layout = [(0, 5, [3, 7, 1]), (16, 2, [4])]
    (heads, groups, size), total = (4, 2, 6), length(layout)
    qkv, up = torch.randn(total, heads + 2 * groups, size), torch.randn(total, heads, size)
    turn, packing = angles(total, size), places.packing(layout)
    q, k, v = qkv.split([heads, groups, groups], 1)
    given = Heads(q, *turn), Heads(k, *turn), Heads(v)
    made, soften = [], native_packed.Run.soften
    monkeypatch.setattr(
        native_packed.Run, "soften", lambda run, *x: made.append(run.at) or soften(run, *x)
    )

    def both():
        out, weights = native_packed.attend(*given, packing, 0.3)
        into = torch.full_like(qkv, torch.nan)
        parts = into.split([heads, groups, groups], 1)
        native_packed.attend_grad(up, *given, weights, packing, 0.3, parts)
        return out, into, weights

    *want, weights = both()
    assert len(made) == len(weights) == 2
    made.clear()
    monkeypatch.setattr(native_packed, "TOGETHER", together)
    monkeypatch.setattr(native_packed, "KEPT", kept)
    *found, weights = both()
    assert len(weights) == (len(made) if kept else 0)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert len(made) == runs * (1 if kept else 2) and made[:runs] == made[-runs:]


def test_unturned_heads_keep_their_bits(isa):  # noqa: F811
    """Spread and summed back, each row is itself as often as it stands somewhere."""
    x = torch.randn(7, 3, 10)[:, :2]  # rows further apart than their heads are wide
    place = torch.tensor([[0, 3, -1], [6, 3, 1]])
    blocks = Heads(x).spread(place)
    assert torch.equal(blocks[0, :, 1], x[3]) and blocks[0, :, 2].eq(0).all()
    first = torch.tensor([0, 1, 2, 2, 4, 4, 4, 5])
    entry = torch.tensor([2 * 0, 2 * 5, 2 * 1, 2 * 4, 2 * 3])
    out = torch.full((7, 2, 10), torch.nan)
    Heads(out).gather([blocks], (first, entry))
    times = torch.tensor([1.0, 1.0, 0.0, 2.0, 0.0, 0.0, 1.0])
    assert torch.equal(out, x * times[:, None, None])


@pytest.mark.parametrize("kind", [FULL, HALF, torch.float16], ids=str)
def test_a_backward_makes_again_what_the_forward_gave(isa, kind):  # noqa: F811
    both, grad = torch.randn(70, 2 * 1500).to(kind), torch.randn(70, 1500).to(kind)
    by_both, again = native_decoder.gate_grad(both, grad)
    assert torch.equal(again, native_layers.joined_swiglu(both))
    gate, up = (x.contiguous().requires_grad_() for x in both.chunk(2, 1))
    want = torch.autograd.grad(native_layers.swiglu(gate, up), (gate, up), grad)
    assert torch.equal(by_both, torch.cat(want, 1))

    x, weight, beside = torch.randn(70, 40) * 3, torch.randn(40), torch.randn(70, 40)
    y, total, scale = native_decoder.norm(x, None, weight, 1e-3, kind)
    above = grad[:, :40].contiguous()
    out, narrow, again, by = native_decoder.norm_grad(total, weight, scale, above, beside, True)
    assert torch.equal(again, y) and torch.equal(narrow, out.to(kind))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    want = native_layers.add_rms_norm(x, torch.zeros_like(x), weight, 1e-3, kind)
    want = torch.autograd.grad(want, (x, weight), (beside, above))
    assert torch.equal(out, want[0]) and torch.equal(by, want[1])
