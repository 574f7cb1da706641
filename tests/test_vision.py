"""Vision-language policies: the packed, prompt-shared computation against the models' own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    AutoModelForImageTextToText,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from reasonrl import attention, models, tiny_vl
from reasonrl.batch import merge, pack, take
from reasonrl.cli import main
from reasonrl.logprobs import batch_logp, rollout_logp
from reasonrl.models import Policy
from reasonrl.prompts import PLACE, render, with_places
from reasonrl.records import InputError, Problem, Rollout
from reasonrl.rollout import Sampling, sample
from reasonrl.vision import prepare


@dataclass(frozen=True)
class Bar:
    """A picture with one bar."""

    height: int
    width: int = 64

    @property
    def key(self) -> str:
        return f"bar-{self.height}-{self.width}"

    def draw(self) -> Image.Image:
        image = Image.new("RGB", (self.width, 64), (255, 255, 255))
        ImageDraw.Draw(image).rectangle([8, 8, 20, 8 + 5 * self.height], fill=(200, 10, 60))
        return image


PROBLEMS = [
    Problem("one", "max:", images=(Bar(3),)),
    Problem("two", "sum:", images=(Bar(5, 96), Bar(1))),
    Problem("none", "7+1:"),
]


def qwen2_5() -> Policy:
    return models.load("tiny-vl", dtype="fp32", width=64, layers=2, vision_layers=2)


def other(kind: str) -> Policy:
    """Qwen2-VL and Qwen3-VL (features that enter deeper layers) with the tiny model's words."""
    _, words, processor = tiny_vl.build(width=64, layers=1, vision_layers=1)
    text = {
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
        },
    }
    marks = {"vision_start_token_id": 100, "image_token_id": 101, "vision_end_token_id": 102}
    vision = {"depth": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 1}
    torch.manual_seed(3)
    if kind == "qwen2":
        text.pop("head_dim")
        vision |= {"embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **marks)
        model = Qwen2VLForConditionalGeneration(config)
    else:
        vision |= {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 48,
        }
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **marks)
        model = Qwen3VLForConditionalGeneration(config)
    model.set_attn_implementation({"text_config": attention.NAME, "vision_config": "sdpa"})
    return Policy(model.eval(), words, processor=processor)


POLICIES = {"qwen2.5": qwen2_5, "qwen2": lambda: other("qwen2"), "qwen3": lambda: other("qwen3")}


def prompts(policy: Policy, problems=PROBLEMS) -> list[list[int]]:
    return [render(policy.tokenizer, p.prompt, images=len(p.images)) for p in problems]


def written(policy: Policy, group: int = 3, length: int = 7) -> Rollout:
    """Completions of random words, none of them an image's mark, of unequal lengths."""
    ids, images = prepare(policy, PROBLEMS, prompts(policy))
    torch.manual_seed(0)
    rows = [torch.randint(4, 99, (length - b % 3,)).tolist() for b in range(len(ids) * group)]
    return Rollout(
        problems=PROBLEMS,
        prompt_ids=ids,
        group=torch.arange(len(ids)).repeat_interleave(group),
        completion_ids=rows,
        text=[""] * len(rows),
        finished=[True] * len(rows),
        logp=[torch.zeros(len(row)) for row in rows],
        pieces=[[0] * (len(row) + 1) for row in rows],
        images=images,
    )


def own_logp(policy: Policy, rollout: Rollout) -> torch.Tensor:
    """Every completion alone behind its prompt, through the model's own forward."""
    model = policy.model
    model.set_attn_implementation("sdpa")
    out = []
    for row, g in zip(rollout.completion_ids, rollout.group.tolist(), strict=True):
        prompt, seen = rollout.prompt_ids[g], rollout.images[g]
        ids = torch.tensor([[*prompt, *row]])
        given = {}
        if seen is not None:
            kinds = (ids == model.config.image_token_id).int()
            given = {"pixel_values": seen.pixels, "image_grid_thw": seen.grid}
            given["mm_token_type_ids"] = kinds
        model.model.rope_deltas = None
        logits = model(input_ids=ids, **given).logits[0].log_softmax(-1)
        out.append(logits[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None])[:, 0])
    model.set_attn_implementation({"text_config": attention.NAME, "vision_config": "sdpa"})
    return torch.cat(out)


