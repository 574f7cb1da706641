"""The batch that is being decoded: prompts enter free slots, completions leave when they end.

Every tensor of the batch is written in place. On a GPU a step (model, head, choice, bookkeeping)
is therefore recorded once as a CUDA graph and replayed, without a wait and without Python between
its kernels; the host looks at who has ended every few tokens. A row that has ended before that
goes on writing behind its own end, where nobody reads.
Legend: R completions in all, B slots, T tokens at most of one completion.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reasonrl import keys, lean
from reasonrl.attention import Packed
from reasonrl.batch import first_position, join_positions
from reasonrl.models import Policy
from reasonrl.progress import Phase, phase
from reasonrl.sampling import Sampling, choose
from reasonrl.slots import Slots
from reasonrl.watchdog import beat

LOOK = {"cuda": 8}  # tokens between two looks at who has ended; 1 elsewhere
REFILL = 0.25  # of the slots free, and prompts that wait enter
SHRINK = {"cuda": 0.5}  # of the slots in use, and the rest is given up; 0.8 elsewhere
WORTH = 16  # tokens from which a recording pays
log = keys.logger("reasonrl")
_kept = threading.local()  # of a thread: its last recording, its stream; whether one was refused


class Decoding:
    """`group` completions of every prompt, at most `slots` of them at a time (whole groups)."""

    kernel: Callable[..., tuple[Tensor, Tensor]] | None = None  # that draws, else sampling.py's way

    def __init__(
        self,
        policy: Policy,
        prompt_ids: Sequence[Sequence[int]],
        images: Sequence[Any],
        group: int,
        sampling: Sampling,
        uniform: Tensor,  # (R, T) in [0, 1)
        slots: int,
    ):
        self.policy, self.sampling, self.group = policy, sampling, group
        self.prompts = list(zip(prompt_ids, images or [None] * len(prompt_ids), strict=True))
        self.entered = 0  # prompts
        self.known = 0, 0  # completions that have ended, tokens
        device, total = policy.device, len(self.prompts) * group
        batch = min(max(1, slots // group) * group, total)
        self.uniform = uniform.to(device)
        self.eos = torch.tensor(sorted(policy.eos), dtype=torch.long, device=device)
        # one column more than there are tokens: where rows that have ended write
        shape = total, sampling.max_tokens + 1
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.logp = torch.zeros(shape, device=device)
        self.sampling_logp = torch.zeros(shape, device=device)
        self.count = torch.zeros(total, dtype=torch.long, device=device)
        self.row = torch.arange(batch, device=device)  # (B,) which completion a slot holds
        self.token = torch.zeros_like(self.row)
        self.done = torch.ones(batch, dtype=torch.bool, device=device)
        self.look, self.shrink = LOOK.get(device.type, 1), SHRINK.get(device.type, 0.8)
        self.open(batch, max(map(len, prompt_ids), default=0) + sampling.max_tokens)

    def open(self, slots: int, width: int) -> None:
        """Empty slots of `width` tokens, and the decoder that fills them."""
        self.slots = Slots(slots, width, self.policy.device, self.policy.attn)
        self.hidden = lean.of(self.policy)
        self.kernel = getattr(self.hidden, "draw", None)

    def run(self) -> None:
        """Until every completion has ended or has T tokens: `tokens`, `count`, `logp` then hold
        them."""
        long = self.sampling.max_tokens >= WORTH
        step = Replayed(self._step) if long and self.policy.replays else None
        with phase("sampling", len(self.count), "completions") as part:
            while self._settle(step, part):
                for _ in range(self.look):
                    beat()
                    (step or self._step)()

    def _settle(self, step: Replayed | None, part: Phase) -> bool:
        """Waiting prompts take free slots; slots that nobody needs go; False at the end."""
        slots, waiting = len(self.done), len(self.prompts) - self.entered
        free = sum(self.done.tolist())  # lists: they are short, and an op for each costs more
        going = slots - free
        now = self.entered * self.group - going, sum(self.count.tolist())
        part.add(now[0] - self.known[0], tokens=now[1] - self.known[1])
        self.known = now
        if waiting and free >= self.group and (free >= REFILL * slots or not going):
            ended = self.done.nonzero()[:, 0]
            self._enter(ended[: min(free // self.group, waiting) * self.group])
        elif not going:
            return False
        elif not waiting and going <= self.shrink * slots:
            kept = (~self.done).nonzero()[:, 0]
            self.slots.keep(kept)
            self.row, self.token, self.done = self.row[kept], self.token[kept], self.done[kept]
            if step is not None:
                step.forget()
        return True

    def _enter(self, at: Tensor) -> None:
        """The next prompts into the slots `at`, each with its group, and their first tokens."""
        first, self.entered = self.entered, self.entered + len(at) // self.group
        ids, images = zip(*self.prompts[first : self.entered], strict=True)
        plan, last, position = prefill(self.policy, ids, images, self.hidden)
        owner = torch.arange(len(ids), device=at.device).repeat_interleave(self.group)
        length = torch.tensor([len(x) for x in ids], device=at.device)
        self.slots.put(at, plan, owner, length, position)
        row = torch.arange(len(at), device=at.device) + first * self.group
        logits = self.policy.logits(last.index_select(0, owner))
        self._begin(at, row, logits)

    def _begin(self, at: Tensor, row: Tensor, logits: Tensor) -> None:
        """Completions `row` and their first tokens into the slots `at`."""
        token, ended = self._pick(logits, row)
        self.count[row] = 1
        self.row[at], self.token[at], self.done[at] = row, token, ended

    def _pick(self, logits: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of completions `row`, kept; and whether it is their last."""
        at = self.count[row]
        draw = self.uniform[row, at.clamp(max=self.sampling.max_tokens - 1)]
        token, logp, sampled = choose(logits, draw, self.sampling, self.kernel)
        self.tokens[row, at], self.logp[row, at] = token, logp
        self.sampling_logp[row, at] = sampled
        return token, (token[:, None] == self.eos).any(-1) | (at + 1 >= self.sampling.max_tokens)

    def _step(self) -> None:
        """One token for every slot."""
        going = ~self.done
        self.slots.place()
        hidden = self.hidden(self.token, self.slots.position, self.slots)
        token, ended = self._pick(self.policy.logits(hidden), self.row)
        self.count[self.row] = self.count[self.row] + going
        self.slots.step(going)
        self.token.copy_(token)
        self.done |= ended


