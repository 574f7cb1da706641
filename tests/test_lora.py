"""LoRA in the loop: only the adapter learns, checkpoints are plain models, runs resume exactly."""

from __future__ import annotations

import pytest
import torch

from reasonrl import config as configs
from reasonrl import lora, models
from reasonrl.records import InputError
from reasonrl.state_file import load_state
from reasonrl.train import Run, train

pytest.importorskip("peft")

TINY = [
    "steps=3", "cold_start_steps=2", "prompts_per_step=2", "group=4", "eval_problems=2",
    "cold_start.batch=4", "max_completion_length=12", "threads=1", "lora.rank=3",
    "model_options={width: 32, layers: 2}", "save.every=1", "loss.kl_coef=0.05",
]  # fmt: skip
SEEING = [
    *(word for word in TINY if not word.startswith("model_options")),
    "model=tiny-vl", "task=charts", "task_options={style: compact}",
    "model_options={width: 64, layers: 1, vision_width: 32, vision_layers: 1}",
    "model_options.vision_tower=frozen",
]  # fmt: skip


def weights(folder) -> dict[str, torch.Tensor]:
    return models.load(str(folder)).model.state_dict()


@pytest.mark.parametrize("keys", [TINY, SEEING], ids=["text", "images"])
def test_only_the_adapter_learns_and_checkpoints_are_plain(keys, tmp_path):
    config = configs.load("tiny", keys)
    run = Run(config, tmp_path, resume=False, quiet=True)
    before = {n: p.detach().clone() for n, p in run.algo.policy.model.named_parameters()}
    learning = {n for n, p in run.algo.policy.model.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    assert not any("visual" in name or "lm_head" in name for name in learning)
    assert run.train()
    after = dict(run.algo.policy.model.named_parameters())
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (name not in learning), name
    saved = weights(tmp_path / "checkpoint-3")
    assert not any("lora" in name for name in saved)
    held = lora.merged(run.algo.policy).state_dict()
    assert all(torch.equal(saved[name], held[name]) for name in saved)
    size = sum(v.numel() for v in load_state(tmp_path / "checkpoint-3/adapter").values())
    assert size == sum(after[name].numel() for name in learning)


@pytest.mark.parametrize("keys", [TINY, SEEING], ids=["text", "images"])
def test_a_resumed_run_equals_an_unbroken_one(keys, tmp_path):
    assert train(configs.load("tiny", keys), tmp_path / "whole", quiet=True)
    assert train(configs.load("tiny", [*keys, "steps=2"]), tmp_path / "part", quiet=True)
    assert train(configs.load("tiny", keys), tmp_path / "part", resume=True, quiet=True)
    one, two = (load_state(tmp_path / name / "checkpoint-3/adapter") for name in ("whole", "part"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_frozen_tower_stays_frozen_when_a_run_goes_on(tmp_path):
    keys = [word for word in SEEING if not word.startswith("lora")]
    assert train(configs.load("tiny", [*keys, "steps=1"]), tmp_path, quiet=True)
    run = Run(configs.load("tiny", keys), tmp_path, resume=True, quiet=True)
    assert not any(p.requires_grad for p in run.algo.policy.model.model.visual.parameters())


def test_bad_keys():
    with pytest.raises(InputError, match="lora.rank: expected a number >= 0"):
        configs.load("tiny", ["lora.rank=-1"])
    with pytest.raises(InputError, match="did you mean 'lora.rank'"):
        configs.load("tiny", ["lora_rank=4"])