@pytest.mark.parametrize("kind", POLICIES)
def test_packed_log_probabilities_are_the_models_own(kind):
    policy = POLICIES[kind]()
    rollout = written(policy)
    with torch.no_grad():
        wanted = own_logp(policy, rollout)
    for tokens in (4096, 40):
        found = rollout_logp(policy, rollout, tokens)
        torch.testing.assert_close(found, wanted, rtol=0, atol=3e-6)
    blind = replace(
        rollout,
        images=[None if s is None else replace(s, pixels=s.pixels * 0) for s in rollout.images],
    )
    gap = (rollout_logp(policy, blind, 4096) - wanted).abs()
    assert float(gap[:20].max()) > 1e-4  # the images matter


@pytest.mark.parametrize("kind", POLICIES)
def test_gradients_equal_those_of_unshared_prompts(kind):
    policy = POLICIES[kind]()
    rollout = written(policy)
    weight = torch.randn(sum(map(len, rollout.completion_ids)), generator=torch.manual_seed(1))
    (own_logp(policy, rollout) * weight).sum().backward()
    wanted = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    assert any("visual" in name for name in wanted)
    policy.model.zero_grad()
    (batch,) = pack(rollout, None, 4096)
    (batch_logp(policy, batch) * weight).sum().backward()
    for name, parameter in policy.model.named_parameters():
        if name in wanted:
            gap = (parameter.grad - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)
            assert float(gap) < 1e-5, name


@pytest.mark.parametrize("kind", POLICIES)
def test_sampling_sees_what_training_sees(kind):
    policy = POLICIES[kind]()
    rollout = sample(policy, PROBLEMS, prompts(policy), 3, Sampling(9), seed=4)
    assert sum(len(row) for row in rollout.completion_ids) > 60
    found = rollout_logp(policy, rollout, 4096)
    torch.testing.assert_close(found, torch.cat(list(rollout.logp)), rtol=0, atol=3e-6)


def test_an_image_token_in_a_completion_is_a_word():
    policy = qwen2_5()
    rollout = written(policy)
    marked = [[101, *row[1:]] for row in rollout.completion_ids]
    found = rollout_logp(policy, replace(rollout, completion_ids=marked), 4096)
    alone = [take(replace(rollout, completion_ids=marked), [g]) for g in range(3)]
    wanted = torch.cat([rollout_logp(policy, part, 4096) for part in alone])
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-6)
    assert bool(found.isfinite().all())


def test_greedy_text_equals_generate():
    policy = qwen2_5()
    problem = PROBLEMS[1]
    rollout = sample(policy, [problem], prompts(policy, [problem]), 1, Sampling(12, 0.0), 0)
    seen, ids = rollout.images[0], torch.tensor([list(rollout.prompt_ids[0])])
    policy.model.set_attn_implementation("sdpa")
    out = policy.model.generate(
        input_ids=ids,
        pixel_values=seen.pixels,
        image_grid_thw=seen.grid,
        mm_token_type_ids=(ids == 101).int(),
        max_new_tokens=12,
        do_sample=False,
    )
    assert out[0, ids.shape[1] :].tolist() == list(rollout.completion_ids[0])


