"""The scale calculator: published parameter counts, hand-worked bytes, autograd's own account."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench/ is no part of what is installed

from bench.step_ours import Ours, Settings
from reasonrl import InputError, tiny, whole_decoder, whole_layer
from reasonrl.batch import lengths, pack
from reasonrl.cli import main
from reasonrl.plan import GIB, Job, advice, check, missing, plan, whole_layers
from reasonrl.plan_memory import (
    Lengths,
    activation_bytes,
    head_bytes,
    kv_bytes_per_token,
    microbatches,
)
from reasonrl.plan_shapes import Shape, counted, described, shape_of
from reasonrl.rollout import Sampling

# small numbers, so that bytes can be worked out by hand
TOY = Shape("toy", 1000, 2, 10, 30, 4, 2, 5, 100, 200, 300)
ONE = Job(gpus=4, prompts_per_step=8, group=2, prompt=10, completion=20, batch_tokens=50)


def size(found, name: str) -> float:
    return sum(row.size for row in found.rows if row.name.startswith(name))


@pytest.mark.parametrize(
    "name, params",
    [
        ("smollm2", 134_515_008),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
    ],
)
def test_counts_are_the_published_ones(name, params):
    assert shape_of(name).params == params


def test_a_folder_and_the_model_itself_agree(tmp_path):
    model, _ = tiny.build()
    model.config.save_pretrained(tmp_path)
    found = shape_of(str(tmp_path))
    assert found.params == sum(p.numel() for p in model.parameters()) == shape_of("tiny").params
    assert (found.layers, found.hidden, found.vocab, found.head_dim) == (4, 160, 100, 40)
    # q, k, v, o of 160 -> 160, gate and up 160 -> 480, down back, in each of 4 layers
    assert found.linear_io == 4 * (4 * 320 + 3 * 640)


def test_a_described_shape_has_the_parameters_asked_for():
    found = described(7e9, layers=32, hidden=4096, vocab=32000)
    assert found.params == pytest.approx(7e9, rel=1e-3)
    twin = LlamaConfig(
        hidden_size=4096,
        intermediate_size=found.intermediate,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    built = counted("twin", twin)
    assert (built.params, built.linear_io) == (found.params, found.linear_io)
    with pytest.raises(InputError, match="need more"):
        described(1e8, layers=32, hidden=4096, vocab=32000)


@pytest.mark.parametrize("zero, states", [(0, 12), (1, 4 + 12 / 4), (2, 4 + 12 / 4), (3, 4)])
def test_states_by_zero_stage(zero, states):
    """4 ranks, fp32 layout, 1000 parameters; the master is a partition's own from stage 1 on."""
    apart = {"engine": "colocated"} if zero == 3 else {}
    found = plan(TOY, Job(**{**vars(ONE), "zero": zero, "precision": "fp32", **apart}))
    total = size(found, "weights") + size(found, "optimiser")
    assert total == pytest.approx(1000 * states)
    assert size(found, "gradients") == 4000 / (4 if zero >= 2 else 1)


def test_mixed_and_bf16_states_by_hand():
    mixed = plan(TOY, ONE)
    assert size(mixed, "weights") == 4000 and size(mixed, "optimiser") == 8000
    assert size(mixed, "bf16 copies") == 2000 and size(mixed, "bf16 weights to sample") == 2000
    # 4 rows of 30 tokens, 2 * 2 * 10 * 2 bytes; 0.8 of a layer's beside it
    assert size(mixed, "KV cache") == pytest.approx(4 * 30 * 80 * 1.4)
    half = plan(TOY, Job(**{**vars(ONE), "precision": "bf16"}))
    assert size(half, "weights") == 2000 and size(half, "optimiser") == 12000
    assert size(half, "bf16") == 0


def test_an_adapter_and_learned_rewards_by_hand():
    found = plan(TOY, Job(**{**vars(ONE), "lora": 3, "reference": True}))
    assert size(found, "weights") == 4000 + 4 * 600  # 3 * 200 adapter parameters
    assert size(found, "optimiser") == 8 * 600 and size(found, "gradients") == 4 * 600
    assert size(found, "reference") == 0  # the policy without its adapter
    small = Shape("prm", 100, 2, 10, 30, 4, 2, 5, 100, 50, 30)
    found = plan(TOY, Job(**{**vars(ONE), "prm": "full", "zero": 2}), small)
    assert size(found, "reward model: weights, Adam") == 1200  # whole: ZeRO-2 does not wrap it
    late = [r.phases for r in found.rows if r.name == "reward model: gradient"]
    assert late == [("score", "update")]
    found = plan(TOY, Job(**{**vars(ONE), "prm": "lora", "reference": True}), small)
    assert size(found, "reward model") == 16 * 8 * 50  # on the reference's weights


