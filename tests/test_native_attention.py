"""The attention ops: every instruction set against float64 by the rule of test_parity.py, places
that nobody sees poisoned, bits over threads, rows and widths."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_native import isa, native  # noqa: F401, fixtures
from test_parity import within

from reasonrl import implementations
from reasonrl.attention import masked_softmax
from reasonrl.kernels import native_attention, native_layers, reference
from reasonrl.slots import slot_attention

KINDS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [  # rows, query heads, key heads, places, head width
    (3, 9, 3, 70, 64),
    (4, 4, 4, 33, 40),
    (2, 7, 1, 17, 13),
    (2, 6, 2, 49, 128),
    (1, 1, 1, 1, 1),
    (0, 2, 1, 5, 8),
]


def drawn(size, kind, scale=1.0, mixed=True):
    """q, k, v, the slots and lengths of all sorts; NaN stands behind every length."""
    rows, heads, groups, width, d = size
    q, k, v = (torch.randn(rows, h, d) for h in (heads, groups, groups))
    keys, values = torch.randn(2, rows, groups, width, d).to(kind).unbind()
    length = torch.randint(0, width, (rows,))
    length[:2] = torch.tensor([0, width - 1])[: len(length[:2])]
    for b, n in enumerate(length.tolist()):
        keys[b, :, n:], values[b, :, n:] = math.nan, math.nan
    new = (q * scale, k, v.to(kind)) if mixed else tuple(x.to(kind) for x in (q * scale, k, v))
    return *new, keys.clone(), values.clone(), length


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_slots(isa, size, kind):  # noqa: F811
    for scale, mixed in ((1.0, True), (6.0, False)):
        q, k, v, keys, values, length = drawn(size, kind, scale, mixed)
        results = []
        for dtype, impl in ((torch.float64, "reference"), (kind, "reference"), (kind, "native")):
            slots = keys.to(dtype), values.to(dtype)
            wide = dtype == torch.float64  # k and v as they stand in the slots
            a, b, c = (x.double() for x in (q, k.to(kind), v)) if wide else (q, k, v)
            out = slot_attention(a, b, c, *slots, length, 0.3, impl=impl)
            results.append((out, *slots))
        (truth, *_), (yard, *stock), (got, *ours) = results
        assert got.dtype == kind
        own = torch.finfo(kind).eps / 2 * float(truth.abs().max()) if truth.numel() else 0.0
        rounded = 0.0 if kind == torch.float32 else own  # the result is stored in the slots' type
        for b in range(len(length)):
            within(got[b], truth[b], yard[b], 2, rounding=rounded)
        for a, b in zip(ours, stock, strict=True):  # the same token in the same place
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def test_by_hand(isa):  # noqa: F811
    """Scores 0 and log 3 weigh 1/4 and 3/4; two query heads share the keys."""
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    k, v = torch.tensor([[[math.log(3), 0.0]]]), torch.tensor([[[8.0, 80.0]]])
    keys, values = torch.zeros(1, 1, 3, 2), torch.tensor([[[[4.0, 40.0], [9.0, 9.0], [9.0, 9.0]]]])
    out = slot_attention(q, k, v, keys, values, torch.tensor([1]), 1.0, impl="native")
    torch.testing.assert_close(out, torch.tensor([[[7.0, 70.0], [6.0, 60.0]]]))
    assert torch.equal(keys[0, 0, 1], k[0, 0]) and torch.equal(values[0, 0, 1], v[0, 0])
    assert keys[0, 0, [0, 2]].eq(0).all() and values[0, 0, 2].eq(9).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_rows_bits_are_its_own(native, kind):  # noqa: F811
    """Whatever the threads, the other rows and the width of a slot."""
    q, k, v, keys, values, length = drawn((9, 9, 3, 90, 64), kind)
    seen = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        seen.append(
            slot_attention(q, k, v, keys.clone(), values.clone(), length, 0.125, impl="native")
        )
    for b in range(9):
        n = int(length[b]) + 1
        slots = [x[b : b + 1, :, :n].contiguous() for x in (keys, values)]
        q1, k1, v1, n1 = (x[b : b + 1] for x in (q, k, v, length))
        seen.append(slot_attention(q1, k1, v1, slots[0], slots[1], n1, 0.125, impl="native"))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0], torch.cat(seen[3:]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["query", "slot", "one key"])
@pytest.mark.parametrize("size", [13, 64])
def test_a_broken_row_stays_alone(isa, bad, place, size):  # noqa: F811
    """Also where the next row is shorter, in whatever the kernel keeps between two rows."""
    q, k, v, keys, values, _ = drawn((4, 6, 2, 40, size), torch.float32)
    keys, values, length = keys.nan_to_num(), values.nan_to_num(), torch.tensor([30, 15, 1, 39])
    clean = slot_attention(q, k, v, keys.clone(), values.clone(), length, 0.2, impl="native")
    if place == "one key":
        keys[1, -1, 3] = bad
    for broken in {"query": [q], "slot": [keys, values]}.get(place, []):
        broken[1, -1] = bad
    got = slot_attention(q, k, v, keys, values, length, 0.2, impl="native")
    assert got[1, -1].isnan().all()
    assert torch.equal(got[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", [(5, 9, 3, 70, 64), (4, 4, 4, 33, 40), (2, 6, 1, 17, 6)], ids=str)
def test_slots_of_one_product_with_its_angles(isa, size, kind):  # noqa: F811
    """The bits of turning q and k first and then reading them apart."""
    rows, heads, groups, _, d = size
    *_, keys, values, length = drawn(size, kind)
    qkv = torch.randn(rows, (heads + 2 * groups) * d).to(kind)
    turn = torch.rand(rows, d // 2) * 9
    cos, sin = (torch.cat([x, x], -1) for x in (turn.cos(), turn.sin()))
    q, k, v = qkv.view(rows, -1, d).split([heads, groups, groups], 1)
    apart = keys.clone(), values.clone()
    q, k = native_layers.rotary(q, k, cos, sin, kind)
    want = slot_attention(q, k, v.contiguous(), *apart, length, 0.3, impl="native")
    out = native_attention.turned_slot_attention(qkv, cos, sin, keys, values, length, 0.3)
    assert torch.equal(out.view_as(want), want)
    apart = keys.clone(), values.clone()  # heads of a row need not stand together
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    assert torch.equal(native_attention.slot_attention(q, k, v, *apart, length, 0.3), want)
    for mine, theirs in zip((keys, values), apart, strict=True):
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())


def test_what_does_not_fit_is_named():
    args: dict[str, Any] = dict(
        zip("q k v keys values length".split(), drawn(SIZES[0], KINDS[0]), strict=True)
    )
    wrong = {
        "q": (args["q"][:, :8], r"q must be \(B, H, d\) = \(3, a multiple of 3, 64\), got \(3, 8"),
        "k": (args["k"][:, :2], r"k must be \(B, K, d\) = \(3, 3, 64\), got \(3, 2, 64\)"),
        "v": (args["v"].long(), "v must be floating point, got int64"),
        "keys": (args["keys"].transpose(1, 2), r"keys must be \(B, K, W, d\) and contiguous"),
        "values": (args["values"].half(), "values must be float32, got float16"),
        "length": (args["length"] + 1, r"length must lie in \[0, 70\), got 70"),
    }
    for name, (value, text) in wrong.items():
        with pytest.raises(ValueError, match=text):
            slot_attention(**args | {name: value}, scaling=1.0)


def test_float64_is_the_references():
    q, k, v, keys, values, length = (
        x.double() if x.is_floating_point() else x for x in drawn(SIZES[1], KINDS[0])
    )
    again = keys.clone(), values.clone()
    out = slot_attention(q, k, v, keys, values, length, 0.5)
    assert torch.equal(out, reference.slot_attention(q, k, v, *again, length, 0.5))


GRIDS = [  # batch, rows and queries of scores, width, one mask for all
    (3, 2, 12, 6, 37, False),
    (2, 3, 8, 8, 64, True),
    (1, 1, 5, 1, 1, True),
    (2, 1, 3, 3, 200, False),
    (0, 2, 4, 2, 9, False),
]


def scores_of(grid, kind):
    """Scores, what is seen of them, and an upstream gradient; unseen scores are NaN and inf."""
    batch, heads, rows, queries, width, shared = grid
    scores = (4 * torch.randn(batch, heads, rows, width)).to(kind)
    sees = torch.rand(1 if shared else batch, 1, queries, width) > 0.4
    sees[..., width // 2] = True
    unseen = ~sees.repeat(1, 1, rows // queries, 1).expand_as(scores)
    scores[unseen] = torch.tensor([math.nan, math.inf]).to(kind)[
        torch.arange(int(unseen.sum())) % 2
    ]
    return scores, sees, torch.randn(scores.shape).to(kind), unseen


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_softmax_and_its_gradient(isa, grid, kind):  # noqa: F811
    scores, sees, up, unseen = scores_of(grid, kind)
    results = []
    for dtype, impl in ((torch.float64, "reference"), (kind, "reference"), (kind, "native")):
        leaf = scores.to(dtype).requires_grad_()
        weight = masked_softmax(leaf.clone(), sees, 0.3, impl=impl)
        results.append((weight, *torch.autograd.grad(weight, leaf, up.to(dtype))))
    for k, (truth, yard, got) in zip((2, 3), zip(*results, strict=True), strict=True):
        assert got.dtype == kind and got[unseen].eq(0).all()
        size = float(truth.detach().abs().max()) if truth.numel() else 0.0
        # the weights that the gradient reads were rounded to the type, as its result is
        rounding = 0.0 if kind == torch.float32 else torch.finfo(kind).eps * size
        within(got, truth, yard, k, [unseen, ~unseen], rounding=rounding)


def test_softmax_has_the_same_bits_for_any_threads(native):  # noqa: F811
    scores, sees, up, _ = scores_of((7, 3, 24, 12, 130, False), torch.float32)
    seen = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        leaf = scores.clone().requires_grad_()
        weight = masked_softmax(leaf.clone(), sees, 0.3, impl="native")
        seen.append(torch.stack([weight, *torch.autograd.grad(weight, leaf, up)]).detach())
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_score_breaks_its_row_alone(isa, bad):  # noqa: F811
    scores, sees, *_ = scores_of((2, 2, 6, 3, 40, False), torch.float32)
    clean = masked_softmax(scores.clone(), sees, 1.0, impl="native")
    scores[1, 0, 4, 20] = bad
    got = masked_softmax(scores, sees, 1.0, impl="native")
    assert got[1, 0, 4][sees[1, 0, 1]].isnan().all()
    got[1, 0, 4] = clean[1, 0, 4]
    assert torch.equal(got, clean)


def test_masks_that_do_not_fit_are_named():
    scores, sees = torch.zeros(2, 3, 6, 5), torch.ones(2, 1, 3, 5, dtype=torch.bool)
    wanted = r"sees must be \(B or 1, 1, R, S\) = \(2 or 1, 1, a divisor of 6, 5\), got "
    for wrong in (sees[:, :, :0], sees.repeat(2, 1, 1, 1), sees[0], sees.repeat(1, 2, 1, 1)):
        with pytest.raises(ValueError, match=wanted):
            masked_softmax(scores, wrong, 1.0)
    with pytest.raises(ValueError, match="sees must be bool, got float32"):
        masked_softmax(scores, sees.float(), 1.0)
    with pytest.raises(ValueError, match=r"got \(2, 1, 3, 4\)"):
        masked_softmax(scores, sees[..., :4], 1.0)
    with pytest.raises(ValueError, match=r"scores must be \(B, K, N, S\), contiguous"):
        masked_softmax(scores.transpose(1, 2), sees, 1.0)


def test_a_gpu_is_not_expected_to_have_them():
    """Plain attention on a card takes the reference without a warning that a kernel is missing."""
    there = [SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))]
    for op in implementations.ON_A_CPU:
        assert implementations._order(op, there) == ["reference"]
    assert implementations._order("returns", there) == ["cuda", "reference"]