def test_positions_go_on_behind_an_image():
    """16 merged patches, 4 x 4, take the positions of 4: frame, row, column from the mark on."""
    policy = qwen2_5()
    (ids,), (seen,) = prepare(policy, PROBLEMS[:1], prompts(policy)[:1])
    assert len(ids) == 1 + 16 + 1 + 4
    assert seen.positions[:, 0].tolist() == [0, 0, 0]
    assert seen.positions[:, 1:17].tolist() == [
        [1] * 16,
        [1 + i // 4 for i in range(16)],
        [1 + i % 4 for i in range(16)],
    ]
    assert seen.positions[:, 17:].tolist() == [[5, 6, 7, 8, 9]] * 3
    again = prepare(policy, PROBLEMS[:1], [ids])
    assert again[0][0] == ids  # prepared prompts come out as they went in


def test_a_group_shares_its_image():
    policy = qwen2_5()
    rollout = written(policy, group=4)
    (batch,) = pack(rollout, None, 4096)
    assert len(batch.images) == 2 and batch.position_ids.shape == (3, len(batch.input_ids))
    text = take(rollout, [2])
    (batch,) = pack(text, None, 4096)
    assert not batch.images and batch.position_ids.dim() == 1
    both = merge([text, take(rollout, [0])])
    assert both.images[0] is None and both.images[1] is rollout.images[0]


def test_a_frozen_tower_does_not_learn():
    policy = models.load(
        "tiny-vl", dtype="fp32", width=64, layers=1, vision_layers=1, vision_tower="frozen"
    )
    (batch,) = pack(written(policy), None, 4096)
    batch_logp(policy, batch).sum().backward()
    learned = {n for n, p in policy.model.named_parameters() if p.grad is not None}
    assert learned and not any("visual" in name for name in learned)


def test_a_checkpoint_brings_the_eyes_back(tmp_path):
    policy = qwen2_5()
    rollout = written(policy)
    policy.save(tmp_path)
    again = models.load(str(tmp_path), dtype="fp32")
    assert torch.equal(rollout_logp(again, rollout, 4096), rollout_logp(policy, rollout, 4096))
    again = prepare(again, PROBLEMS, prompts(policy))
    assert torch.equal(again[1][1].pixels, rollout.images[1].pixels)
    AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_refused():
    policy = qwen2_5()
    blind = models.load("tiny", dtype="fp32", width=32, layers=1)
    with pytest.raises(InputError, match="problem one: .*LlamaForCausalLM.* reads text only"):
        sample(blind, PROBLEMS, prompts(blind), 1, Sampling(2), 0)
    wrong = [replace(PROBLEMS[1], prompt=[{"role": "user", "content": [{"type": "image"}]}])]
    with pytest.raises(InputError, match=r"problem two: 2 image\(s\) for 1 place"):
        sample(policy, wrong, prompts(policy, wrong), 1, Sampling(2), 0)
    with pytest.raises(InputError, match="vision_tower: expected frozen or trained, got 'thawed'"):
        models.load("tiny-vl", vision_tower="thawed")
    with pytest.raises(InputError, match="vision_tower: tiny has no images"):
        models.load("tiny", vision_tower="frozen")


def test_places_of_images():
    parts = [{"type": "image"}, {"type": "text", "text": "how many?"}]
    assert with_places("how many?", 1) == [{"role": "user", "content": parts}]
    asked = [{"role": "user", "content": parts}]
    assert with_places(asked, 1) is asked
    system = [{"role": "system", "content": "look"}, {"role": "user", "content": "how many?"}]
    assert with_places(system, 1) == [system[0], {"role": "user", "content": parts}]
    words = qwen2_5().tokenizer
    assert words.decode(render(words, "max:", images=2)).replace(" ", "") == PLACE * 2 + "max:"


SMALL = [
    "model=tiny-vl", "task=charts", "task_options={style: compact}", "steps=2", "group=4",
    "cold_start_steps=1", "prompts_per_step=2", "eval_problems=2", "max_completion_length=8",
    "model_options={width: 64, layers: 1, vision_width: 32, vision_layers: 1}", "dtype=fp32",
    "cold_start.batch=4", "threads=1",
]  # fmt: skip


@pytest.mark.parametrize(
    "own",
    [
        ["prime", "filter={low: 0.0, high: 1.0}"],
        ["prime", "filter={low: 0.0, high: 1.0}", "algo={prm_replay: 2, prm_updates: 2}"],
        ["tiny", "algorithm=process", "algo={credit: step}", "loss={name: dapo, kl_coef: 0.01}"],
        ["tiny", "algorithm=grpo", "algo={}", "updates=2", "model_options.vision_tower=frozen"],
    ],
)  # fmt: skip
def test_text_algorithms_work_on_images(own, tmp_path):
    assert main(["train", own[0], *SMALL, *own[1:], "--out", str(tmp_path / "r"), "--quiet"]) == 0
    rows = (tmp_path / "r/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_a_reward_model_of_text_refuses_images(tmp_path, capsys):
    status = main(["train", "reasonflux", *SMALL, "--out", str(tmp_path / "r"), "--quiet"])
    assert status == 2
    assert (
        "a process reward model reads text only, the problem has 1 image" in capsys.readouterr().err
    )


def test_text_models_need_no_pillow_and_models_with_eyes_say_so():
    code = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "PIL" else real(name, *a)
sys.modules["PIL"] = None  # importing it fails
from reasonrl import models
assert models.load("tiny", width=32, layers=1).context == 1024
try:
    models.load("tiny-vl")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "model tiny-vl: images need the package pillow (pip install pillow)"
    )
