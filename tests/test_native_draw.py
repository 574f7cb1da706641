"""A token a row on the CPU: the inverse transform against float64, rows without a distribution,
bits over threads and rows, and the way there from `choose`."""

from __future__ import annotations

import math

import pytest
import torch
from test_native import isa, native  # noqa: F401, fixtures

from reasonrl import sampling
from reasonrl.kernels import native_draw
from reasonrl.kernels.native_draw import draw
from reasonrl.sampling import Sampling, choose

KINDS = (torch.float32, torch.bfloat16, torch.float16)
SLACK = 1e-6  # of a row's sum, by which a uniform number may miss its token


def rows(vocab: int, kind: torch.dtype, count: int = 40) -> torch.Tensor:
    """Flat and sharp ones, some words impossible."""
    x = torch.randn(count, vocab) * torch.logspace(-1, 1.3, count)[:, None]
    x[::3, vocab // 2 + 1 :: 5] = x[::3, max(1, vocab - 1) :] = -math.inf
    return x.to(kind)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 17, 1024, 1025, 5000])
def test_the_token_is_where_the_sum_passes_the_uniform_number(isa, vocab, kind, temperature):  # noqa: F811
    x = rows(vocab, kind)
    uniform = torch.rand(len(x), dtype=torch.float64)
    uniform[0], uniform[1::2] = 0.0, 1.0 - 2.0**-53  # some ends lie at words that are impossible
    token, logp = draw(x, uniform, temperature)
    p = (x.double() / temperature).softmax(-1)
    own = p.gather(1, token[:, None])[:, 0]
    ends = p.cumsum(-1).gather(1, token[:, None])[:, 0]
    assert (own > 0).all()
    assert (ends > uniform - SLACK).all() and (ends - own <= uniform + SLACK).all()
    assert torch.allclose(logp.double(), own.log(), rtol=0, atol=2e-5)


def test_it_draws_as_often_as_is_meant(isa):  # noqa: F811
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    count, at = 20_000, torch.arange(20_000, dtype=torch.float64)
    token, _ = draw(p.log().expand(count, -1).contiguous(), (at + 0.5) / count, 1.0)
    found = torch.bincount(token, minlength=5) / count
    assert torch.allclose(found, p, atol=1e-4)


@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf"])
def test_a_row_without_a_distribution_is_said_alone(isa, bad):  # noqa: F811
    x, uniform = rows(1500, torch.float32, 5), torch.full((5,), 0.7, dtype=torch.float64)
    clean = draw(x, uniform, 0.9)
    if bad == "all -inf":
        x[2] = -math.inf
    else:
        x[2, 1300] = float(bad)
    token, logp = draw(x, uniform, 0.9)
    assert logp[2].isnan() and token[2] == 0
    others = torch.arange(5) != 2
    assert torch.equal(token[others], clean[0][others])
    assert torch.equal(logp[others], clean[1][others])


def test_the_same_bits_for_any_threads_and_rows_beside(native):  # noqa: F811
    x, uniform = rows(3000, torch.bfloat16), torch.rand(40, dtype=torch.float64)
    seen = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seen.append(draw(x, uniform, 0.8))
    alone = [draw(x[i : i + 1], uniform[i : i + 1], 0.8) for i in range(40)]
    seen.append(tuple(torch.cat(y) for y in zip(*alone, strict=True)))
    for token, logp in seen[1:]:
        assert torch.equal(token, seen[0][0]) and torch.equal(logp, seen[0][1])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_choose_takes_it_and_gives_what_plain_torch_gives(native, monkeypatch, kind):  # noqa: F811
    x, uniform, calls = rows(2000, kind), torch.rand(40, dtype=torch.float64), []
    inner = native_draw.draw
    monkeypatch.setattr(sampling, "_kernel", lambda: lambda *a: calls.append(1) or inner(*a))
    ours = choose(x, uniform, Sampling(1, temperature=0.7))
    assert len(calls) == 1 and torch.equal(ours[1], ours[2])
    monkeypatch.setattr(sampling, "_kernel", lambda: None)
    theirs = choose(x, uniform, Sampling(1, temperature=0.7))
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(ours[1:], theirs[1:], strict=True))


def test_what_it_does_not_take_goes_the_plain_way(native, monkeypatch):  # noqa: F811
    def never():
        raise AssertionError

    monkeypatch.setattr(sampling, "_kernel", never)
    x, uniform = rows(50, torch.float32, 4), torch.rand(4, dtype=torch.float64)
    for how in (Sampling(1, temperature=0.0), Sampling(1, top_k=3), Sampling(1, top_p=0.9)):
        assert choose(x, uniform, how)[0].shape == (4,)
    for other in (x.double(), x.t().contiguous().t()):
        assert choose(other, uniform, Sampling(1))[0].shape == (4,)


def test_a_kernel_that_is_given_draws_where_nothing_is_truncated():
    x, uniform = rows(50, torch.float32, 4), torch.rand(4, dtype=torch.float64)
    seen = []

    def kernel(logits, uniform, temperature):
        seen.append(temperature)
        return torch.full((4,), 7), torch.full((4,), -1.0)

    token, logp, sampled = choose(x, uniform, Sampling(1, temperature=0.5), kernel)
    assert seen == [0.5] and (token == 7).all() and torch.equal(logp, sampled)
    for how in (Sampling(1, temperature=0.0), Sampling(1, top_k=3), Sampling(1, top_p=0.9)):
        choose(x, uniform, how, kernel)
    choose(x.double(), uniform, Sampling(1), kernel)
    assert len(seen) == 1
