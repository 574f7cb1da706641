"""Sampling in process: the prompt once per group, a static cache, rows leave when they end.

Every completion has its own random stream, made from (seed, row), so a text does not depend on its
neighbours' lengths. Recorded log-probabilities are those of the un-truncated distribution at the
sampling temperature; where top-k or top-p truncate, `sampling_logp` holds the truncated ones.
Left out: servers (a later engine behind the same `sample`), refill of a batch while it runs.
Legend: P prompts, B rows (completions), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonrl.attention import Decode, Packed
from reasonrl.batch import first_position, join_positions
from reasonrl.models import Policy
from reasonrl.records import InputError, Problem, Rollout
from reasonrl.segment import decode, pieces
from reasonrl.vision import prepare

BLOCK = 256  # vocabulary entries summed together by the two-level inverse transform


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass
class _Row:
    tokens: list[int]
    logp: list[float]
    sampling_logp: list[float]
    finished: bool = False


def sample(
    policy: Policy,
    problems: Sequence[Problem],
    prompt_ids: Sequence[Sequence[int]],  # P
    group: int,
    sampling: Sampling,
    seed: int | Sequence[int],
    rows: int = 256,
    seen: Sequence[Any] | None = None,  # P, where the prompts are prepared (vision.prepare)
) -> Rollout:
    """`group` completions of each prompt, at most `rows` of them decoded at a time (whole groups).

    seed: one for all; or one for each prompt, and then a text depends on its prompt's alone.
    The images of the problems are looked at here. InputError where a prompt is empty, where prompt
    + max_tokens exceed the model's context, or where images and prompt do not fit together.
    """
    images = seen
    if images is None:
        prompt_ids, images = prepare(policy, problems, prompt_ids)
    for problem, ids in zip(problems, prompt_ids, strict=True):
        if not ids:
            raise InputError(f"problem {problem.id}: the prompt has no tokens")
        if len(ids) + sampling.max_tokens > policy.context:
            raise InputError(
                f"problem {problem.id}: prompt of {len(ids)} tokens + max_completion_length"
                f" {sampling.max_tokens} exceeds the model's context of {policy.context}"
            )
    done: list[_Row] = []
    per_call = max(1, rows // group)
    with policy.inference(), policy.autocast():
        for start in range(0, len(prompt_ids), per_call):
            chunk = prompt_ids[start : start + per_call]
            own = seed if isinstance(seed, int) else seed[start : start + per_call]
            seen = images[start : start + per_call]
            done += _decode(policy, chunk, seen, group, sampling, own, first_row=start * group)
    texts, offsets = [], []
    for row in done:
        texts.append(decode(policy.tokenizer, row.tokens))
        offsets.append(pieces(policy.tokenizer, row.tokens))
    truncated = sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)
    return Rollout(
        problems=problems,
        prompt_ids=prompt_ids,
        group=torch.arange(len(problems)).repeat_interleave(group),
        completion_ids=[row.tokens for row in done],
        text=texts,
        finished=[row.finished for row in done],
        logp=[torch.tensor(row.logp, dtype=torch.float32) for row in done],
        pieces=offsets,
        sampling_logp=[torch.tensor(r.sampling_logp) for r in done] if truncated else None,
        images=images,
    )


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
    each = len(texts) // max(1, len(problems))
    return Rollout(
        problems=problems,
        prompt_ids=prompt_ids,
        group=torch.arange(len(problems)).repeat_interleave(each),
        completion_ids=ids,
        text=[decode(words, row) for row in ids],
        finished=[True] * len(ids),
        logp=[torch.zeros(len(row)) for row in ids],
        pieces=[pieces(words, row) for row in ids],
        images=images,
    )


def _decode(policy, prompt_ids, images, group: int, sampling: Sampling, seed, first_row: int):
    rows = [_Row([], [], []) for _ in range(len(prompt_ids) * group)]
    if sampling.max_tokens == 0 or not rows:
        return rows
    device = policy.device
    owner = torch.arange(len(prompt_ids), device=device).repeat_interleave(group)
    length = torch.tensor([len(ids) for ids in prompt_ids], device=device)
    prefill, last, first = _prefill(policy, prompt_ids, images)
    hidden = last.index_select(0, owner)
    plan = Decode(prefill, owner, length, sampling.max_tokens, first)
    if isinstance(seed, int):
        uniform = _uniform(seed, first_row, len(rows), sampling.max_tokens)
    else:
        uniform = torch.cat([_uniform(own, 0, group, sampling.max_tokens) for own in seed])
    uniform = uniform.to(device)
    live = list(range(len(rows)))  # row number at each position of the running batch
    for t in range(sampling.max_tokens):
        token, *logps = choose(policy.logits(hidden), uniform[:, t], sampling)
        numbers = torch.stack([token.double(), *(x.double() for x in logps)]).tolist()  # one wait
        for row, i, a, b in zip(live, map(int, numbers[0]), *numbers[1:], strict=True):
            if rows[row].finished:
                continue
            rows[row].tokens.append(i)
            rows[row].logp.append(a)
            rows[row].sampling_logp.append(b)
            rows[row].finished = i in policy.eos
        going = [at for at, row in enumerate(live) if not rows[row].finished]
        if not going or t + 1 == sampling.max_tokens:
            break
        if len(going) <= 0.8 * len(live):  # a copy of the cache pays once a fifth has left
            kept = torch.tensor(going, device=device)
            plan.keep(kept)
            token, uniform = token.index_select(0, kept), uniform.index_select(0, kept)
            live = [live[at] for at in going]
        hidden = policy.hidden(token, plan.position, plan)
        plan.step()
    return rows


def _prefill(policy: Policy, prompt_ids, images) -> tuple[Packed, Tensor, Tensor]:
    """The plan with its cache; of every prompt the hidden state that predicts its first new token
    (P, D), and that token's position (P,)."""
    layout, at = [], 0
    for ids in prompt_ids:
        layout.append((at, len(ids), ()))
        at += len(ids)
    flat = torch.tensor([i for ids in prompt_ids for i in ids], device=policy.device)
    looks = images or [None] * len(prompt_ids)
    seen = [look for look in looks if look is not None]
    pairs = list(zip(prompt_ids, looks, strict=True))
    own = [torch.arange(len(ids)) if look is None else look.positions for ids, look in pairs]
    positions = join_positions(own, bool(seen)).to(policy.device)
    first = torch.tensor([first_position(look, len(ids)) for ids, look in pairs])
    plan = Packed(layout, policy.device, keep=True, attn=policy.attn)
    hidden = policy.hidden(flat, positions, plan, seen)
    ends = torch.tensor([start + length - 1 for start, length, _ in layout], device=policy.device)
    return plan, hidden.index_select(0, ends), first.to(policy.device)


