"""What a frozen image tower sees is made once: shared, exact, and gone with the step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_vision import POLICIES, PROBLEMS, SMALL, prompts, qwen2_5, written

from reasonrl import vision
from reasonrl.batch import pack
from reasonrl.cli import main
from reasonrl.logprobs import batch_logp, rollout_logp
from reasonrl.rollout import Sampling, sample

TOWERS = {
    "Qwen2VisionTransformerPretrainedModel",
    "Qwen2_5_VisionTransformerPretrainedModel",
    "Qwen3VLVisionModel",
}


class Looks:
    """How many images every pass through a tower has, inside the block."""

    def __enter__(self) -> list[int]:
        seen: list[int] = []

        def note(module, given, kwargs, out):
            if type(module).__name__ in TOWERS:
                seen.append(len(kwargs["grid_thw"]))

        self.hook = torch.nn.modules.module.register_module_forward_hook(note, with_kwargs=True)
        return seen

    def __exit__(self, *_) -> None:
        self.hook.remove()


@pytest.mark.parametrize("kind", POLICIES)
def test_a_frozen_tower_looks_once_at_an_image(kind):
    """Sampling, old and reference log-probabilities and every micro-batch of an update share what
    it saw: loss and gradient are those of looking anew; it is gone with the rollout."""
    policy = POLICIES[kind]()
    vision.set_tower(policy.model, "frozen")
    ref = policy.frozen()

    def step(forgetting: bool) -> torch.Tensor:
        out = []
        rollout = sample(policy, PROBLEMS, prompts(policy), 3, Sampling(9), seed=4)
        for scorer in (policy, ref):
            if forgetting:
                vision.forget()
            out.append(rollout_logp(scorer, rollout, 40))
        policy.model.zero_grad()
        for batch in pack(rollout, None, 40):
            if forgetting:
                vision.forget()
            batch_logp(policy, batch).sum().backward()
        learned = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
        return torch.cat([*out, *learned])

    with Looks() as seen:
        found = step(forgetting=False)
        assert seen == [3]
        assert not any(kept for _, kept in vision._kept.values())
        wanted = step(forgetting=True)
        assert len(seen) > 8
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_what_is_kept_is_of_these_weights():
    policy = qwen2_5()
    vision.set_tower(policy.model, "frozen")
    rollout, other = written(policy), policy.frozen()
    with Looks() as seen, torch.no_grad():
        first = rollout_logp(policy, rollout, 4096)
        assert torch.equal(rollout_logp(other, rollout, 4096), first) and seen == [3]
        for weight in vision.tower(policy.model).parameters():
            weight.mul_(2)
        changed = rollout_logp(policy, rollout, 4096)
        assert seen == [3, 3] and not torch.allclose(changed, first, atol=1e-4)
        assert torch.equal(rollout_logp(other, rollout, 4096), first)
    with Looks() as seen:  # shards are run by every rank alike
        rollout_logp(replace(policy, sharded=True), rollout, 4096)
    assert seen == [3]
    vision.set_tower(policy.model, "trained")
    with Looks() as seen:
        rollout_logp(policy, rollout, 4096)
        rollout_logp(policy, rollout, 4096)
    assert seen == [3, 3]  # a tower that learns looks every time


@pytest.mark.parametrize("tower", ["frozen", "trained"])
def test_a_run_looks_once_a_step_where_the_tower_is_frozen(tower, tmp_path):
    """A cold start of four pictures; then two steps of two, each with a rollout, the old policy,
    the reference, two updates, and what the page is told of the second."""
    own = [f"model_options.vision_tower={tower}", "loss={name: dapo, kl_coef: 0.01}", "updates=2"]
    own += ["algorithm=grpo", "algo={kind: dr_grpo}", "eval_problems=0"]
    out = str(tmp_path / "r")
    with Looks() as seen:
        assert main(["train", "tiny", *SMALL, *own, "--out", out, "--quiet"]) == 0
    assert seen == {"frozen": [4, 2, 2], "trained": [4, *[2, 2, 2, 1, 1, 1] * 2]}[tower]
    assert not vision._kept  # gone with the last step
