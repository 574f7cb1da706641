"""Free memory that the heap keeps goes back in the middle of a backward."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from bench.machine import resident
from reasonrl import config as configs
from reasonrl import heap, models
from reasonrl.update import Learner


@pytest.fixture(autouse=True)
def glibc(require):
    require("glibc", None if heap.trim() else "no malloc_trim in this C library")


def test_pieces_between_others_go_back():
    pieces = [torch.ones(1 << 14) for _ in range(4096)]  # 64 KiB each, below what is mapped alone
    kept = pieces[::2]
    del pieces
    before = resident()
    assert heap.trim() and resident() < before - 64 and all(float(x[0]) == 1 for x in kept)


def tiny():
    return models.load("tiny", dtype="fp32", width=32, layers=4)


def test_at_places_among_the_layers(monkeypatch):
    policy, seen = tiny(), []
    assert heap.trim_in_backward(policy.model) == 0  # too small to be worth it
    monkeypatch.setattr(heap, "WORTH", 1)
    monkeypatch.setattr(heap, "AT", (0.75, 0.5, 0.2))
    monkeypatch.setattr(heap, "trim", lambda: seen.append(len(grads())) or True)
    layers = policy.model.model.layers

    def grads():
        return [x for x in layers if all(p.grad is not None for p in x.parameters())]

    assert heap.trim_in_backward(policy.model) == 3
    seen.clear()
    policy.model.set_attn_implementation("sdpa")
    for _ in range(2):  # as often as there are micro-batches
        policy.model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert len(seen) == 6 and seen[0] < seen[1] < seen[2] < len(layers)
    assert policy.frozen().model.model.layers[1].input_layernorm.weight.grad is None


def test_after_a_rollout(monkeypatch):
    seen, policy = [], tiny()
    monkeypatch.setattr(heap, "trim", lambda: seen.append(1))
    for worth in (1, heap.WORTH):
        monkeypatch.setattr(heap, "WORTH", worth)
        with policy.inference():
            assert not seen or worth > 1
    assert len(seen) == 1


def test_layers_that_learn_nothing_are_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "WORTH", 1)
    policy = tiny()
    policy.model.model.layers.requires_grad_(False)
    assert heap.trim_in_backward(policy.model) == 0


def test_a_learner_does_it_and_ranks_do_not(monkeypatch):
    asked = []
    monkeypatch.setattr(heap, "trim_in_backward", asked.append)
    policy, config, accelerator = tiny(), configs.load("tiny"), Accelerator(cpu=True)
    Learner(policy, config, accelerator)
    assert asked == [policy.model]
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    Learner(policy, config, accelerator)
    assert len(asked) == 1
