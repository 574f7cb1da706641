"""On a GPU: every kernel against float64 truth, packed models against their own forward, a run.

    python -m pytest tests/test_gpu.py

Skipped, with one line a test, where there is none. CI has none: what a run showed, and on which
card, stands in bench/results.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reasonrl import (
    decoding,
    flash,
    layers,
    linear_policy_loss,
    models,
)  # fmt: skip
from reasonrl.attention import Packed, attend
from reasonrl.batch import pack
from reasonrl.cli import main
from reasonrl.kernels import tiles
from reasonrl.logprobs import rollout_logp
from reasonrl.loss import LossSpec
from reasonrl.records import Problem
from reasonrl.rollout import Sampling, sample

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from test_flash import LAYOUTS  # noqa: E402
from test_packing import gradients, made_up, separate_loss  # noqa: E402

pytestmark = pytest.mark.gpu
TRITON = "test_policy_loss or test_logp or test_linear"


@pytest.fixture(autouse=True)
def gpu(require):
    require("gpu", None if torch.cuda.is_available() else "no NVIDIA GPU")


@pytest.mark.parametrize(
    "impl, files, which",
    [
        ("cuda", ["test_parity.py"], "test_policy_loss or returns or steps or group or without"),
        ("triton", ["test_parity.py", "triton_cases.py"], TRITON),
        ("triton", ["triton_layer_cases.py"], "not never"),
    ],
)
def test_parity(impl, files, which):
    """The grid of options that the CPU kernels pass, by the same rule, on this card."""
    env = os.environ | {"REASONRL_PARITY": impl}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", which]
    run = subprocess.run(
        [*command, *(str(HERE / f) for f in files)], env=env, cwd=HERE.parent, capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout.splitlines()[-1]


class There:
    """kernels.cuda for tensors on the CPU: arguments go to the card, results come back."""

    def __getattr__(self, name: str):
        from reasonrl.kernels import cuda

        op = getattr(cuda, name)
        return lambda *args: _moved(op(*(_moved(a, "cuda") for a in args)), "cpu")


def _moved(x, where: str):
    if isinstance(x, Tensor):
        return x.to(where)
    if isinstance(x, tuple):
        return tuple(_moved(v, where) for v in x)
    if isinstance(x, dict):
        return {k: _moved(v, where) for k, v in x.items()}
    if dataclasses.is_dataclass(x) and not isinstance(x, LossSpec):
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return dataclasses.replace(x, **{k: _moved(v, where) for k, v in fields.items()})
    return x


def test_cuda_cases_of_the_shim_and_the_same_bits_every_time():
    from simt import cases

    def numbers():
        made = []
        for part in ("policy", "credit", "group", "returns", "step"):
            run = getattr(cases, f"{part}_cases")
            made += [x.detach() for x in run(There(), torch.Generator().manual_seed(1))]
        return made

    first = numbers()
    assert len(first) > 500
    for _ in range(3):
        for a, b in zip(first, numbers(), strict=True):
            assert a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("layout", [*LAYOUTS, [(0, 300, [700, 1, 64]), (1065, 129, [257] * 5)]])
def test_flash_equals_the_masked_path(layout, heads):
    """In bf16, within what the masked path itself loses against float64 of the same numbers."""
    tokens = max(start + n + sum(rows) for start, n, rows in layout)
    x = [
        torch.randn(h, tokens, 64, device="cuda").bfloat16() for h in (heads[0], heads[1], heads[1])
    ]
    up = torch.randn(tokens, heads[0], 64, device="cuda")
    found = []
    for attn, kind in (
        ("sdpa", torch.float64),
        ("sdpa", torch.bfloat16),
        ("flash", torch.bfloat16),
    ):
        leaves = [v.to(kind).requires_grad_() for v in x]
        out = Packed(layout, "cuda", attn=attn).attend(0, *leaves, 0.125)
        found.append([out, *torch.autograd.grad((up.to(kind) * out).sum(), leaves)])
    for truth, yard, ours in zip(*found, strict=True):
        gap, allowed = (
            (v.detach().double() - truth.detach()).norm() / truth.detach().norm()
            for v in (ours, yard)
        )
        assert float(gap) <= 1.5 * float(allowed) + 1e-3, (float(gap), float(allowed))


def tiny(**changes):
    options = {"dtype": "fp32", "seed": 3, "width": 64, "layers": 2, "device": "cuda"} | changes
    return models.load("tiny", **options)


SPEC = LossSpec.named("reinforce", reduce="seq_mean")


def packed(policy, rollout, advantage, tokens):
    loss = 0.0
    for batch in pack(rollout, advantage, tokens):

        def call(hidden, head, batch=batch):
            out = linear_policy_loss(
                hidden, head.weight, batch.target.cuda(), None, batch.advantage.cuda(), SPEC,
                cu_seqlens=batch.cu_seqlens.cuda(), denominator=len(rollout.text),
            )  # fmt: skip
            return out.loss

        loss = loss + policy.at_head(batch, call)
    return loss


def test_packed_training_equals_separate_sequences_in_fp32():
    policy, rollout = tiny(), made_up(((4, 7, 1), (12, 3, 3)))
    advantage = torch.randn(sum(map(len, rollout.completion_ids)))
    with torch.device("cuda"):
        apart = separate_loss(policy, rollout, advantage.cuda(), SPEC)
        truth = gradients(policy, apart)
    loss = packed(policy, rollout, advantage, 4096)
    torch.testing.assert_close(loss, apart, rtol=1e-5, atol=1e-6)
    for name, grad in gradients(policy, loss).items():
        assert float((grad - truth[name]).norm()) <= 1e-5 * float(truth[name].norm()) + 1e-9, name


@pytest.mark.parametrize(
    "change", [{"attn": "flash"}, {"attn": "sdpa"}, {"liger": "auto"}, {"liger": "ours"}]
)
def test_bf16_training_keeps_to_fp32(change):
    """The gradient's direction, by flash kernels, by the masked path, with fused layers."""
    rollout = made_up(((40, 7, 19), (12, 33, 3)))
    advantage = torch.randn(sum(map(len, rollout.completion_ids)))
    found = []
    for kind in ({}, {"dtype": "bf16"} | change):
        policy = tiny(**kind)
        grads = gradients(policy, packed(policy, rollout, advantage, 4096))
        found.append(torch.cat([g.flatten().float() for g in grads.values()]))
    cosine = torch.nn.functional.cosine_similarity(*found, dim=0)
    assert float(cosine) > 0.999


