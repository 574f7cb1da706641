"""Several new tokens a call on a CPU: the batch of decoding.py where one kernel has the whole
decoder, its head and the draw.

A token of a small model is hundreds of small calls; here it is a part of one. Weights are packed
once a rollout, for this kernel alone: prompts enter by it too. Rows that have ended cost nothing,
so no slot is given up. The numbers are those of the modules, in another order of sums.
Shapes: S slots of W tokens, K key heads of d, P prompts, V words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reasonrl import cpu_layers, heads, structure
from reasonrl.decoding import REFILL, Decoding
from reasonrl.implementations import native
from reasonrl.models import Policy
from reasonrl.slots import GROW
from reasonrl.whole_layer import DTYPES, TYPES

TOKENS = 16  # of a call
MOST = 1 << 29  # weights of a decoder; up to here the kernel was measured as the faster way
AT_ONCE = 1 << 26  # bytes of slots up to which they are as wide at once as they may become
FIXED = ("default", "linear", "llama3", "yarn")  # rotary embeddings whose angles nothing changes


class Burst(Decoding):
    """`Decoding` of a policy that `takes` allows."""

    def open(self, slots: int, width: int) -> None:
        self.decoder = whole(self.policy, width)
        self.longest = width - self.sampling.max_tokens  # of a prompt
        self.width, self.own = 0, self.decoder.empty(slots, 0)  # what a completion has for itself
        self.homes, self.shared = 0, self.decoder.empty(0, 0)  # what a prompt's have together
        self.length = torch.zeros(slots, dtype=torch.long)  # tokens kept of a slot's completion
        self.home, self.prompt = torch.zeros_like(self.length), torch.zeros_like(self.length)
        self.shrink = 0.0
        self.draws = self.sampling.temperature > 0 and not self.sampling.truncates

    def _enter(self, at: Tensor) -> None:
        first, self.entered = self.entered, self.entered + len(at) // self.group
        prompts = [ids for ids, _ in self.prompts[first : self.entered]]
        length = torch.tensor([len(ids) for ids in prompts])
        home = self._homes(len(prompts))
        self._widen(0)
        token = torch.tensor([i for ids in prompts for i in ids])
        position = torch.cat([torch.arange(len(ids)) for ids in prompts])
        asked = torch.zeros(len(token), dtype=torch.bool)
        asked[length.cumsum(0) - 1] = True
        given = token, home.repeat_interleave(length), position + 1, None, position, asked
        logits = self.decoder.logits(self.held, *given)
        self.length[at], self.home[at] = 0, home.repeat_interleave(self.group)
        self.prompt[at] = length.repeat_interleave(self.group)
        row = torch.arange(len(at)) + first * self.group
        self._begin(at, row, logits.repeat_interleave(self.group, 0))

    def _step(self) -> None:
        """Up to `TOKENS` for every slot that goes on, fewer where waiting prompts may enter."""
        longest = int(self.length.max())
        self._widen(longest)
        if not self.draws:
            return self._choose()
        known = self.token, self.length, self.row, self.home, self.prompt, self.done, self.uniform
        batch = native("DecodeBatch")(*known, self.tokens, self.count, self.logp, self.eos)
        waiting, slots = len(self.prompts) - self.entered, len(self.done)
        until = slots - max(self.group, math.ceil(REFILL * slots)) if waiting else 0
        most = min(TOKENS, self.width - longest)
        batch.go_on(self.held, self.sampling.temperature, most, max(0, until))

    def _choose(self) -> None:
        """One token for every slot that goes on, from its logits."""
        going = (~self.done).nonzero()[:, 0]
        going = going[self.home[going].argsort(stable=True)]
        seen, row = self.prompt[going], self.row[going]
        asked = torch.ones(len(going), dtype=torch.bool)
        given = self.token[going], self.home[going], seen, going, seen + self.length[going], asked
        token, ended = self._pick(self.decoder.logits(self.held, *given), row)
        self.count[row] += 1
        self.length[going] += 1
        self.token[going], self.done[going] = token, ended

    def _homes(self, count: int) -> Tensor:
        """Slots for so many prompts: those that no completion needs, and new ones."""
        taken = set(self.home[~self.done].tolist())
        free = [i for i in range(self.homes) if i not in taken]
        more = max(0, count - len(free))
        if more:
            free += range(self.homes, self.homes + more)
            self.homes += more
            self.shared = self._larger(self.shared, self.homes, self.longest)
            self.held = self.decoder.holding(self.shared, self.own)
        return torch.tensor(free[:count])

    def _widen(self, longest: int) -> None:
        """Room for `longest` tokens of a completion and the next one."""
        most = self.sampling.max_tokens
        if longest < self.width:
            return
        one = self.decoder.empty(1, most)
        whole = sum(x.nbytes for kept in one for x in kept) * len(self.length)
        self.width = most if whole <= AT_ONCE else min(most, longest + GROW)
        self.own = self._larger(self.own, len(self.length), self.width)
        self.held = self.decoder.holding(self.shared, self.own)

    def _larger(self, slots: list[Any], count: int, width: int) -> list[Any]:
        """So many slots of so many tokens that hold what these held."""
        larger = self.decoder.empty(count, width)
        for before, after in zip(slots, larger, strict=True):
            for old, new in zip(before, after, strict=True):
                new[: len(old), :, : old.shape[2]] = old
        return larger


def takes(policy: Policy) -> bool:
    """Whether the kernel has this policy, and is the faster way."""
    decoder: Any = policy.model.get_decoder()
    if not cpu_layers.known(decoder) or policy.compute not in (torch.float32, torch.bfloat16):
        return False
    if heads.scale_of(policy.model) != 1.0 or policy.softcap is not None:
        return False
    layers, table = list(decoder.layers), structure.weight(decoder.embed_tokens)
    linears = [policy.head, *(x for layer in layers for x in structure.linears(layer))]
    norms = [decoder.norm, *(x for layer in layers for x in structure.norms(layer))]
    weights = [*map(structure.weight, linears)]
    scales = [*map(structure.weight, norms)]
    biases = [x for x in map(structure.bias, linears) if x is not None]
    return (
        all(map(cpu_layers.plain, linears))
        and all(map(_usable, (table, *weights, *scales, *biases)))
        and len({scale.dtype for scale in scales}) == 1
        and type(decoder.embed_tokens) is nn.Embedding
        and table.dtype in (torch.float32, policy.compute)
        and getattr(decoder.rotary_emb, "rope_type", None) in FIXED
        and sum(weight.numel() for weight in weights) <= MOST
    )  # fmt: skip


def whole(policy: Policy, positions: int) -> Any:
    """The decoder and its head, packed as they are now; angles of so many positions."""
    decoder, dtype = policy.model.get_decoder(), policy.compute
    table = decoder.embed_tokens.weight.detach()
    at = torch.arange(max(1, positions))[None]
    cos, sin = (x[0].contiguous() for x in decoder.rotary_emb(table[:1, None], at))
    layers = [_layer(layer, dtype) for layer in decoder.layers]
    attn, mlp = decoder.layers[0].self_attn, decoder.layers[0].mlp
    size = attn.head_dim
    heads_of = [x.out_features // size for x in (attn.q_proj, attn.k_proj)]
    sizes = table.shape[1], mlp.gate_proj.out_features, *heads_of, size, policy.head.out_features
    norm, head = decoder.norm, _packed([policy.head], dtype)
    known = norm.weight.detach(), norm.variance_epsilon, head, (cos, sin), sizes, dtype
    return native("WholeDecoder")(layers, table, *known)


def _layer(layer: Any, dtype: torch.dtype) -> Any:
    *qkv, out, gate, up, down = structure.linears(layer)
    first, second, *norms = structure.norms(layer)
    heads = tuple(norm.weight.detach() for norm in norms) or (None, None)
    eps = first.variance_epsilon, second.variance_epsilon
    return native("DecodeLayer")(
        (first.weight.detach(), second.weight.detach()), heads,
        (*eps, norms[0].variance_epsilon if norms else 0.0), layer.self_attn.scaling,
        _packed(qkv, dtype), _packed([out], dtype), _packed([gate, up], dtype, halves=True),
        _packed([down], dtype),
    )  # fmt: skip


def _packed(linears: Sequence[nn.Linear], dtype: torch.dtype, halves: bool = False) -> Any:
    return native("pack_linear")([(x.weight, x.bias) for x in linears], dtype, halves)


def _usable(parameter: Any) -> bool:
    known = type(parameter) in TYPES and parameter.dtype in DTYPES
    return known and parameter.is_cpu and parameter.is_contiguous()
