"""Numerics of a GPU's layers and decoding: in the interpreter, run by test_triton.py in a process
of its own, and on a GPU, by test_gpu.py.

Against float64 truth by the rule of test_parity.py; fp32 only (the interpreter's bf16 products are
wrong). Torch's flash kernels are restated by what they promise: rows that a call has nothing for
are NaN. Outputs start as NaN.
"""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
import triton
import triton.language as tl
from test_flash import cut, probabilities
from test_native_decoder import dense
from torch.nn.functional import silu
from triton_cases import DEVICE, RUN_HERE, device, within  # noqa: F401, a fixture

from reasonrl import calls, gpu_layers, lean, sampling
from reasonrl.attention import Packed
from reasonrl.kernels import draw, gpu_decoder, layers, packed, reference, slots
from reasonrl.kernels import turn as turns
from reasonrl.products import Cast, Joined
from reasonrl.slots import Slots

pytestmark = [
    pytest.mark.skipif(not RUN_HERE, reason="run by test_triton.py and test_gpu.py"),
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
FULL = torch.float32
LAYOUTS: dict[str, Any] = {
    "two groups": [(0, 5, [3, 1, 0, 7]), (16, 2, [4, 4])],
    "some without completions": [(0, 4, []), (4, 1, [2]), (7, 3, [0, 0])],
    "a prompt alone": [(0, 6, [])],
}
SIZES = [(4, 4, 6), (8, 2, 16), (9, 3, 40)]  # query heads, key heads, head size


def wide(*given):
    return [x.double() for x in given]


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("width", [1, 16, 37, 300])
def test_norms_and_their_gradients(width, added, monkeypatch):
    monkeypatch.setattr(layers, "SHARES", 3)
    for rows in (1, 2, 7):
        x, weight = torch.randn(rows, width) * 3, torch.randn(width)
        delta = torch.randn(rows, width) if added else None
        g, beside = torch.randn(rows, width), torch.randn(rows, width)
        y, total, scale = layers.norm(x, delta, weight, 1e-3, FULL)
        assert torch.equal(total, x if delta is None else x + delta)
        found = [y, *layers.norm_grad(total, weight, scale, g, beside, True)]

        def plain(kind, total=total, weight=weight, g=g, beside=beside):
            leaf, w = (t.to(kind).requires_grad_() for t in (total, weight))
            y = reference.rms_norm(leaf, w, 1e-3, kind)
            by_x, by_w = torch.autograd.grad(y, (leaf, w), g.to(kind))
            out = by_x + beside.to(kind)
            return [y, out, out, y, by_w]

        for truth, yard, got in zip(plain(torch.float64), plain(FULL), found, strict=True):
            within(truth, yard, got, 3, scale=float(g.abs().max()) * math.sqrt(width))
        assert layers.norm_grad(total, weight, scale, g, beside, False)[-1] is None
        here = x.clone()
        assert torch.equal(layers.add_rms_norm_(here, delta, weight, 1e-3, FULL), y)
        assert torch.equal(here, total)
    assert layers.norm(torch.zeros(0, width), None, weight, 1e-3, FULL)[0].shape == (0, width)


@pytest.mark.parametrize("width", [1, 33, 1500])
def test_a_gate_and_its_gradients(width):
    both, g = torch.randn(5, 2 * width) * 3, torch.randn(5, width)
    both[0, 0], both[1, 0] = 100.0, -100.0
    out, again = layers.gate_grad(both, g)

    def plain(kind):
        leaf = both.to(kind).requires_grad_()
        a, b = leaf.chunk(2, -1)
        made = silu(a) * b
        return [made, made, *torch.autograd.grad(made, leaf, g.to(kind))]

    found = [layers.gate(both), again, out]
    for truth, yard, got in zip(plain(torch.float64), plain(FULL), found, strict=True):
        within(truth, yard, got, 3)


def angles(tokens: int, size: int):
    """Of halves that are turned alike, as transformers makes them."""
    x = torch.randn(tokens, size // 2)
    return torch.cat([x.cos()] * 2, -1), torch.cat([x.sin()] * 2, -1)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("few", [1, 30, 999], ids=["whole", "some parts", "parts"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_new_token_is_placed_and_sees_its_row(sizes, few, normed, monkeypatch):
    (heads, groups, size), rows, width = sizes, 4, 300
    monkeypatch.setattr(slots, "FEW", few)
    monkeypatch.setattr(slots, "PART", 64)
    assert slots.split(rows * groups, width) == {1: 1, 30: 1 if groups == 4 else 2, 999: 4}[few]
    qkv = torch.randn(rows, (heads + 2 * groups) * size)
    cos, sin = angles(rows, size)
    kept = [torch.randn(rows, width, groups, size) for _ in range(2)]
    length = torch.tensor([0, 64, 131, 299])
    for b, n in enumerate(length.tolist()):  # nothing behind a row's own end is read
        kept[0][b, n:] = kept[1][b, n:] = torch.nan
    norms = (torch.randn(size), torch.randn(size)) if normed else ()
    given = [x.clone() for x in kept]
    out = slots.place_and_attend(qkv, cos, sin, *kept, length, 0.3, norms, 1e-3)

    def plain(kind):
        q, k, v = (
            x.to(kind).unflatten(1, (-1, size))
            for x in qkv.split([heads * size, groups * size, groups * size], 1)
        )
        if normed:
            q = reference.rms_norm(q, norms[0].to(kind), 1e-3, kind)
            k = reference.rms_norm(k, norms[1].to(kind), 1e-3, kind)
        q, k = reference.rotary(q, k, cos.to(kind), sin.to(kind), kind)
        seen = []
        for b, n in enumerate(length.tolist()):
            keys, values = (
                torch.cat([x[b, :n].to(kind), new[b : b + 1]]).repeat_interleave(heads // groups, 1)
                for x, new in zip(given, (k, v), strict=True)
            )
            p = torch.einsum("hd,nhd->hn", q[b] * 0.3, keys).softmax(-1)
            seen.append(torch.einsum("hn,nhd->hd", p, values))
        return [torch.stack(seen).flatten(1), k, v]

    at = torch.arange(rows)
    found = [out, kept[0][at, length], kept[1][at, length]]
    for truth, yard, got in zip(plain(torch.float64), plain(FULL), found, strict=True):
        within(truth, yard, got, 3, scale=float(truth.abs().max()) * 4)
    for before, after in zip(given, kept, strict=True):
        after[at, length] = before[at, length]
        assert torch.equal(after.nan_to_num(7), before.nan_to_num(7))  # nothing else was written


def test_parts_are_by_shapes_alone():
    assert slots.split(128, 4096) == 2 and slots.split(4, 8192) == 16
    assert slots.split(4, 255) == slots.split(4, 511) == slots.split(300, 9000) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("vocab", [1, 2, 17, 64, 65, 1000])
def test_a_token_is_where_the_sum_passes_the_uniform_number(vocab, temperature, monkeypatch):
    monkeypatch.setattr(draw, "BLOCK", 64)
    x = torch.randn(40, vocab) * torch.logspace(-1, 1.3, 40)[:, None]
    x[::3, vocab // 2 + 1 :: 5] = x[::3, max(1, vocab - 1) :] = -math.inf
    uniform = torch.rand(40, dtype=torch.float64)
    uniform[0], uniform[1::2] = 0.0, 1.0 - 2.0**-53  # some ends lie at words that are impossible
    token, logp = draw.draw(x, uniform, temperature)
    p = (x.double() / temperature).softmax(-1)
    own = p.gather(1, token[:, None])[:, 0]
    ends = p.cumsum(-1).gather(1, token[:, None])[:, 0]
    assert (own > 0).all()
    assert (ends > uniform - 1e-6).all() and (ends - own <= uniform + 1e-6).all()
    assert torch.allclose(logp.double(), own.log(), rtol=0, atol=2e-5)


@triton.jit
def first_kernel(ends_ptr, mass_ptr, aim_ptr, out_ptr):
    row, at = tl.program_id(0), tl.arange(0, 8)
    ends, mass = tl.load(ends_ptr + at), tl.load(mass_ptr + at)
    tl.store(out_ptr + row, draw.first(ends, mass, tl.load(aim_ptr + row), at, 8))


def test_a_word_of_no_mass_is_never_drawn_where_a_scan_falls_or_rises():
    """Ends as a tree may round them."""
    mass = torch.tensor([0.0, 0.25, 0.0, 0.25, 0.0, 0.5, 0.0, 0.0])
    ends = torch.tensor([0.0, 0.25, 0.26, 0.5, 0.49, 1.0, 1.01, 0.99])
    aims = [0.0, 0.2, 0.255, 0.4, 0.5, 1.0, 1.005, 1.02]
    aim, out = torch.tensor(aims), torch.zeros(8, dtype=torch.int32)
    first_kernel[(8,)](ends, mass, aim, out)
    assert out.tolist() == [1, 1, 3, 3, 5, 5, 5, 5]
    plain = sampling._first(ends.expand(8, -1), mass.expand(8, -1), aim[:, None])
    assert plain[:, 0].tolist() == out.tolist()


def test_tokens_are_drawn_as_often_as_is_meant(monkeypatch):
    monkeypatch.setattr(draw, "BLOCK", 64)
    at = torch.arange(256, dtype=torch.float64)  # every word's border, and every block's
    token, _ = draw.draw(torch.zeros(256, 256), at / 256, 1.0)
    assert torch.equal(token, at.long())
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    count = 400
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    token, _ = draw.draw(p.log().expand(count, -1).contiguous(), uniform, 1.0)
    assert torch.allclose(torch.bincount(token, minlength=5) / count, p, atol=5e-3)


@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf"])
def test_a_row_without_a_distribution_is_said_alone(bad, monkeypatch):
    monkeypatch.setattr(draw, "BLOCK", 64)
    x, uniform = torch.randn(5, 150), torch.full((5,), 0.7, dtype=torch.float64)
    clean = draw.draw(x, uniform, 0.9)
    x[2] = -math.inf
    if bad != "all -inf":
        x[2, :] = 0.0
        x[2, 130] = float(bad)
    token, logp = draw.draw(x, uniform, 0.9)
    assert logp[2].isnan() and token[2] == 0
    others = torch.arange(5) != 2
    assert torch.equal(token[others], clean[0][others])
    assert torch.equal(logp[others], clean[1][others])


# torch's flash kernels, by what they promise


def forward(q, k, v, part, causal, scaling):
    assert part.asks.dtype == part.asked.dtype == torch.int32
    most = int(part.asks.diff().max()), int(part.asked.diff().max())
    assert all(map(int.__le__, most, part.most))
    assert int(part.asks[-1]) == len(q) and int(part.asked[-1]) == len(k) == len(v)
    outs, sums = [], []
    for a, b, c in zip(cut(q, part.asks), cut(k, part.asked), cut(v, part.asked), strict=True):
        p, lse = probabilities(a, b, causal, scaling)
        c = c.repeat_interleave(q.shape[1] // k.shape[1], 1)
        out = torch.einsum("hrs,shd->rhd", p, c)
        outs.append(out if len(b) else torch.full_like(out, torch.nan))
        sums.append(lse if len(b) else torch.full_like(lse, torch.nan))
    return torch.cat(outs), torch.cat(sums, 1), torch.tensor(5), torch.tensor(6)


def backward(grad, q, k, v, out, lse, part, causal, rng, scaling):
    """As a flash kernel does it: p from the log-sum-exp it is given, D from the output."""
    assert list(map(int, rng)) == [5, 6] and grad.is_contiguous() and lse.is_contiguous()
    times = q.shape[1] // k.shape[1]
    made = [torch.full_like(x, torch.nan).contiguous() for x in (q, k, v)]
    parts = zip(*(cut(x, part.asks) for x in (grad, q, out, lse.T, made[0])), strict=True)
    keys = zip(*(cut(x, part.asked) for x in (k, v, made[1], made[2])), strict=True)
    for (g, a, o, own, dq), (b, c, dk, dv) in zip(parts, keys, strict=True):
        if not len(a) or not len(b):
            continue
        p, _ = probabilities(a, b, causal, scaling, own.T)
        dp = torch.einsum("rhd,shd->hrs", g, c.repeat_interleave(times, 1))
        ds = p * (dp - (g * o).sum(-1).T[..., None]) * scaling
        dq.copy_(torch.einsum("hrs,shd->rhd", ds, b.repeat_interleave(times, 1)))
        dk.copy_(torch.einsum("hrs,rhd->shd", ds, a).unflatten(1, (-1, times)).sum(2))
        dv.copy_(torch.einsum("hrs,rhd->shd", p, g).unflatten(1, (-1, times)).sum(2))
    return made


@pytest.fixture
def promised(monkeypatch):
    monkeypatch.setattr(packed, "_forward", forward)
    monkeypatch.setattr(packed, "_backward", backward)


def seen_by(q, k, v, mask):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * 0.3
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_two_calls_and_a_turn_are_one_masked_attention(promised, layout, sizes):
    (heads, groups, size), mask = sizes, dense(layout)
    qkv = torch.randn(len(mask), heads + 2 * groups, size)
    up, turn = torch.randn(len(mask), heads, size), angles(len(mask), size)
    widths = [heads, groups, groups]

    def plain(kind):
        leaf = qkv.to(kind).requires_grad_()
        q, k, v = leaf.split(widths, 1)
        q, k = reference.rotary(q, k, *(x.to(kind) for x in turn), kind)
        out = seen_by(q, k, v, mask)
        return [out, *torch.autograd.grad(out, leaf, up.to(kind))[0].split(widths, 1)]

    at, turned = calls.calls(layout, DEVICE), qkv.clone()
    turns.turn_(turned, *turn, groups)
    assert torch.equal(turned[:, heads + groups :], qkv[:, heads + groups :])
    parts = turned.split(widths, 1)
    out, lse, states = packed.attend(*parts, at, 0.3)
    by = packed.attend_grad(up, *parts, out, lse, states, turn, at, 0.3)
    found = [out, *by.split(widths, 1)]
    for truth, yard, got in zip(plain(torch.float64), plain(FULL), found, strict=True):
        within(truth, yard, got, 3, scale=float(truth.abs().max()) * 4)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_decoder_layer_and_its_gradients(promised, layout, biased, normed, monkeypatch):
    monkeypatch.setattr(turns, "SHARES", 3)  # rows of the norms' gradients, in turn
    (heads, groups, size), inner, width = (4, 2, 10), 48, 24
    mask = dense(layout)
    shapes = [
        (width,), (heads * size, width), (groups * size, width), (groups * size, width),
        (width, heads * size), (width,), (inner, width), (inner, width), (width, inner),
    ]  # fmt: skip
    weights = [torch.randn(s) * (0.2 if len(s) > 1 else 1.0) for s in shapes]
    sides = [shape[0] for shape in shapes if len(shape) > 1]
    biases = [torch.randn(n) if biased and i < 3 else None for i, n in enumerate(sides)]
    norms = [torch.randn(size) + 1 if normed else None for _ in range(2)]
    x, up = torch.randn(len(mask), width), torch.randn(len(mask), width)
    cos, sin = angles(len(mask), size)

    def plain(kind):
        leaves = [t.to(kind).requires_grad_() for t in (x, *weights)]
        own = [w if w is None else w.to(kind).requires_grad_() for w in norms]
        extra = [None if b is None else b.to(kind).requires_grad_() for b in biases]
        a, n1, q, k, v, o, n2, gate, up_, down = leaves
        y = reference.rms_norm(a, n1, 1e-3, kind)
        q, k, v = (
            torch.nn.functional.linear(y, w, b).unflatten(1, (-1, size))
            for w, b in zip((q, k, v), extra[:3], strict=True)
        )
        q, k = (
            x if w is None else reference.rms_norm(x, w, 0.1, kind)
            for x, w in zip((q, k), own, strict=True)
        )
        q, k = reference.rotary(q, k, cos.to(kind), sin.to(kind), kind)
        s = a + seen_by(q, k, v, mask).flatten(1) @ o.T
        y = reference.rms_norm(s, n2, 1e-3, kind)
        out = s + (silu(y @ gate.T) * (y @ up_.T)) @ down.T
        wanted = [*leaves, *(b for b in (*extra, *own) if b is not None)]
        return [out, *torch.autograd.grad(out, wanted, up.to(kind))]

    leaves = [t.clone().requires_grad_() for t in (x, *weights)]
    extra, own = (
        [None if b is None else b.clone().requires_grad_() for b in given]
        for given in (biases, norms)
    )
    known = size, (1e-3, 1e-3, 0.1), 0.3, FULL, calls.calls(layout, DEVICE)
    out = gpu_decoder.decoder_layer(leaves[0], cos, sin, known, leaves[1:], extra, own)
    wanted = [*leaves, *(b for b in (*extra, *own) if b is not None)]
    found = [out, *torch.autograd.grad(out, wanted, up, retain_graph=True)]
    for truth, yard, got in zip(plain(torch.float64), plain(FULL), found, strict=True):
        within(truth, yard, got, 3, scale=float(truth.abs().max()) * 4)
    again = torch.autograd.grad(out, wanted, up)  # nothing kept was written into
    assert all(map(torch.equal, found[1:], again))
    alone = [*weights[:3], leaves[4], *weights[4:]]  # v's weight learns, nothing else
    out = gpu_decoder.decoder_layer(x, cos, sin, known, alone, biases, norms)
    assert torch.equal(torch.autograd.grad(out, leaves[4], up)[0], found[5])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_decoder_without_modules_is_its_modules(promised, kind):
    """Prompts of several lengths at once, then a token a row."""
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **size)).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.3)
    inner: Any = model.get_decoder()
    ids, read = torch.randint(0, 50, (3, 7)), [4, 1, 3]
    assert not gpu_layers.lean(inner) and gpu_layers.fuse(model) and gpu_layers.lean(inner)
    with torch.no_grad():
        truth = inner(ids).last_hidden_state
        for module, parts in gpu_layers.joinable(inner):
            module.joined = Joined(parts, FULL)
            module.joined.packed = False
            module.joined.weight = torch.cat([part.weight for part in parts])
        own = lean.Decoder(inner, FULL, lean.gpu_kernels())
        starts = [sum(read[:b]) for b in range(3)]
        plan = Packed([(s, n, ()) for s, n in zip(starts, read, strict=True)], DEVICE, keep=True)
        assert own.reads(plan, []) and not own.reads(plan, ["an image"])
        flat = torch.cat([row[:n] for row, n in zip(ids, read, strict=True)])
        hidden = own.read(flat, torch.cat([torch.arange(n) for n in read]), plan)
        wanted = torch.cat([row[:n] for row, n in zip(truth, read, strict=True)])
        torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-4)
        length, each = torch.tensor(read), torch.arange(3)
        place = Slots(3, 8, torch.device(DEVICE))
        place.fixed, place.width = True, 8
        place.put(each, plan, each, length, length)
        for n in range(3):
            hidden = own(ids[each, length + n], place.position, place)
            place.length += 1
            torch.testing.assert_close(hidden, truth[each, length + n], rtol=1e-4, atol=1e-4)


def test_a_part_reads_its_rows_of_the_joined_weight():
    parts = [torch.nn.Linear(8, n, bias=True) for n in (3, 5)]
    x = torch.randn(2, 8)
    one = Joined.__new__(Joined)
    one.dtype, one.widths, one.packed = FULL, [3, 5], False
    one.weight, one.bias = (torch.cat([getattr(p, k) for p in parts]) for k in ("weight", "bias"))
    for part, how, y in zip(parts, one.parts(Cast(FULL)), one(x), strict=True):
        assert torch.allclose(how(x), part(x)) and torch.allclose(y, part(x), atol=1e-6)


def test_roles_say_what_each_call_has():
    at = calls.calls([(0, 4, []), (4, 1, [2, 1]), (8, 3, [0])], "cpu")
    assert at.role.tolist() == [0] * 4 + [2] + [1] * 3 + [0] * 3
    shared = cast(calls.Call, at.shared)
    assert shared.asks.tolist() == [0, 4, 4, 4, 5, 8, 8, 11, 11, 11]
    assert shared.asked.tolist() == [0, 0, 4, 4, 4, 5, 8, 8, 11, 11]
    assert calls.calls([(0, 4, [0])], "cpu").shared is None
    assert (calls.COMPLETION, calls.PROMPT) == (packed.COMPLETION.value, packed.PROMPT.value)