def test_fused_layers_are_in_this_model_alone(require):
    require("liger", None if layers.importlib.util.find_spec("liger_kernel") else "pip install")
    fused, plain = tiny(liger="auto"), models.load("tiny", dtype="fp32", width=64, layers=2)
    assert "Liger" in repr(fused.model) and "Liger" not in repr(plain.model)
    plain.model.set_attn_implementation("sdpa")
    plain.model(torch.tensor([[1, 2, 3]]))  # a CPU model still runs


def test_greedy_equals_transformers_generate():
    policy = tiny()
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    rows = [Problem(str(i), "") for i in range(3)]
    ours = sample(policy, rows, prompts, 1, Sampling(20, temperature=0.0), seed=0)
    policy.model.set_attn_implementation("sdpa")
    for prompt, row in zip(prompts, ours.completion_ids, strict=True):
        out = policy.model.generate(
            torch.tensor([prompt], device="cuda"), max_new_tokens=20, do_sample=False,
            eos_token_id=sorted(policy.eos), pad_token_id=0,
        )  # fmt: skip
        assert out[0, len(prompt) :].tolist() == list(row)


@pytest.mark.parametrize("dtype, liger", [("fp32", "off"), ("bf16", "off"), ("bf16", "ours")])
def test_a_recorded_step_writes_what_a_plain_one_writes(dtype, liger, monkeypatch):
    """The same kernels in the same order: the same tokens, also where prompts enter late, rows
    leave and the step is recorded anew."""
    recorded = []
    inner = decoding._record
    monkeypatch.setattr(decoding, "_record", lambda step: recorded.append(1) or inner(step))
    prompts = [[5 + i, 6, 7 + i][: 1 + i % 3] for i in range(12)]
    rows = [Problem(str(i), "") for i in range(12)]
    found = []
    for graphs in ("off", "auto"):
        policy = tiny(dtype=dtype, graphs=graphs, liger=liger)
        with torch.no_grad():
            policy.head.weight[policy.tokenizer.eos_token_id] *= 3  # rows of all lengths
        plan = Sampling(64, temperature=1.2)
        found.append([sample(policy, rows, prompts, 4, plan, seed=1, rows=n) for n in (256, 16)])
        assert bool(recorded) == (graphs == "auto")
    assert len(recorded) >= 3
    for plain, replayed in zip(*found, strict=True):
        assert plain.completion_ids == replayed.completion_ids
        assert any(plain.finished)
        for a, b in zip(plain.logp, replayed.logp, strict=True):
            assert torch.equal(a, b)


