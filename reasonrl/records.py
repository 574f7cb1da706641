"""What travels through the house: problems, rollouts, rewards, batches, losses; the error types.

Frozen dataclasses with shape comments, no behaviour beyond construction and plain views.
Legend: P prompts, G group, B = completions (P*G), N packed tokens, S steps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Message = Mapping[str, Any]  # {"role": ..., "content": ...}


class KernelUnavailable(RuntimeError):
    """The implementation asked for cannot run here; the message names what brings it."""


class InputError(ValueError):
    """Bad data, config or files from outside: one line with file, row, field. Exit status 2."""


class NonFiniteStop(RuntimeError):
    """The NaN policy stopped the run. Exit status 3."""


class ScorerDown(RuntimeError):
    """A judge or verifier stayed down. Exit status 4."""


class RankLost(RuntimeError):
    """Another rank of the run is gone. Exit status 5."""


@dataclass(frozen=True)
class Problem:
    """One problem; `id` is unique in its task and stable across runs."""

    id: str
    prompt: str | Sequence[Message]
    answer: str | None = None
    answer_type: str = "text"  # numerical | choice | ocr | text | math | code
    task: str = ""
    images: tuple[Any, ...] = ()  # paths, or pictures that draw themselves (images.py)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A number that is known, or the reason why it is not. Only "scored" enters any statistic."""

    kind: Literal["scored", "unscorable", "infra"]
    value: float | None = None
    reason: str = ""


def scored(value: float, reason: str = "") -> Score:
    return Score("scored", float(value), reason)


def unscorable(reason: str) -> Score:
    return Score("unscorable", None, reason)


def infra(reason: str) -> Score:
    return Score("infra", None, reason)


@dataclass(frozen=True)
class Step:
    """A step: characters [start, end) of a completion's text, and its reward where known."""

    start: int
    end: int
    reward: float | None = None


@dataclass(frozen=True)
class Rollout:
    """Completions of P problems, G each; row b answers problems[group[b]]. Token ids throughout."""

    problems: Sequence[Problem]  # P
    prompt_ids: Sequence[Sequence[int]]  # P, the prompt as the policy saw it
    group: Tensor  # (B,) int64, index into problems
    completion_ids: Sequence[Sequence[int]]  # B, up to and including EOS
    text: Sequence[str]  # B, decoded without special tokens
    finished: Sequence[bool]  # B, False = cut by the length limit
    logp: Sequence[Tensor]  # B x (T_b,) fp32, un-truncated distribution at the sampling temperature
    pieces: Sequence[Sequence[int]]  # B x (T_b + 1) where each token starts in `text`
    sampling_logp: Sequence[Tensor] | None = None  # as `logp`, after top-k/top-p truncation
    images: Sequence[Any] = ()  # P of vision.Seen or None, made once per prompt; () without any
    outcome: Sequence[Score] | None = None  # B, where the completions were graded when drawn
    numbers: Sequence[int] = ()  # P, of the problems in the task's train split; () outside a run
    served: bool = False  # a server drew it; `logp` and `sampling_logp` are what the server says
    stale: bool = False  # an earlier policy wrote some of it; `logp` is what it said of it


@dataclass(frozen=True)
class Rewards:
    """What a scorer says of a rollout. Unknown values are NaN and marked; nothing is silently 0."""

    outcome: Sequence[Score]  # B
    steps: Sequence[Sequence[Step]] | None = None  # B x S_b, spans and step rewards
    token: Sequence[Tensor] | None = None  # B x (T_b,) fp32, token rewards (implicit PRM)
    metrics: Mapping[str, float] = field(default_factory=dict)
    verdict: Sequence[Score] | None = None  # B, the task's own, where `outcome` is a mix


@dataclass(frozen=True)
class Batch:
    """One packed micro-batch in which a group's prompt stands once.

    Sequence layout, for every group in it: [prompt | completion 1 | completion 2 | ...].
    `predict` says which packed position's hidden state predicts which completion token.
    """

    input_ids: Tensor  # (L,) int64, prompts and completions packed
    position_ids: Tensor  # (L,) int64, (3, L) with images; completions continue their prompt's
    layout: Sequence[
        tuple[int, int, Sequence[int]]
    ]  # per group: (start, prompt length, completion lengths)
    predict: Tensor  # (N,) int64, position whose hidden state predicts token n
    target: Tensor  # (N,) int64, the completion tokens
    cu_seqlens: Tensor  # (B+1,) int64 over the N completion tokens
    advantage: Tensor  # (N,) fp32
    old_logp: Tensor | None  # (N,) fp32, None = on-policy
    ref_logp: Tensor | None  # (N,) fp32
    weight: Tensor | None  # (N,) fp32, importance of what another distribution drew
    mask: Tensor | None  # (N,) bool, None = all count
    rows: Tensor  # (B,) int64, rows of the rollout
    images: Sequence[Any] = ()  # of the groups in `layout` that have some, in their order


@dataclass(frozen=True)
class LossOut:
    loss: Tensor  # 0-d
    metrics: Mapping[str, Tensor]  # 0-d float tensors
