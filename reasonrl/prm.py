"""A process reward model: a causal body, a head read at every step's end, one for the whole.

    prompt | step 1 | step 2 | ... | step S | end        (a separator behind every step, if any)
                   h1       h2             hS    hEnd  ->  S step scores and the trajectory's score

(ReasonFlux-PRM, arXiv 2506.18896: discriminative heads, a score a step and one for the trajectory.)
There is one tokenisation for training, scoring and evaluation: every step is tokenised by itself
and the ids are put end to end, so where a step ends never depends on its neighbours, and a policy
with another vocabulary makes no difference. All completions of a batch go through one packed
forward in which a prompt stands once. Published heads: prm_heads.py. Left out: generative judges.
    prm = PRM.load("runs/prm"); prm.score([trace, ...])
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from reasonrl import attention, checkpoint, models, pretrained
from reasonrl.batch import pack
from reasonrl.models import Policy
from reasonrl.progress import phase
from reasonrl.prompts import render
from reasonrl.records import Batch, InputError, Problem, Rollout
from reasonrl.rows import Refused
from reasonrl.stepwise import Trace

FORMAT = 1
HEADS = "prm_heads.safetensors"


@dataclass(frozen=True)
class Reading:
    """Where and how the heads are read; what prm.json holds."""

    kind: Literal["sigmoid", "softmax", "value"] = "sigmoid"  # 1 logit, 2 logits, the bare number
    separator: int | None = None  # id behind every step, read there; None: the step's last token
    end: int | None = None  # id behind the whole, where the trajectory head is read; None: no head
    delimiter: str = "\n"  # where a plain completion is cut into steps
    alpha: float = 1.0  # weight of the trajectory's score in the total (eq. 11)


class Encoded(NamedTuple):
    ids: list[int]
    ends: list[int]  # S positions in `ids` at which the step head is read


class Scored(NamedTuple):
    """Scores of one trace, fp32 numbers; `reason` is set where there are none."""

    steps: list[float]
    final: float | None
    reason: str = ""

    def total(self, alpha: float) -> float:
        """Mean of the steps + alpha * final (eq. 11); NaN without steps."""
        mean = math.fsum(self.steps) / len(self.steps) if self.steps else math.nan
        return mean + alpha * self.final if self.final is not None else mean


@dataclass
class PRM:
    """Body and heads. `body.model` has no language-model head; `head` is D -> 1 or 2."""

    body: Policy
    head: nn.Module
    final: nn.Module | None
    reading: Reading
    prompts: dict[str, list[int]] = field(default_factory=dict, repr=False)  # rendered already

    @staticmethod
    def new(policy: Policy, reading: Reading, seed: int = 0) -> PRM:
        """Fresh heads on the body of a policy, which is taken over, not copied."""
        width = policy.model.config.get_text_config().hidden_size
        body = Policy(_bare(policy.model), policy.tokenizer, policy.compute, attn=policy.attn)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Linear(width, 2 if reading.kind == "softmax" else 1)
            final = nn.Linear(width, 1) if reading.end is not None else None
        to = policy.device
        return PRM(body, head.to(to), None if final is None else final.to(to), reading)

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter that learns: the body's and the heads'."""
        own = [*self.head.parameters(), *(self.final.parameters() if self.final else ())]
        return [p for p in self.body.model.parameters() if p.requires_grad] + own

    def to(self, device: torch.device) -> PRM:
        """The same model, moved."""
        for part in (self.body.model, self.head, self.final):
            if part is not None:
                part.to(device)
        return self

    def encode(self, trace: Trace) -> Encoded:
        """The ids of a completion and where its steps end; Refused names the step at fault."""
        tokenizer, reading = self.body.tokenizer, self.reading
        ids: list[int] = []
        ends = []
        for i, step in enumerate(trace.steps):
            own = tokenizer(step, add_special_tokens=False)["input_ids"]
            if not own:
                raise Refused(f"step {i}: expected some tokens, got none for {step[:40]!r}")
            for name, mark in (("separator", reading.separator), ("end", reading.end)):
                if mark is not None and mark in own:
                    token = tokenizer.convert_ids_to_tokens(mark)
                    raise Refused(f"step {i}: holds the {name} token {token!r} inside its text")
            unknown = tokenizer.unk_token_id
            if unknown is not None and unknown in own and tokenizer.unk_token not in step:
                raise Refused(f"step {i}: the tokenizer has no token for a part of {step[:40]!r}")
            ids += own
            if reading.separator is not None:
                ids.append(reading.separator)
            ends.append(len(ids) - 1)
        if reading.end is not None:
            ids.append(reading.end)
        room = self.body.context - len(self._prompt(trace))
        if len(ids) > room:
            over = next((i for i, end in enumerate(ends) if end >= room), len(ends) - 1)
            raise Refused(
                f"step {over}: {len(ids)} tokens of completion, the context of"
                f" {self.body.context} leaves {room}"
            )
        return Encoded(ids, ends)

    def batches(
        self, traces: Sequence[Trace], encoded: Sequence[Encoded], tokens: int
    ) -> Iterator[Batch]:
        """Packed batches of at most `tokens` tokens, the prompts of neighbours shared."""
        prompts: dict[tuple[int, ...], int] = {}
        group = [prompts.setdefault(tuple(self._prompt(t)), len(prompts)) for t in traces]
        rollout = Rollout(
            problems=[Problem(str(i), "") for i in range(len(prompts))],
            prompt_ids=[list(ids) for ids in prompts],
            group=torch.tensor(group, dtype=torch.long),
            completion_ids=[e.ids for e in encoded],
            text=(),
            finished=(),
            logp=(),
            pieces=(),
        )
        return pack(rollout, None, tokens, ends=True)

    def read(self, batch: Batch, encoded: Sequence[Encoded]) -> tuple[Tensor, Tensor, list[int]]:
        """Head outputs of a batch, with gradient: steps (S, K) and trajectories (B, 1), fp32, rows
        in the order of `batch.rows`; and how many steps each of them has."""
        device = self.body.device
        with self.body.autocast():
            plan = attention.Packed(batch.layout, device, attn=self.body.attn)
            ids, positions = batch.input_ids.to(device), batch.position_ids.to(device)
            hidden = self.body.hidden(ids, positions, plan)
        at, ends, counts = [], [], []
        first = iter(_starts(batch))
        for row in batch.rows.tolist():
            start = next(first)
            at += [start + end for end in encoded[row].ends]
            ends.append(start + len(encoded[row].ids) - 1)
            counts.append(len(encoded[row].ends))
        steps = self.head(hidden[torch.tensor(at, device=device)].float())
        last = hidden[torch.tensor(ends, device=device)].float()
        final = self.final(last) if self.final is not None else last.new_zeros(len(ends), 1)
        return steps, final, counts

    @torch.no_grad()
    def score(self, traces: Sequence[Trace], tokens: int = 8192) -> list[Scored]:
        """Scores of every trace in order; one that cannot be read has a reason in their place.

        Equal traces are scored once: samples of one prompt often repeat.
        """
        out: list[Scored] = [Scored([], None, "no steps")] * len(traces)
        known, encoded = [], []
        first: dict[tuple[str, ...], int] = {}
        same = [first.setdefault((repr(t.prompt), *t.steps), i) for i, t in enumerate(traces)]
        with phase("reading", len(traces), "completions") as part:
            for i, trace in enumerate(traces):
                part.add()
                try:
                    if same[i] != i:
                        continue
                    if trace.steps:
                        encoded.append(self.encode(trace))
                        known.append(i)
                except Refused as error:
                    out[i] = Scored([], None, str(error))
        chosen = [traces[i] for i in known]
        was_training = self.body.model.training
        self.body.model.eval()
        with phase("scoring", len(chosen), "completions") as done:
            for batch in self.batches(chosen, encoded, tokens):
                steps, final, counts = self.read(batch, encoded)
                parts = self.probability(steps).cpu().split(counts)
                whole = final.sigmoid()[:, 0].tolist()
                for row, part, value in zip(batch.rows.tolist(), parts, whole, strict=True):
                    last = value if self.final is not None else None
                    out[known[row]] = Scored(part.tolist(), last)
                done.add(len(counts), tokens=batch.input_ids.numel())
        self.body.model.train(was_training)
        return [out[i] for i in same]

    def probability(self, logits: Tensor) -> Tensor:
        """(S, K) head outputs -> (S,) step scores."""
        if self.reading.kind == "softmax":
            return logits.softmax(-1)[:, 1]
        return logits[:, 0].sigmoid() if self.reading.kind == "sigmoid" else logits[:, 0]

    def save(self, folder: Path, model: Any = None) -> None:
        """An ordinary model folder plus prm.json and the heads. model: the body in another form."""
        (self.body.model if model is None else model).save_pretrained(folder)
        self.body.tokenizer.save_pretrained(folder)
        heads = {f"head.{k}": v for k, v in self.head.state_dict().items()}
        if self.final is not None:
            heads |= {f"final.{k}": v for k, v in self.final.state_dict().items()}
        save_file({k: v.detach().cpu().contiguous() for k, v in heads.items()}, folder / HEADS)
        about = {"format": FORMAT, **asdict(self.reading)}
        (folder / models.PRM_FILE).write_text(json.dumps(about, indent=1) + "\n")

    @staticmethod
    def load(folder: str | Path, *, dtype: str = "auto", device: str = "cpu") -> PRM:
        """A PRM folder, or a training run's folder (its last verified checkpoint)."""
        path = Path(folder)
        if not (path / models.PRM_FILE).is_file():
            found = checkpoint.latest_verified(path, clean=False) if path.is_dir() else None
            if found is None or not (found / models.PRM_FILE).is_file():
                raise InputError(
                    f"{folder}: expected a process reward model ({models.PRM_FILE}), found none;"
                    " `reasonrl prm train` makes one"
                )
            path = found
        with pretrained.reading(str(path)):
            about = json.loads((path / models.PRM_FILE).read_text())
            number = about.pop("format")
            reading = Reading(**about)
            heads = load_file(path / HEADS)
            model = pretrained.model(AutoModel, path)
            tokenizer = pretrained.part(AutoTokenizer, path)
        if number != FORMAT or reading.kind not in ("sigmoid", "softmax", "value"):
            raise InputError(f"{path}: {models.PRM_FILE}: expected format {FORMAT}, got {number!r}")
        model.set_attn_implementation(attention.NAME)
        target = models.placed(device)
        body = Policy(model.to(target), tokenizer, models.compute_dtype(dtype, target))
        final = _linear(heads, "final.").to(target) if reading.end is not None else None
        return PRM(body, layers(heads, "head.").to(target), final, reading)

    def _prompt(self, trace: Trace) -> list[int]:
        key = trace.prompt if isinstance(trace.prompt, str) else json.dumps(trace.prompt)
        if key not in self.prompts:
            self.prompts[key] = render(self.body.tokenizer, trace.prompt)
        return self.prompts[key]


def _starts(batch: Batch) -> Iterator[int]:
    """Where every completion of a batch begins among its packed positions."""
    for start, prompt, sizes in batch.layout:
        at = start + prompt
        for size in sizes:
            yield at
            at += size


def _bare(model: Any) -> Any:
    """The body of a causal language model as a model of its own."""
    body = model.get_decoder()
    body.set_attn_implementation(attention.NAME)
    return body


def _linear(heads: dict[str, Tensor], prefix: str) -> nn.Linear:
    weight, bias = heads[f"{prefix}weight"], heads.get(f"{prefix}bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


def layers(heads: dict[str, Tensor], prefix: str) -> nn.Module:
    """One linear layer, or two with a ReLU between them (`0.` and `2.`, as published)."""
    if f"{prefix}weight" in heads:
        return _linear(heads, prefix)
    first, second = _linear(heads, f"{prefix}0."), _linear(heads, f"{prefix}2.")
    return nn.Sequential(first, nn.ReLU(), second)
