"""The sections of a run's config: what each holds, its limits and its defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Schedule = Literal["constant", "linear", "cosine"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Sample(Section):
    """How completions are drawn. top_k 0 and top_p 1 keep the whole distribution."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0


class ColdStart(Section):
    """Supervised steps on worked completions before RL."""

    learning_rate: Rate = 3e-4
    batch: Positive = 8
    warmup: Count = 0
    schedule: Schedule = "linear"


class Optim(Section):
    """AdamW. `final_scale`: what the schedule leaves of the learning rate at the last step."""

    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False),
    ] = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    warmup: Count = 3
    schedule: Schedule = "constant"
    final_scale: Annotated[float, Field(ge=0, le=1)] = 0.0


class Filter(Section):
    """Which groups a step learns from, by their mean outcome; 0 and 1 keep all, as they are."""

    low: Annotated[float, Field(ge=0, le=1)] = 0.0
    high: Annotated[float, Field(ge=0, le=1)] = 1.0
    rounds: Positive = 1  # rollouts of one step, at most, until enough groups survive
    drop_clipped: bool = False  # drop a group in which a completion was cut by the length limit

    @property
    def active(self) -> bool:
        return (self.low, self.high) != (0.0, 1.0) or self.drop_clipped


class Ceiling(Section):
    """When too few rewards are known for too long the run stops with the reason, exit status 4."""

    unknown: Annotated[float, Field(ge=0, le=1)] = 0.9  # share of a step's completions; 1 = never
    patience: Positive = 10  # steps in a row


class Canary(Section):
    """Right completions judged under another problem, which nobody may reward; every 0 = never."""

    every: Count = 10  # steps
    count: Positive = 8  # of one step and process, at most


class Lora(Section):
    """A LoRA adapter in place of all weights; rank 0 = none. alpha: 2 * rank by default."""

    rank: Count = 0
    alpha: Rate | None = None


class Eval(Section):
    """Greedy evaluation; every 0 = at the end only (and at the start where at_start)."""

    every: Count = 0
    batch: Positive = 64
    split: Literal["train", "dev", "test"] = "test"
    at_start: bool = True


class Save(Section):
    """Checkpoints; every 0 = at the last step only."""

    every: Count = 0
    keep: Positive = 2


class BatchLimit(Section):
    tokens: Positive = 4096  # packed tokens of one micro-batch, at most


class EngineSection(Section):
    """An inference server that draws the completions; without url they are drawn in process."""

    url: str = ""  # http://host:port
    kind: Literal["sglang", "vllm"] = "sglang"
    model: str = ""  # the name that vLLM serves
    processed: bool = False  # vLLM was started with --logprobs-mode processed_logprobs
    folder: str = ""  # seen by both sides, where weights are left for it; the run's by default
    max_lag: Count = 0  # updates that its weights may be behind
    overlap: bool = False  # the next step's completions are drawn during this one's update
    correction: Literal["token", "sequence", "off"] = "token"  # importance weights
    cap: Rate = 2.0  # of an importance weight
    parallel: Positive = 64  # requests under way
    timeout: Rate = 900.0  # seconds of one try
    wait: Rate = 600.0  # seconds for a server that is down
    when_down: Literal["pause", "fail"] = "pause"


class Log(Section):
    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False
    completions_every: Count = 1  # steps between completion files; 0 = none
    tokens: bool = True  # and in them log-probability, ratio and clip of every token