def _uniform(seed: int, first_row: int, rows: int, tokens: int) -> Tensor:
    """(rows, tokens) float64 in [0, 1): one independent stream a row."""
    out = torch.empty(rows, tokens, dtype=torch.float64)
    generator = torch.Generator()
    for b in range(rows):
        # splitmix64 of the pair, so that neighbouring seeds give unrelated streams
        z = (seed * 0x9E3779B97F4A7C15 + (first_row + b) * 0xD1342543DE82EF95 + 1) & (2**64 - 1)
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        generator.manual_seed(z >> 1)
        torch.rand(tokens, generator=generator, dtype=torch.float64, out=out[b])
    return out


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row: logits (B, V), uniform (B,) -> token, logp, logp as sampled, all (B,)."""
    scores = logits.float()
    if sampling.temperature > 0:
        scores = scores / sampling.temperature
    top = scores.amax(-1, keepdim=True)
    if sampling.temperature == 0:
        token = scores.argmax(-1)
        logp = (scores.gather(-1, token[:, None]) - scores.logsumexp(-1, keepdim=True))[:, 0]
        return token, logp, torch.zeros_like(logp)
    weight = (scores - top).exp_()
    total = weight.sum(-1)
    kept = _truncate(weight, total, sampling)
    token, mass = _inverse(kept, uniform)
    picked = weight.gather(-1, token[:, None])[:, 0].log()
    return token, picked - total.log(), picked - mass.log()


def _truncate(weight: Tensor, total: Tensor, sampling: Sampling) -> Tensor:
    """Weights outside the top k, or outside the smallest set of mass top_p, become 0."""
    kept = weight
    if 0 < sampling.top_k < weight.shape[-1]:
        floor = weight.topk(sampling.top_k, dim=-1).values[:, -1:]
        kept = kept.where(kept >= floor, 0)
        total = kept.sum(-1)
    if sampling.top_p < 1:
        ordered = kept.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        inside = before < sampling.top_p * total[:, None]  # the first is always inside
        floor = ordered.where(inside, torch.inf).amin(-1, keepdim=True)
        kept = kept.where(kept >= floor, 0)
    return kept


def _inverse(weight: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse transform in two levels: the block by its mass, then the entry inside it."""
    rows, vocabulary = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -vocabulary % BLOCK))
    blocks = padded.view(rows, -1, BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)
    aim = uniform[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, aim, right=True).clamp_(max=ends.shape[1] - 1)
    before = torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    inner = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0]
    inside = inner.double().cumsum(-1)
    at = torch.searchsorted(inside, aim - before, right=True)
    # rounding may aim past the block's own sum: take its last entry that has any mass
    columns = torch.arange(BLOCK, device=weight.device)
    last = columns.where(inner > 0, 0).amax(-1, keepdim=True)
    return (block * BLOCK + torch.minimum(at, last))[:, 0], ends[:, -1].float()