class Replayed:
    """A step that is recorded at its second call as a CUDA graph, and replayed from then on; the
    first runs as it is, so that whatever is compiled or chosen once has been."""

    def __init__(self, step: Callable[[], None]):
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def __call__(self) -> None:
        if self.graph is None and self.warm and not getattr(_kept, "refused", False):
            try:
                self.graph = _record(self.step)
            except RuntimeError as error:  # a model that waits for the GPU in its forward
                _kept.refused = True  # said once, tried once: what broke may stay broken
                log.warning("rollout: no CUDA graph (%s); slower, a step at a time", error)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.step()
            self.warm = True

    def forget(self) -> None:
        """The shapes changed."""
        self.graph, self.warm = None, False


def _record(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Without torch.cuda.graph's emptying of the allocator's cache, which the update would pay. All
    recordings of a thread take their memory from one pool, each what the former, which is kept
    for that alone, has left; and they share a stream, because cuBLAS has a workspace for each."""
    graph, former = torch.cuda.CUDAGraph(), getattr(_kept, "graph", None)
    stream = getattr(_kept, "stream", None) or torch.cuda.Stream()
    shared = {} if former is None else {"pool": former.pool()}
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local", **shared)
        try:
            step()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the first error says more
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    _kept.graph, _kept.stream = graph, stream
    return graph


def prefill(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    images: Sequence[Any],
    decoder: Any = None,  # of `lean`, or what gives hidden states otherwise
) -> tuple[Packed, Tensor, Tensor]:
    """The plan with its cache; of every prompt the hidden state that predicts its first new token
    (P, D), and that token's position (P,)."""
    layout, at = [], 0
    for ids in prompt_ids:
        layout.append((at, len(ids), ()))
        at += len(ids)
    flat = torch.tensor([i for ids in prompt_ids for i in ids], device=policy.device)
    seen = [look for look in images if look is not None]
    pairs = list(zip(prompt_ids, images, strict=True))
    own = [torch.arange(len(ids)) if look is None else look.positions for ids, look in pairs]
    positions = join_positions(own, bool(seen)).to(policy.device)
    first = torch.tensor([first_position(look, len(ids)) for ids, look in pairs])
    plan = Packed(layout, policy.device, keep=True, attn=policy.attn)
    if isinstance(decoder, lean.Decoder) and decoder.reads(plan, seen):
        hidden = decoder.read(flat, positions, plan)
    else:
        hidden = policy.hidden(flat, positions, plan, seen)
    ends = torch.tensor([start + length - 1 for start, length, _ in layout], device=policy.device)
    return plan, hidden.index_select(0, ends), first.to(policy.device)