def test_rollouts_keep_no_more_memory_than_the_first():
    policy = tiny(dtype="bf16")
    rows = [Problem(str(i), "") for i in range(16)]
    kept = []
    for seed in range(8):
        sample(policy, rows, [[5 + i, 6] for i in range(16)], 8, Sampling(40), seed)
        kept.append(torch.cuda.memory_reserved())
    assert kept[-1] <= kept[1], kept


def test_flash_decoding_equals_the_masked_path():
    """Rows of unlike lengths over one cache; in bf16, a step."""
    made = torch.Generator("cuda").manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=made, device="cuda").bfloat16()

    used = torch.tensor([1, 7, 64, 65, 200], device="cuda")
    q, k, v = noise(5, 8, 64), noise(5, 200, 2, 64), noise(5, 200, 2, 64)
    out = flash.attend_slots(q, k, v, used.int(), 0.125)
    sees = (torch.arange(200, device="cuda") < used[:, None])[:, None, None, :]
    wide = (x.transpose(1, 2).double() for x in (k, v))
    truth = attend(q[:, :, None].double(), *wide, sees, 0.125)[:, :, 0]
    assert float((out.double() - truth).norm() / truth.norm()) < 0.01


def test_sampled_logp_is_the_trainers():
    policy = tiny()
    rollout = sample(policy, [Problem("0", "")], [[5, 6, 7]], 8, Sampling(24), seed=1)
    trained = rollout_logp(policy, rollout, 4096)
    torch.testing.assert_close(torch.cat(rollout.logp), trained.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_learns_and_resumes(dtype, tmp_path):
    out = tmp_path / "run"
    words = ["train", "tiny", f"dtype={dtype}", "device=cuda", "steps=2", "cold_start_steps=30"]
    words += ["eval_problems=20", "prompts_per_step=4", "group=4", "save.every=1", "--quiet"]
    assert main([*words, "--out", str(out)]) == 0
    assert main([*words, "steps=3", "--out", str(out), "--resume"]) == 0
    assert (out / "checkpoint-3").is_dir()


def test_flash_says_what_it_cannot():
    q = torch.zeros(3, 2, 64, device="cuda")
    assert flash.missing(q) == "bf16 or fp16, got torch.float32"
    assert "head width" in str(flash.missing(torch.zeros(3, 2, 12, device="cuda").bfloat16()))


def test_half_products_are_of_this_generation():
    """On a card of compute capability 9 the forward's product is ours and the others are the
    library's warp-group ones, not those of the card before it."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("SKIPPED: not a card of compute capability 9.0")
    x = torch.randn(2048, 896, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(49152, 896, device="cuda") * 0.05).bfloat16().requires_grad_()
    target = torch.randint(0, 49152, (2048,), device="cuda")
    advantage, cu = torch.randn(2048, device="cuda"), torch.tensor([0, 2048], device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        out = linear_policy_loss(x, w, target, None, advantage, SPEC, cu_seqlens=cu, impl="triton")
        out.loss.backward()
        torch.cuda.synchronize()
    names = [event.name for event in seen.events()]
    products = [n for n in names if any(word in n for word in ("nvjet", "gemm", "cutlass"))]
    assert len(products) == 2 and all("sm90" in name for name in products), names
    assert "tile_kernel" in names and "stats_kernel" not in names, names


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [256, 300, 4096])
def test_tiles_keep_the_bits_of_a_row(kind, rows):
    """Whatever rows stand beside it, in whatever order its tiles are walked, every time."""
    x = torch.randn(rows, 896, device="cuda").to(kind)
    w = (torch.randn(49152, 896, device="cuda") * 0.05).to(kind)
    target = torch.randint(0, 49152, (rows,), device="cuda")
    assert tiles.worth(rows, x, w, None)
    _, taken, stats = tiles.score_rows(x, w, None, target, 1.0, True, False)
    u, again, others = tiles.score_rows(x, w, None, target, 1.0, True, True)
    assert torch.equal(taken, again) and torch.equal(stats, others)
    want = torch.log_softmax(u.double(), -1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(taken.double(), want, rtol=1e-6, atol=1e-5)
    few = slice(rows - 130, rows)
    _, part, _ = tiles.score_rows(x[few], w, None, target[few], 1.0, True, False)
    assert torch.equal(part, taken[few])
