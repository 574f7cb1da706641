"""A head divided over ranks: the numbers of the whole head, the same bits on every rank, one
collective forward and one backward."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vocab_worker import CASES, RANKS, TYPES, D, N, V, loss, made, options, target

from reasonrl import linear_logp, vocab_parallel_linear_logp
from reasonrl.vocab_parallel import ELSEWHERE, merged


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).with_name("vocab_worker.py"))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, script, str(r), str(out)], env=env) for r in range(RANKS)
    ]
    assert [p.wait(timeout=300) for p in running] == [0] * RANKS
    return [torch.load(out / f"{r}.pt", weights_only=False) for r in range(RANKS)]


def error(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_parts_make_the_whole_head(number, ranks):
    """Against float64; no further off than a few times what the undivided op is."""
    case = CASES[number]
    full, results = made(case), []
    for kind, impl in ((torch.float64, "reference"), (None, case.get("impl", "auto"))):
        leaves = [x if x is None or kind is None else x.to(kind) for x in full]
        used = [x.requires_grad_() for x in leaves if x is not None]
        how = options(case) | {"impl": impl}
        value = linear_logp(leaves[0], leaves[1], target(), bias=leaves[2], **how)
        grads = torch.autograd.grad(loss(value, case), used)
        results.append((value if case["entropy"] else (value,), grads))
    (truth, truths), (yard, yards) = results
    half = case["dtype"] == "bf16"
    eps = torch.finfo(TYPES[case["dtype"]]).eps
    for rank in ranks:
        got = rank[number]["value"] if case["entropy"] else (rank[number]["value"],)
        for t, y, g in zip(truth, yard, got, strict=True):
            # a bf16 product of fewer words may round a logit otherwise
            slack = 0.03 if half else 8 * eps * float(t.detach().abs().max())
            assert error(g, t) <= 3 * error(y, t) + slack
    dx = [rank[number]["grads"][0] for rank in ranks]
    assert all(torch.equal(dx[0], other) for other in dx[1:])
    pieces = [torch.cat([r[number]["grads"][i] for r in ranks]) for i in range(1, len(truths))]
    for t, y, g in zip(truths, yards, [dx[0], *pieces], strict=True):
        assert error(g, t) <= 4 * error(y, t) + 16 * eps * float(t.abs().max())


def test_every_rank_has_the_same_bits_by_one_collective_each_way(ranks):
    for number, case in enumerate(CASES):
        for rank in ranks:
            assert rank[number]["calls"] == ["all_gather", "all_reduce"]
            values = [r[number]["value"] for r in (ranks[0], rank)]
            pairs = zip(*values, strict=True) if case["entropy"] else [values]
            assert all(torch.equal(a, b) for a, b in pairs)


def test_a_word_that_no_rank_holds_is_named(ranks):
    assert {rank[-1] for rank in ranks} == {f"target: no rank holds word {V} of row 5"}


def test_merged_by_hand():
    """Two ranks, scores (ln 1, ln 3) and (ln 4,): p = 1/8, 3/8, 1/2."""
    s = torch.tensor([1.0, 3.0, 4.0]).double()
    ln = s.log()
    first = [ln[1] - torch.log(s[:2].sum()), ln[1], torch.log(s[:2].sum() / 3)]
    p = s[:2] / 4
    first.append(-(p * p.log()).sum())
    second = [torch.tensor(ELSEWHERE), ln[2], torch.tensor(0.0), torch.tensor(0.0)]
    every = torch.stack([torch.stack([x.double() for x in r]) for r in (first, second)])[..., None]
    logp, stats = merged(every)
    q = s / 8
    assert float(logp) == pytest.approx(float(q[1].log()))
    assert stats[0].tolist() == pytest.approx(
        [float(ln[2]), float(torch.log(s.sum() / 4)), float(-(q * q.log()).sum())]
    )


def test_one_process_is_linear_logp():
    hidden, weight, _ = made(CASES[0])
    alone = vocab_parallel_linear_logp(hidden, weight, target(), first=0)
    torch.testing.assert_close(alone, linear_logp(hidden, weight, target()))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"first": -1}, "first must be an int >= 0, got -1"),
        ({"weight": torch.zeros(0, D)}, "weight must hold at least one word"),
        ({"weight": torch.zeros(3, D + 1)}, "weight must be"),
        ({"target": torch.zeros(N)}, "target must be"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0"),
    ],
)
def test_bad_input(change, said):
    hidden, weight, _ = made(CASES[0])
    known = {"hidden": hidden, "weight": weight, "target": target(), "first": 0} | change
    with pytest.raises(ValueError, match=said):
        vocab_parallel_linear_logp(**known)