def test_activations_head_and_cache_by_hand():
    sizes = Lengths(10, 20, 2)
    # one layer, fp32: norms 24*10, 3*4*20 queries, 2*4*10*1.5 keys, 4*4*30 MLP; the last norm 120
    layer = 240 + 240 + 120 + 480
    assert activation_bytes(TOY, sizes, "fp32", False, False) == 2 * layer + 120
    assert activation_bytes(TOY, sizes, "fp32", True, False) == 2 * 40 + layer + 120
    # plain: norms 2*(4+4)*10, 2*4*20 queries, keys, 3*4*30 MLP, 30*4*4 weights; the last norm 40
    plain = 160 + 160 + 120 + 360 + 480
    assert activation_bytes(TOY, sizes, "fp32", False, True) == 2 * plain + 40
    # mixed: norms 2*(4+2)*10, all else halved
    assert activation_bytes(TOY, sizes, "mixed", False, True) == 2 * (120 + 560) + 40
    # one function: 8*10, 2*4*(20 + 10 + 30), of 4 heads a log-sum-exp, or a maximum and a share
    whole = 80 + 480
    for plain, more in ((False, 16), (True, 32)):
        found = activation_bytes(TOY, sizes, "fp32", False, plain, True)
        assert found == 2 * (whole + more) + (40 if plain else 120)
    assert kv_bytes_per_token(TOY, 2) == 2 * 2 * 10 * 2
    # chunk 50 * 100 * 2, dW 4000, the head in bf16 2000, hidden states and gradient 2 * 2 * 50 * 10
    assert head_bytes(TOY, 50, 2) == 10000 + 6000 + 2000
    assert head_bytes(TOY, 50, 2, scratch=4000) == 4000 + 6000 + 2000


def rollout_of(model: str, dtype: str, prompts: int, group: int, tokens: int):
    side = Ours(Settings(model, prompts, group, tokens, tokens, repeats=0), dtype)
    problems = side.problems[:prompts]
    return side, side.algo.rollout(problems, group, Sampling(tokens), 0)


@pytest.mark.parametrize("budget", [60, 128, 200, 10_000])
def test_micro_batches_are_those_of_the_packing(budget):
    side, rollout = rollout_of("tiny", "fp32", 2, 3, 32)
    sizes = Lengths(len(rollout.prompt_ids[0]), 32, 3)
    assert len(rollout.prompt_ids[1]) == sizes.prompt
    batches = [len(b.input_ids) for b in pack(rollout, None, budget)]
    assert microbatches(sizes, 2, budget) == (len(batches), max(batches))


@pytest.mark.parametrize("dtype, precision", [("fp32", "fp32"), ("bf16", "mixed")])
def test_activations_are_what_autograd_keeps(monkeypatch, dtype, precision):
    """Every storage that the forward of a packed batch saves, parameters and their copies apart; on
    a CPU a layer that is one function saves less."""
    side, rollout = rollout_of("tiny", dtype, 2, 16, 64)
    (batch,) = pack(rollout, torch.ones(sum(lengths(rollout))), 10**9)
    matrices = {tuple(p.shape) for p in side.policy.model.parameters() if p.dim() == 2}
    matrices |= {shape[::-1] for shape in matrices}
    saved: dict[int, tuple[int, Tensor]] = {}

    def keep(value):
        storage = value.untyped_storage()
        if tuple(value.shape) not in matrices:
            saved[storage.data_ptr()] = (storage.nbytes(), value)  # held: an address is not reused
        return value

    def found() -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            side.learner.module(batch, side.spec, 10.0)
        return sum(nbytes for nbytes, _ in saved.values())

    whole = found()
    sizes, shape = Lengths(len(rollout.prompt_ids[0]), 64, 16), shape_of("tiny")
    expected = len(batch.input_ids) * activation_bytes(shape, sizes, precision, False, True, True)
    assert whole == pytest.approx(expected, rel=0.05)
    for way in (whole_layer, whole_decoder):
        monkeypatch.setattr(way, "computed", lambda *given: None)
    expected = len(batch.input_ids) * activation_bytes(shape, sizes, precision, False, True)
    assert found() == pytest.approx(expected, rel=0.02)
    assert whole < 0.8 * expected


def test_where_a_layer_is_one_function():
    small, large = (replace(TOY, kind=kind) for kind in ("qwen3", "gemma"))
    cases = [
        (small, {}, True), (small, {"liger": "off"}, False), (small, {"lora": 3}, False),
        (small, {"precision": "bf16"}, False), (small, {"precision": "fp32"}, False),
        (small, {"zero": 3, "engine": "colocated"}, False), (small, {"attention": "plain"}, True),
        (replace(small, kind="llama"), {"attention": "plain", "precision": "fp32"}, True),
        (large, {}, False),
    ]  # fmt: skip
    for shape, change, wanted in cases:
        job = Job(**{**vars(ONE), **change})
        assert whole_layers(shape, job) is wanted, (shape.kind, change)
        copies = size(plan(shape, job), "bf16 copies")
        assert (
            copies == (600 if wanted and job.precision == "mixed" else 2000)
            or job.zero == 3
            or job.precision != "mixed"
        )
    cpu = Job(**{**vars(ONE), "attention": "plain", "precision": "fp32", "gpus": 1})
    found = plan(replace(TOY, kind="llama"), cpu)
    # 16 rows of 20 tokens, 8 prompts of 10, of 2 * 2 * 10 * 4 bytes
    assert size(found, "KV cache") == (16 * 20 + 8 * 10) * 160
    assert size(found, "weights packed") == 4000


