"""Our side of the step benchmark, and what both sides share: settings, prompts, rewards, phases."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from reasonrl import models
from reasonrl.algos import GRPO
from reasonrl.batch import pack
from reasonrl.config import BatchLimit, Config, Optim
from reasonrl.loss import LossSpec
from reasonrl.models import Policy
from reasonrl.records import Problem, Rewards, Rollout, scored
from reasonrl.rollout import Sampling
from reasonrl.update import Learner

RATE = 1e-5
EPS = 1e-4  # of the advantage's divisor; the rival's constant, so that both rows do the same
GATE_LENGTHS = ((16, 9), (12, 5))  # completions of the batch whose gradients are compared


@dataclass(frozen=True)
class Settings:
    """The shape of a step: `prompts` x `group` completions of exactly `tokens` tokens."""

    model: str = "smollm2"
    prompts: int = 2
    group: int = 8
    tokens: int = 48
    prompt_tokens: int = 64
    repeats: int = 3  # timed steps of each side, after one to warm up
    checkpointing: bool = False  # the rival's gradient checkpointing: less memory, more time
    threads: int = 0  # 0: torch's own choice
    device: str = "cpu"  # or cuda
    liger: str = "auto"  # our side's fused layers: auto, as a run's default, ours, off
    batch_tokens: int = 8192  # packed tokens of one of our micro-batches; the rival has all in one

    def words(self) -> list[str]:
        """As command-line options."""
        out = []
        for field in fields(self):
            value, flag = getattr(self, field.name), "--" + field.name.replace("_", "-")
            out += ([flag] if value else []) if isinstance(value, bool) else [flag, str(value)]
        return out


class NeverEnds(Policy):
    """A policy without an end of sequence: every completion has the full length."""

    @property
    def eos(self) -> frozenset[int]:
        return frozenset()


@dataclass(frozen=True)
class Parity(GRPO):
    """GRPO on plain text, rewarding every other completion, so that no row is dead."""

    eps: float = EPS

    def plain_prompt(self, problems: Sequence[Problem]) -> list[list[int]]:
        return [self.policy.tokenizer(problem.prompt)["input_ids"] for problem in problems]

    def score(self, rollout: Rollout) -> Rewards:
        return Rewards(outcome=[scored(r) for r in parity(len(rollout.text))])


def parity(rows: int) -> list[float]:
    return [float(b % 2) for b in range(rows)]


def prompt_texts(tokenizer: Any, settings: Settings) -> list[str]:
    """Different texts of about `prompt_tokens` tokens for every step, the warm-up's included."""
    texts = []
    for i in range(settings.prompts * (settings.repeats + 1)):
        words = f"{i}. Anna has {3 * i + 2} apples, gives some away and counts again. " * 200
        ids = tokenizer(words, add_special_tokens=False)["input_ids"][: settings.prompt_tokens]
        texts.append(tokenizer.decode(ids))
    return texts


def now(device: str) -> float:
    """The clock, once the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Ours:
    """The loop's own rooms in the loop's own order, timed."""

    def __init__(self, settings: Settings, dtype: str):
        where = {"device": settings.device, "liger": settings.liger}
        loaded = models.load(settings.model, dtype=dtype, **where)
        self.policy = NeverEnds(loaded.model, loaded.tokenizer, loaded.compute)
        self.settings = settings
        self.algo = Parity(task=None, policy=self.policy)  # type: ignore[arg-type]
        config = Config(
            model=settings.model,
            learning_rate=RATE,
            optim=Optim(betas=(0.9, 0.999)),
            batch=BatchLimit(tokens=settings.batch_tokens),
        )
        self.learner = Learner(self.policy, config, Accelerator(cpu=settings.device == "cpu"))
        self.spec = LossSpec.named("grpo")
        texts = prompt_texts(self.policy.tokenizer, settings)
        self.problems = [Problem(str(i), text) for i, text in enumerate(texts)]
        self.before = vectors(self.policy.model)
        self.tokens = self.prompt_tokens = 0  # of the last step

    def step(self, number: int) -> dict[str, float]:
        """Seconds of each phase of one step."""
        size = self.settings
        problems = self.problems[number * size.prompts : (number + 1) * size.prompts]
        marks = [now(size.device)]
        rollout = self.algo.rollout(problems, size.group, Sampling(size.tokens), number)
        marks.append(now(size.device))
        advantage = self.algo.advantage(self.algo.score(rollout), rollout)
        marks.append(now(size.device))
        self.learner.step(rollout, advantage, self.spec, RATE)
        marks.append(now(size.device))
        self.tokens = sum(map(len, rollout.completion_ids))
        self.prompt_tokens = sum(map(len, rollout.prompt_ids)) * size.group
        spans = [b - a for a, b in zip(marks, marks[1:], strict=False)]
        return dict(zip(("rollout", "score", "update"), spans, strict=True)) | {
            "total": marks[-1] - marks[0]
        }

    def changed(self) -> bool:
        return not torch.equal(self.before, vectors(self.policy.model))

    def gradient(self) -> Tensor:
        """The loss gradient with respect to the head on the gate's batch; changes nothing."""
        rollout, advantage = gate_batch(self.algo)
        for batch in pack(rollout, advantage, tokens=64):  # more than one micro-batch
            loss, _ = self.learner.module(batch, self.spec, len(rollout.text))
            loss.backward()
        out = self.policy.head.weight.grad.clone()
        self.learner.module.zero_grad(set_to_none=True)
        return out


def gate_batch(algo: Parity) -> tuple[Rollout, Tensor]:
    """A fixed rollout of uneven lengths, and +-1 as its advantages."""
    generator = torch.Generator().manual_seed(3)
    sizes = [n for row in GATE_LENGTHS for n in row]
    problems = [Problem("0", "Add 3 and 4."), Problem("1", "What is 17 minus 5, and why?")]
    ids = [torch.randint(4, 90, (n,), generator=generator).tolist() for n in sizes]
    rollout = Rollout(
        problems=problems,
        prompt_ids=algo.plain_prompt(problems),
        group=torch.tensor([0, 0, 1, 1]),
        completion_ids=ids,
        text=[""] * len(ids),
        finished=[True] * len(ids),
        logp=[torch.zeros(n) for n in sizes],
        pieces=[[0] * (n + 1) for n in sizes],
    )
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    return rollout, signs.repeat_interleave(torch.tensor(sizes))


def vectors(model: Any) -> Tensor:
    """Every 1-d parameter, end to end: a small witness of whether training moved the model."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.dim() == 1])
