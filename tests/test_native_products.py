"""The products of linear layers that learn, on the CPU: float64's numbers whatever the widths and
the number of tokens, the bits of any number of threads, and torch's products where they must."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from test_native import isa, native  # noqa: F401, fixtures

from reasonrl.kernels import native_products
from reasonrl.kernels.native_products import NativeProducts, products
from reasonrl.kernels.products import Products

FULL, HALF = torch.float32, torch.bfloat16
LAYERS = {  # inputs, outputs
    "a vector": (16, [16]),
    "less than a vector": (6, [2]),
    "several of one input": (36, [36, 12, 10]),
    "two panels of two": (64, [64]),
    "more than a pass": (598, [130]),
    "wide": (48, [400]),
}
TOKENS = [1, 7, 8, 95, 97, 300]


def drawn(layer, tokens, dtype, biased=True):
    inputs, outputs = LAYERS[layer]
    weights = [torch.randn(n, inputs) for n in outputs]
    biases = [torch.randn(n) if biased and i != 1 else None for i, n in enumerate(outputs)]
    x, grad = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, sum(outputs)).to(dtype)
    return weights, biases, x, grad


def results(of, x, grad):
    return of.forward(x), of.by_input(grad), of.by_weight(grad, x)


def exact(weights, biases, x, grad):
    """In float64, of weights and biases as the products' dtype has them."""
    weight = torch.cat(weights).to(x.dtype).double()
    every = [torch.zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
    y = x.double() @ weight.t() + torch.cat(every).to(x.dtype).double()
    return y, grad.double() @ weight, grad.double().t() @ x.double()


def compare(found, right, dtype):
    for got, want, kind in zip(found, right, (dtype, dtype, FULL), strict=True):
        assert got.dtype == kind and got.shape == want.shape
        room = 1e-5 if kind == FULL else 2**-8
        # where a result is rounded, half a step of it; and the sums' own
        error = (got.double() - want).abs()
        assert bool((error <= room * want.abs() + 2e-5 * want.abs().max()).all())


@pytest.fixture(params=[FULL, HALF], ids=str)
def dtype(request, native):  # noqa: F811
    if request.param == HALF and not native.core().has_dots():
        pytest.skip("this CPU has no instruction for pairs of bf16")
    return request.param


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("layer", LAYERS)
def test_products_are_those_of_float64(dtype, layer, tokens):
    given = drawn(layer, tokens, dtype)
    of = NativeProducts(*given[:2], tokens, dtype)
    compare(results(of, *given[2:]), exact(*given), dtype)


@pytest.mark.parametrize("tokens", [1, 97])
@pytest.mark.parametrize("layer", LAYERS)
def test_fp32_by_every_instruction_set(isa, layer, tokens):  # noqa: F811
    given = drawn(layer, tokens, FULL)
    compare(results(NativeProducts(*given[:2], tokens, FULL), *given[2:]), exact(*given), FULL)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_same_bits_for_any_threads(dtype, layer):
    given, seen = drawn(layer, 97, dtype), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        seen.append(results(NativeProducts(*given[:2], 97, dtype), *given[2:]))
    for every in zip(*seen, strict=True):
        assert all(torch.equal(every[0], other) for other in every[1:])


def test_a_token_has_its_bits_whatever_stands_beside_it(dtype):
    weights, biases, x, grad = drawn("several of one input", 97, dtype)
    whole = results(NativeProducts(weights, biases, 97, dtype), x, grad)
    for at in (0, 8, 95, 96):
        alone = NativeProducts(weights, biases, 1, dtype)
        assert torch.equal(alone.forward(x[at : at + 1].clone())[0], whole[0][at])
        assert torch.equal(alone.by_input(grad[at : at + 1].clone())[0], whole[1][at])


def test_nothing_behind_a_result_is_written(dtype):
    weights, biases, x, grad = drawn("several of one input", 9, dtype)
    of = NativeProducts(weights, biases, 9, dtype)
    core, (y, by_x, by_w) = native_products.core(), exact(weights, biases, x, grad)
    for want, kind, call, given in (
        (y, dtype, core.linear, (x,)),
        (by_x, dtype, core.linear_by_input, (grad,)),
        (by_w, FULL, core.linear_by_weight, (grad, x)),
    ):
        room = torch.full((want.numel() + 64,), 7.0, dtype=kind)
        call(of.task, *(g.data_ptr() for g in given), room.data_ptr(), 2)
        assert room[want.numel() :].eq(7).all()


def test_torch_multiplies_what_the_kernels_do_not(native, monkeypatch):  # noqa: F811
    """Odd widths of bf16, fp16, no token, another instruction set; and by torch it is the same."""
    monkeypatch.setattr(native_products, "fast", lambda name, dtype: name == "avx512")
    monkeypatch.setattr(native_products.core(), "isa", lambda: "avx512")
    weights, biases, x, grad = given = drawn("several of one input", 9, FULL)
    right = exact(*given)
    assert type(products(weights, biases, 9, FULL)) is NativeProducts
    assert type(products(weights, biases, 0, FULL)) is Products
    assert type(products([torch.zeros(3, 4)], [None], 9, HALF)) is Products
    assert type(products([torch.zeros(4, 3)], [None], 9, HALF)) is Products
    assert type(products([torch.zeros(3, 4)], [None], 9, FULL)) is NativeProducts
    compare(results(Products(weights, biases, 9, FULL), x, grad), right, FULL)
    monkeypatch.undo()
    for name, kind in (("avx2", FULL), ("portable", HALF), ("avx512", torch.half)):
        assert not native_products.fast(name, kind)


def test_gradients_of_several_layers_stand_one_under_the_other(dtype):
    weights, biases, x, grad = drawn("several of one input", 40, dtype)
    of = NativeProducts(weights, biases, 40, dtype)
    parts = of.by_weight(grad, x).split(of.widths)
    starts = [0, *accumulate(of.widths)]
    for part, start, width in zip(parts, starts, of.widths, strict=False):
        want = grad[:, start : start + width].double().t() @ x.double()
        torch.testing.assert_close(part.double(), want, rtol=1e-4, atol=1e-4)
