"""Sampling in process: the prompt once per group, a static cache, rows leave when they end.

Recorded log-probabilities are those of the un-truncated distribution at the sampling temperature;
where top-k or top-p truncate, `sampling_logp` holds the truncated ones. The batch itself is
decoding.py's, the choice of a token sampling.py's. A policy with an `engine` is sampled by that
server. Legend: P prompts, B rows (completions).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reasonrl import burst
from reasonrl.decoding import Decoding
from reasonrl.models import Policy
from reasonrl.records import InputError, Problem, Rollout
from reasonrl.sampling import Sampling, own_seed, streams
from reasonrl.segment import decode, parts_of, pieces
from reasonrl.vision import prepare


def sample(
    policy: Policy,
    problems: Sequence[Problem],
    prompt_ids: Sequence[Sequence[int]],  # P
    group: int,
    sampling: Sampling,
    seed: int | Sequence[int],
    rows: int = 256,
    seen: Sequence[Any] | None = None,  # P, where the prompts are prepared (vision.prepare)
    done: Callable[[Rollout], None] | None = None,  # gets a group that a server has drawn at once
) -> Rollout:
    """`group` completions of each prompt, at most `rows` of them decoded at a time (whole groups).

    seed: one for all; or one for each prompt, and then a text depends on its prompt's alone.
    The images of the problems are looked at here. InputError where a prompt is empty, where prompt
    + max_tokens exceed the model's context, or where images and prompt do not fit together.
    """
    images = seen
    if images is None:
        prompt_ids, images = prepare(policy, problems, prompt_ids)
    context = policy.context
    for problem, ids in zip(problems, prompt_ids, strict=True):
        if not ids:
            raise InputError(f"problem {problem.id}: the prompt has no tokens")
        if len(ids) + sampling.max_tokens > context:
            raise InputError(
                f"problem {problem.id}: prompt of {len(ids)} tokens + max_completion_length"
                f" {sampling.max_tokens} exceeds the model's context of {context}"
            )
    if policy.engine is not None:
        return _served(policy, problems, prompt_ids, group, sampling, seed, images, done)
    if isinstance(seed, int):
        uniform = streams(seed, 0, len(prompt_ids) * group, sampling.max_tokens)
    else:
        own = [streams(one, 0, group, sampling.max_tokens) for one in seed]
        uniform = torch.cat(own) if own else torch.empty(0, sampling.max_tokens)
    whole = burst.takes(policy)  # by a kernel that asks no module, whatever its mode
    kind = burst.Burst if whole else Decoding
    with torch.no_grad() if whole else policy.inference(), policy.autocast():
        batch = kind(policy, prompt_ids, images, group, sampling, uniform, rows)
        if sampling.max_tokens > 0:
            batch.run()
    count, eos = batch.count.tolist(), policy.eos
    ids = [row[:n] for row, n in zip(batch.tokens.tolist(), count, strict=True)]
    text, at = _read(policy.tokenizer, ids)
    return Rollout(
        problems=problems,
        prompt_ids=prompt_ids,
        group=torch.arange(len(problems)).repeat_interleave(group),
        completion_ids=ids,
        text=text,
        finished=[bool(row) and row[-1] in eos for row in ids],
        logp=_cut(batch.logp, count),
        pieces=at,
        sampling_logp=_cut(batch.sampling_logp, count) if sampling.truncates else None,
        images=images,
    )


def _served(
    policy: Policy, problems, prompt_ids, group: int, sampling, seed, images, done
) -> Rollout:
    """The same from the policy's server; its log-probabilities are of what it drew from."""
    if any(image is not None for image in images or ()):
        raise InputError("engine: a rollout server takes no images here; sample in process")
    rows, seeds = _requests(prompt_ids, group, sampling, seed)
    words = policy.head.weight.shape[0]
    there: dict[int, Any] = {}

    def seen(row: int, one: Any) -> None:
        there[row] = one
        g = row // group
        mine = [there[b] for b in range(g * group, (g + 1) * group) if b in there]
        if len(mine) == group:
            done(_drawn(policy, [problems[g]], [prompt_ids[g]], group, mine))

    how = (sampling, seeds, sorted(policy.eos), words)
    found = policy.engine.complete(rows, *how, seen=done and seen)
    return _drawn(policy, problems, prompt_ids, group, found)


def _drawn(policy: Policy, problems, prompt_ids, group: int, found: Sequence[Any]) -> Rollout:
    """What a server drew, `group` completions of each problem, as a rollout."""
    each = len(prompt_ids) * group
    ids = [one.tokens for one in found] or [[]] * each
    text, at = _read(policy.tokenizer, ids)
    logp = [torch.tensor(one.logp) for one in found] or [torch.zeros(0)] * each
    return Rollout(
        problems=problems,
        prompt_ids=prompt_ids,
        group=torch.arange(len(problems)).repeat_interleave(group),
        completion_ids=ids,
        text=text,
        finished=[bool(row) and row[-1] in policy.eos for row in ids],
        logp=logp,
        pieces=at,
        sampling_logp=logp,
        served=True,
    )


def begin(policy: Policy, prompt_ids, group: int, sampling: Sampling, seed: int) -> None:
    """Let the policy's server draw, while this process goes on, what a `sample` of the same
    arguments will ask for."""
    rows, seeds = _requests(prompt_ids, group, sampling, seed)
    words = policy.head.weight.shape[0]
    policy.engine.begin(rows, sampling, seeds, sorted(policy.eos), words)


def _requests(prompt_ids, group: int, sampling: Sampling, seed) -> tuple[list, list[int]]:
    """Prompt and seed of every completion; none where no token is asked for."""
    if not sampling.max_tokens:
        return [], []
    if isinstance(seed, int):
        seeds = [own_seed(seed, row, bits=31) for row in range(len(prompt_ids) * group)]
    else:
        seeds = [own_seed(one, row, bits=31) for one in seed for row in range(group)]
    return [ids for ids in prompt_ids for _ in range(group)], seeds


def given(
    policy: Policy,
    problems: Sequence[Problem],
    prompt_ids: Sequence[Sequence[int]],  # P
    texts: Sequence[str],  # B, as many for every problem, one problem after the other
) -> Rollout:
    """Completions that somebody else wrote, with the token that ends them, as a rollout."""
    words = policy.tokenizer
    ids = [[*words.encode(t, add_special_tokens=False), words.eos_token_id] for t in texts]
    prompt_ids, images = prepare(policy, problems, prompt_ids)
    text, at = _read(words, ids)
    each = len(texts) // max(1, len(problems))
    return Rollout(
        problems=problems,
        prompt_ids=prompt_ids,
        group=torch.arange(len(problems)).repeat_interleave(each),
        completion_ids=ids,
        text=text,
        finished=[True] * len(ids),
        logp=[torch.zeros(len(row)) for row in ids],
        pieces=at,
        images=images,
    )


def _read(tokenizer: Any, ids: Sequence[Sequence[int]]) -> tuple[list[str], list[list[int]]]:
    """The texts, and where each token starts."""
    text = [decode(tokenizer, row) for row in ids]
    known = parts_of(tokenizer, ids)
    return text, [pieces(tokenizer, row, t, known) for row, t in zip(ids, text, strict=True)]


def _cut(rows: Tensor, count: Sequence[int]) -> list[Tensor]:
    return [row[:n].clone() for row, n in zip(rows.cpu(), count, strict=True)]