def test_traffic_by_hand():
    """4 ranks: 3/4 of the data a ring pass; 2 groups a rank of 50 tokens, a batch each."""
    found = plan(TOY, ONE)
    assert found.batches == 2 and dict(found.traffic) == {"gradients, all-reduce": 6000}
    two = dict(plan(TOY, Job(**{**vars(ONE), "zero": 2})).traffic)
    assert two == {"gradients, reduce-scatter": 2 * 3000, "new weights, all-gather": 3000}
    job = Job(**{**vars(ONE), "zero": 3, "engine": "colocated", "tensor_parallel": 2})
    three = dict(plan(TOY, job).traffic)
    assert three["weights, all-gather"] == 4 * 3000 and three["weights to the engine"] == 1500
    # 2 layers, 2 all-reduces each, 2 groups * 2 ranks * (10 + 2 * 20) tokens of 10 * 2 bytes
    assert three["engine, tensor parallel"] == 2 * 2 * 200 * (2 * 1 / 2) * 20
    alone = Job(**{**vars(ONE), "gpus": 1})
    assert plan(TOY, alone).traffic == []


def test_advice_fits_and_says_what_is_not_ours():
    shape, job = shape_of("qwen2.5-7b"), Job()
    assert not plan(shape, job).fits
    ways = advice(shape, job)
    assert ways and all(plan(shape, Job(**{**vars(job), **way})).fits for way in ways)
    large = Job(gpus=8, gpu_memory=48)
    (way,) = advice(shape_of("llama-3.1-70b"), large)
    assert way["gpus"] > 8 and plan(shape_of("llama-3.1-70b"), Job(**{**vars(large), **way})).fits
    assert missing(job) == []
    assert len(missing(Job(zero=3, engine="colocated", lora=8, checkpointing=True))) == 3


def test_the_verdict_is_about_the_worst_phase():
    job = Job(gpus=1, prompts_per_step=1, group=2, prompt=16, completion=16)
    found = plan(shape_of("tiny"), job)
    assert found.peak == max(found.phase(p) for p in ("rollout", "score", "update"))
    limit = found.peak / GIB
    for memory, fits in ((limit / 0.9 * 1.001, True), (limit / 0.9 * 0.999, False)):
        assert plan(shape_of("tiny"), Job(**{**vars(job), "gpu_memory": memory})).fits is fits


@pytest.mark.parametrize(
    "change, said",
    [
        ({"gpus": 0}, "--gpus"),
        ({"lora": -1}, "--lora"),
        ({"reserve": 1.0}, "--reserve"),
        ({"gpu_memory": float("nan")}, "--gpu-memory"),
        ({"zero": 3}, "--engine colocated"),
        ({"tensor_parallel": 2}, "--tensor-parallel"),
        ({"tensor_parallel": 3, "engine": "colocated"}, "does not divide"),
    ],
)
def test_bad_jobs(change, said):
    with pytest.raises(InputError, match=said):
        check(Job(**change))


def test_the_command(tmp_path, capsys):
    assert main(["plan", "tiny", "--gpus", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["params"] == 1_348_640 and found["fits"] is True
    assert found["phases"]["update"] <= found["peak"] == max(found["phases"].values())
    assert main(["plan", "qwen2.5-7b"]) == 0
    out = capsys.readouterr().out
    assert "| weights | 28.37 | 28.37 | 28.37 |" in out and "It does not fit" in out
    assert main(["plan", "tiny", "--zero", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["job"]["engine"] == "colocated"
    tiny.build()[0].config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path / "config.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["params"] == 1_348_640
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 8}')
    cases = [
        (["plan"], "a MODEL or --params"),
        (["plan", "nothing"], "qwen2.5-7b"),
        (["plan", "tiny", "--layers", "3"], "--layers"),
        (["plan", "--params", "7e9", "--layers", "32"], "--hidden"),
        (["plan", "tiny", "--prm-model", "tiny"], "--prm"),
        (["plan", "tiny", "--zero", "3", "--engine", "in-process"], "--engine colocated"),
        (["plan", str(tmp_path)], "mixtures of experts"),
        (["plan", str(tmp_path / "none")], "no"),
    ]
    for words, said in cases:
        assert main(words) == 2, words
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and said in line, line
