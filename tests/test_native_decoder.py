"""A decoder layer as one function on the CPU: where packed tokens stand, attention over them
against dense float64 masks, the bits of any number of threads, and what a backward makes again."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from test_native import isa, native  # noqa: F401, fixtures
from test_native_layers import angles
from test_parity import within

from reasonrl import places
from reasonrl.kernels import native_decoder, native_layers, reference
from reasonrl.kernels.decoder import HEADS, NAMES, DecoderLayer, Known, Turn
from reasonrl.kernels.native_products import NativeProducts

FULL, HALF = torch.float32, torch.bfloat16
LAYOUTS: dict[str, Any] = {
    "two groups": [(0, 5, [3, 7, 1]), (16, 2, [4, 0])],
    "a prompt alone": [(0, 6, [])],
    "some without completions": [(0, 3, []), (3, 4, [2, 2]), (11, 1, [])],
    "one token each": [(0, 1, [1])],
    "an empty completion": [(0, 2, [0]), (2, 3, [5, 0])],
    "more than a chunk": [(0, 70, [67, 1, 130])],
    "more than a run": [(0, 3, [100, 90, 2, 1, 191]), (387, 33, [17, 16])],
    "many completions": [(0, 9, [41] * 40)],
    "an empty one in a run of its own at the end": [(0, 3, [200, 0])],
    "no prompt": [(0, 0, [3, 4])],
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
    for number, (start, count, prompt) in enumerate(packing.tolist()):
        asked[start : start + count] += 1
        before = [] if prompt < 0 else packing[prompt].tolist()
        assert not before or (prompt < number and before[2] < 0)  # a prompt, and first
        for i in range(start, start + count):
            seen[i, start : i + 1] += 1
            if before:
                seen[i, before[0] : before[0] + before[1]] += 1
    assert asked.eq(1).all() and torch.equal(seen, dense(layout).long())


def attended(qkv, up, turn, layout, sizes, norms=()):
    """What the kernels make of it: what is seen and the gradients by q, k and v, and by norms."""
    (heads, groups, size), dtype = sizes, qkv.dtype
    known = Known(size, (0.0, 0.0, 0.1), 0.3, dtype, places.packing(layout))
    heads_of = qkv.clone()  # turned in place
    out, kept = native_decoder.attend(heads_of, turn, known, groups, norms)
    assert not norms or torch.equal(heads_of, qkv)
    given = up.flatten(1), heads_of, out, kept, turn, known, groups, norms
    grad, by_norms = native_decoder.attend_grad(*given, bool(norms))
    found = [out.unflatten(1, (heads, size)), *split(grad, sizes)]
    if norms:
        again, none = native_decoder.attend_grad(*given, False)
        assert torch.equal(again, grad) and none == (None, None)
    return found + ([*by_norms] if norms else [])


def split(x, sizes):
    heads, groups, size = sizes
    widths = [heads * size, groups * size, groups * size]
    return [part.unflatten(1, (-1, size)) for part in x.split(widths, 1)]


def drawn(layout, sizes, kind):
    (heads, groups, size), total = sizes, length(layout)
    qkv = torch.randn(total, (heads + 2 * groups) * size).to(kind)
    return qkv, torch.randn(total, heads, size).to(kind), Turn(*angles(total, size))


@pytest.fixture(params=[True, False], ids=["dots", "no dots"])
def dots(request, native, monkeypatch):  # noqa: F811
    if request.param and not native.core().has_dots():
        pytest.skip("this CPU has no instruction for pairs of bf16")
    monkeypatch.setattr(native_decoder, "DOTS", request.param)


@pytest.mark.parametrize("kind", [FULL, HALF, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(9, 3, 64), (4, 4, 6), (2, 1, 16), (3, 3, 40)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_packed_attention_and_its_gradients(isa, layout, sizes, kind):  # noqa: F811
    compare(layout, sizes, kind)


@pytest.mark.parametrize("sizes", [(9, 3, 64), (4, 4, 6), (2, 1, 18), (2, 1, 72)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_packed_attention_by_either_product(dots, layout, sizes):
    compare(layout, sizes, HALF)


@pytest.mark.parametrize("kind", [FULL, HALF, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(4, 2, 16), (3, 3, 10), (6, 1, 64)], ids=str)
@pytest.mark.parametrize("layout", ["two groups", "more than a chunk", "a prompt alone"])
def test_heads_that_are_normed(isa, layout, sizes, kind):  # noqa: F811
    compare(LAYOUTS[layout], sizes, kind, [torch.randn(sizes[2]) + 1 for _ in range(2)])


def compare(layout, sizes, kind, norms=()):
    (heads, groups, _), sees = sizes, dense(layout)
    qkv, up, (cos, sin) = drawn(layout, sizes, kind)

    def plain(dtype):
        leaf = qkv.to(dtype).requires_grad_()
        own = [w.to(torch.promote_types(dtype, FULL)).requires_grad_() for w in norms]
        q, k, v = split(leaf, sizes)
        if own:  # as its modules: their result is fp32
            q, k = (
                reference.rms_norm(x, w, 0.1, w.dtype) for x, w in zip((q, k), own, strict=True)
            )
        q, k = reference.rotary(q, k, cos.to(dtype), sin.to(dtype), dtype)
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * 0.3
        p = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        out = torch.einsum("hij,jhd->ihd", p, v)
        grad, *by_norms = torch.autograd.grad(out, [leaf, *own], up.to(dtype))
        return [out.detach(), *(x.detach() for x in split(grad, sizes)), *by_norms]

    found = attended(qkv, up, Turn(cos, sin), layout, sizes, norms)
    for i, (truth, yard, got) in enumerate(
        zip(plain(torch.float64), plain(kind), found, strict=True)
    ):
        assert got.dtype == (kind if i < 4 else FULL)
        # q, k, the weights, the gradients of scores: each is rounded to the type
        extra = 0.0 if kind == FULL else 2 * torch.finfo(kind).eps * float(truth.abs().max())
        within(got, truth, yard, 3, rounding=extra, scale=float(truth.abs().max()) * 4)


@pytest.mark.parametrize("kind", [FULL, HALF], ids=str)
def test_attention_has_the_same_bits_for_any_threads(native, kind):  # noqa: F811
    sizes, layout = (4, 2, 6), LAYOUTS["more than a run"]
    given, seen = drawn(layout, sizes, kind), []
    norms = [torch.randn(6), torch.randn(6)]
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        seen.append(attended(*given, layout, sizes) + attended(*given, layout, sizes, norms))
    for one, two, again in zip(*seen, strict=True):
        assert torch.equal(one, two) and torch.equal(one, again)


@pytest.mark.parametrize("kind", [FULL, HALF, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_key_that_is_not_finite_concerns_those_who_see_it(isa, bad, kind):  # noqa: F811
    """The others keep their bits, of those beside it in a block as well."""
    layout, sizes = [(0, 5, [20, 3]), (28, 4, [6])], (2, 1, 6)
    qkv, up, turn = drawn(layout, sizes, kind)
    clean = attended(qkv, up, turn, layout, sizes)
    for token in (7, 2):  # of a completion, of a prompt
        broken = qkv.clone()
        split(broken, sizes)[1][token] = bad
        found = attended(broken, up, turn, layout, sizes)
        sees, blind = dense(layout)[:, token], ~dense(layout)[:, token]
        assert found[0][sees].isnan().all() and torch.equal(found[0][blind], clean[0][blind])
        apart = torch.arange(length(layout)) >= 28  # another group
        for got, want in zip(found[1:], clean[1:], strict=True):
            assert torch.equal(got[apart], want[apart])


@pytest.mark.parametrize("kind", [FULL, HALF], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_beyond_any_number_is_seen(isa, sign, kind):  # noqa: F811
    qkv = torch.zeros(2, 6)  # one head
    qkv[1, 0], qkv[0, 2] = 1e30, sign * 1e30
    turn = Turn(torch.ones(2, 2), torch.zeros(2, 2))
    out, *_ = attended(qkv.to(kind), torch.ones(2, 1, 2).to(kind), turn, [(0, 2, [])], (1, 1, 2))
    assert out[0].eq(0).all() and out[1].isnan().all()


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
    assert by is not None and torch.equal(out, want[0]) and torch.equal(by, want[1])


KINDS = {
    "plain": (False, False),
    "biases and norms of heads": (True, True),
    "biases": (True, False),
}


def layer_of(sizes, biased, normed):
    """Input, angles, what was asked of the layer and what it is made of, in the order of NAMES."""
    heads, groups, size, width, inner = sizes
    layout = LAYOUTS["two groups" if width < 20 else "more than a chunk"]
    shapes = [(heads * size, width), *2 * [(groups * size, width)], (width, heads * size)]
    shapes += [(inner, width), (inner, width), (width, inner)]
    weights = [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes]
    norms = [torch.randn(width) + 1 for _ in range(2)]
    given = [norms[0], *weights[:4], norms[1], *weights[4:]]
    # q has one, k none
    given += [torch.randn(n) if biased and i != 1 else None for i, (n, _) in enumerate(shapes)]
    given += [torch.randn(size) + 1 if normed else None for _ in range(2)]
    x = torch.randn(length(layout), width)
    return x, Turn(*angles(len(x), size)), places.packing(layout), given


def contains(part, name):
    return part in name


def computed(by, case, dtype, learns, how, rows=None):
    """The output, or those rows of it, the gradient by the input and by all that learns; None for
    the rest. how: what is between, or who is asked."""
    x, turn, packing, given = case
    known = Known(turn.cos.shape[1], (0.1, 0.2, 0.3), 0.3, dtype, packing)
    leaves = [x, *given]
    leaves = [
        None if t is None else t.clone().requires_grad_(i == 0 or learns(NAMES[i - 1]))
        for i, t in enumerate(leaves)
    ]
    y = by.apply(leaves[0], *turn, known, how, *leaves[1:])
    y = y if rows is None else y.index_select(0, rows)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return y.detach(), *(None if t is None else t.grad for t in leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("sizes", [(4, 2, 6, 10, 22), (3, 1, 18, 34, 14)], ids=str)
def test_a_layer_in_one_call_is_its_kernels_to_the_bit(isa, sizes, dtype, kind):  # noqa: F811
    """The layer that decoder.py makes of the same kernels; where a part learns, that part alone."""
    if dtype == HALF and not native_decoder.core().has_dots():
        pytest.skip("this instruction set has no products of bf16")
    case = layer_of(sizes, *KINDS[kind])
    between = native_decoder.BETWEEN._replace(products=NativeProducts)
    for part in ("", "norm", "q", "up", "o", "down_bias", "v_bias", "k_norm"):
        known = case, dtype, partial(contains, part)
        found = computed(native_decoder.Whole, *known, None)
        wanted = computed(DecoderLayer, *known, between)
        for name, got, want in zip(("y", "x", *NAMES), found, wanted, strict=True):
            if got is None or want is None:
                assert got is want, name
            elif "bias" in name or name in HEADS:  # torch's sums
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
            else:
                assert torch.equal(got, want), name


ASKED = {
    "the first": [0],
    "the last": [-1],
    "some": [1, 2, 5, 6, 11, 20],
    "all but the first": range(1, 300),
    "all but the last": range(-300, -1),
}
BEHIND = ("norm2", "o", "gate", "up", "down")  # the attention: their sums have other rows


@pytest.mark.parametrize("who", ASKED)
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("sizes", [(4, 2, 6, 10, 22), (3, 1, 18, 34, 14)], ids=str)
def test_tokens_that_are_asked_for_alone(isa, sizes, dtype, who):  # noqa: F811
    """As those of all tokens of which the others get no gradient."""
    if dtype == HALF and not native_decoder.core().has_dots():
        pytest.skip("this instruction set has no products of bf16")
    case, every = layer_of(sizes, True, True), (dtype, lambda name: True)
    count = len(case[0])
    asked = torch.tensor([i % count for i in ASKED[who] if -count <= i < count])
    found = computed(native_decoder.Whole, case, *every, asked)
    wanted = computed(native_decoder.Whole, case, *every, None, asked)
    for name, got, want in zip(("y", "x", *NAMES), found, wanted, strict=True):
        if got is None or want is None:
            assert got is want, name
        elif name.removesuffix("_bias") in BEHIND:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(got, want), name


@pytest.mark.parametrize("asked", [None, [0, 1, 9, 15, 20]], ids=["all", "some"])
def test_a_layer_in_one_call_has_the_same_bits_for_any_threads(native, asked):  # noqa: F811
    asked = asked and torch.tensor(asked)
    case, seen = layer_of((4, 2, 6, 10, 22), True, True), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seen.append(computed(native_decoder.Whole, case, FULL, lambda name: True, asked))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_layers_share_bytes_that_grow():
    scratch = native_decoder.Scratch()
    first = scratch.of(6)
    assert scratch.of(4) is first and len(scratch.of(9)) == 9 and len(scratch.of(2)) == 9
    assert len(native_decoder.Scratch().of(1)) == 1


@pytest.mark.parametrize("fast", [True, False])
def test_which_way_a_layer_goes(native, fast, monkeypatch):  # noqa: F811
    """By torch's products where those are faster."""
    x, turn, packing, given = layer_of((4, 2, 6, 10, 22), True, False)
    monkeypatch.setattr(native_decoder, "fast", lambda *of: fast)
    ways = []
    for by in (native_decoder.Whole, DecoderLayer):
        monkeypatch.setattr(by, "apply", partial(lambda by, *of: (ways.append(by), of)[1], by))
    known, asked = (6, (0.1, 0.2, 0.3), 0.3, FULL, packing), torch.tensor([1, 4])
    native_decoder.decoder_layer(x, *turn, known, given[:9], given[9:16])
    assert ways == [native_decoder.Whole if fast else DecoderLayer]
    monkeypatch.undo()
    every = native_decoder.decoder_layer(x, *turn, known, given[:9], given[9:16])
    monkeypatch.setattr(native_decoder, "fast", lambda *of: fast)
    some = native_decoder.decoder_layer(x, *turn, known, given[:9], given[9:16], asked=asked)
    torch.testing.assert_close(some, every[asked], rtol=1e-5, atol=1e-5)
