"""What a judge learns from before RL: judgements by rejection sampling, and other reasoning beside
them (Libra, arXiv 2507.21645).

A model writes `samples` judgements of every row; those whose verdict is the row's label are kept,
at most `keep` a row, as many of right as of wrong answers (a judge that says 1 too often would
otherwise teach itself to). Rows that have nothing to do with judging are mixed in, so that the
model does not forget how to solve what it judges. `taught` is the supervised training in process
that algorithm `libra` uses where nobody gave it a judge. Verdicts [1, 0, 1, 1] for label 0: the
second is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reasonrl.batch import lengths, pack
from reasonrl.chat import ChatClient
from reasonrl.loss import LossSpec
from reasonrl.models import Policy
from reasonrl.prompts import render
from reasonrl.records import InputError, NonFiniteStop, Problem
from reasonrl.rollout import Sampling, given, sample
from reasonrl.tasks.base import Draws
from reasonrl.tasks.judging import Judging
from reasonrl.tasks.rows import read_problems
from reasonrl.update import Trainable, rate_at

ROWS = 256  # judgements decoded together
PATIENCE = 3  # steps in a row with a gradient that is not finite


@dataclass(frozen=True)
class Sampled:
    """How judgements are sampled and which stay."""

    samples: int = 4
    keep: int = 1  # of a row, at most
    rejection: bool = True  # False: whatever was sampled stays, the ablation
    seed: int = 0


def kept(verdicts: Sequence[int | str], label: int, rejection: bool = True) -> list[int]:
    """Which judgements of one row stay: those whose verdict is the label, or all."""
    return [i for i, verdict in enumerate(verdicts) if not rejection or verdict == label]


def traces(
    teacher: Policy | ChatClient,
    task: Judging,
    problems: Sequence[Problem],
    sampling: Sampling,
    how: Sampled,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of judgements to learn from (`prompt`, `worked`, `label`), and what was counted.

    InputError where no row is left.
    """
    texts = _texts(teacher, problems, sampling, how)
    rows: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    right = parsed = 0
    for problem, answers in zip(problems, texts, strict=True):
        label = problem.extra["label"]
        verdicts = [task.verdict(problem, text) for text in answers]
        parsed += sum(not isinstance(v, str) for v in verdicts)
        right += sum(v == label for v in verdicts)
        chosen = [answers[i] for i in kept(verdicts, label, how.rejection) if answers[i].strip()]
        for number, text in enumerate(list(dict.fromkeys(chosen))[: how.keep]):
            row = {"id": f"{problem.id}-{number}", "prompt": problem.prompt, "worked": text}
            rows[label].append(row | {"kind": "judging", "label": label})
    draws, size = Draws("judgements", how.seed), min(map(len, rows.values()))
    chosen = [row for side in rows.values() for row in draws.shuffled(side)[:size]]
    sampled = sum(map(len, texts))
    if not chosen:
        raise InputError(
            f"judge train: {right} of {sampled} judgements agree with their labels, and none is"
            " left with as many of right as of wrong answers; start with --stage gold, or give a"
            " --teacher"
        )
    counts = {"rows": len(problems), "sampled": sampled, "parsed": parsed, "agree": right}
    return draws.shuffled(chosen), counts | {"judgements": len(chosen)}


def mixed(
    rows: Sequence[dict[str, Any]], path: str | Path, share: float, seed: int
) -> list[dict[str, Any]]:
    """The rows with others from a file among them, `share` of the whole; InputError names a row
    without a worked completion, or a file with too few."""
    others = []
    for problem in read_problems(path):
        text = problem.extra.get("worked", problem.extra.get("completion"))
        if not isinstance(text, str) or not text:
            raise InputError(
                f"{path}: row {problem.id}: field 'worked': expected some text, got {text!r}"
            )
        others.append({"prompt": problem.prompt, "worked": text, "kind": "other"})
    wanted = round(len(rows) * share / (1 - share))
    if wanted > len(others):
        raise InputError(f"{path}: expected at least {wanted} rows to mix in, got {len(others)}")
    draws = Draws("mixed", seed)
    chosen = draws.shuffled(others)[:wanted]
    named = [row | {"id": f"other-{i}"} for i, row in enumerate(chosen)]
    return draws.shuffled([*rows, *named])


def taught(
    policy: Policy,  # is trained, in place
    problems: Sequence[Problem],
    texts: Sequence[str],  # a worked completion for each
    *,
    steps: int,
    batch: int = 64,
    learning_rate: float = 1e-3,
    tokens: int = 8192,  # of one micro-batch, at most
    seed: int = 0,
    note: Callable[[str], None] = print,
) -> Policy:
    """Supervised training on worked completions: every rank does the same, alone."""
    spec, module = LossSpec.named("reinforce"), Trainable(policy, 1.0)
    weights = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    order: list[int] = []
    policy.model.train()
    skipped = 0
    for step in range(1, steps + 1):
        while len(order) < batch:
            order += Draws("taught", seed, step).shuffled(range(len(problems)))
        chosen, order = order[:batch], order[batch:]
        prompts = [render(policy.tokenizer, problems[i].prompt) for i in chosen]
        rollout = given(policy, [problems[i] for i in chosen], prompts, [texts[i] for i in chosen])
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, learning_rate, 20, "linear", 0.0)
        total, loss = sum(lengths(rollout)), 0.0
        for part in pack(rollout, torch.ones(total), tokens):
            out, _ = module(part, spec, total)
            out.backward()
            loss += float(out.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(weights, 1.0))
        skipped = 0 if norm == norm and norm != float("inf") else skipped + 1
        if skipped >= PATIENCE:
            raise NonFiniteStop(f"the judge's gradient was not finite {PATIENCE} times")
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(1, steps // 5) == 0:
            note(f"judge: step {step}/{steps}  loss {loss:.4f}")
    policy.model.eval().requires_grad_(False)
    return policy


def _texts(
    teacher: Policy | ChatClient, problems: Sequence[Problem], sampling: Sampling, how: Sampled
) -> list[list[str]]:
    """`samples` judgements of every row; none where the prompt is too long or the server failed."""
    if isinstance(teacher, ChatClient):
        numbers = range(how.samples)
        replies = teacher.ask(
            [problem.prompt for problem in problems for _ in numbers],
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seeds=[(how.seed * 1_000_003 + n) % 2**31 for _ in problems for n in numbers],
        )
        texts = [reply if isinstance(reply, str) else "" for reply in replies]
        return [texts[i : i + how.samples] for i in range(0, len(texts), how.samples)]
    prompts = [render(teacher.tokenizer, problem.prompt) for problem in problems]
    room = teacher.context - sampling.max_tokens
    fits = [i for i, ids in enumerate(prompts) if len(ids) <= room]
    asked, ids = [problems[i] for i in fits], [prompts[i] for i in fits]
    done = sample(teacher, asked, ids, how.samples, sampling, how.seed, ROWS)
    out: list[list[str]] = [[] for _ in problems]
    for at, i in enumerate(fits):
        out[i] = list(done.text[at * how.samples : (at + 1) * how.samples])
    return out
