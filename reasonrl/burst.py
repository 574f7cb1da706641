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
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from reasonrl import angles, cpu_layers, heads, structure
from reasonrl.decoding import REFILL, Decoding
from reasonrl.implementations import native
from reasonrl.models import Policy
from reasonrl.slots import GROW
from reasonrl.whole_layer import DTYPES, TYPES

TOKENS = 16  # of a call
MOST = 1 << 29  # weights of a decoder; up to here the kernel was measured as the faster way
AT_ONCE = 1 << 26  # bytes of slots up to which they are as wide at once as they may become


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
        self.held: Any = None  # by the kernel, until slots are other ones
        known = self.token, self.length, self.row, self.home, self.prompt, self.done, self.uniform
        books = *known, self.tokens, self.count, self.logp, self.eos
        draws = self.sampling.temperature > 0 and not self.sampling.truncates
        self.books = native("DecodeBatch")(*books) if draws else None

    def _enter(self, at: Tensor) -> None:
        first, self.entered = self.entered, self.entered + len(at) // self.group
        prompts = [ids for ids, _ in self.prompts[first : self.entered]]
        homes, row = self._homes(len(prompts)), first * self.group
        self._widen(0)
        held = self._hold()
        if self.books:
            given = prompts, homes, at.tolist(), row, self.sampling.temperature
            return self.books.enter(held, *given)
        owner = torch.arange(len(at)) // self.group
        self.length[at], self.home[at] = 0, torch.tensor(homes)[owner]
        self.prompt[at] = torch.tensor([len(ids) for ids in prompts])[owner]
        logits = self.decoder.prompts(held, prompts, homes)
        self._begin(at, torch.arange(row, row + len(at)), logits[owner])

    def _step(self) -> None:
        """Up to `TOKENS` for every slot that goes on, fewer where waiting prompts may enter."""
        longest = max(self.length.tolist())
        self._widen(longest)
        if not self.books:
            return self._choose()
        waiting, slots = len(self.prompts) - self.entered, len(self.done)
        until = slots - max(self.group, math.ceil(REFILL * slots)) if waiting else 0
        most = min(TOKENS, self.width - longest)
        self.books.go_on(self._hold(), self.sampling.temperature, most, max(0, until))

    def _choose(self) -> None:
        """One token for every slot that goes on, from its logits."""
        going = (~self.done).nonzero()[:, 0]
        going = going[self.home[going].argsort(stable=True)]
        seen, row = self.prompt[going], self.row[going]
        asked = torch.ones(len(going), dtype=torch.bool)
        given = self.token[going], self.home[going], seen, going, seen + self.length[going], asked
        token, ended = self._pick(self.decoder.logits(self._hold(), *given), row)
        self.count[row] += 1
        self.length[going] += 1
        self.token[going], self.done[going] = token, ended

    def _homes(self, count: int) -> list[int]:
        """Slots for so many prompts: those that no completion needs, and new ones."""
        taken = set(self.home[~self.done].tolist()) if self.homes else ()
        free = [i for i in range(self.homes) if i not in taken]
        more = max(0, count - len(free))
        if more:
            free += range(self.homes, self.homes + more)
            self.homes += more
            self.shared = self._larger(self.shared, self.homes, self.longest)
        return free[:count]

    def _widen(self, longest: int) -> None:
        """Room for `longest` tokens of a completion and the next one."""
        most = self.sampling.max_tokens
        if longest < self.width:
            return
        whole = sum(x.nbytes for x in self.decoder.empty(1, most)) * len(self.length)
        self.width = most if whole <= AT_ONCE else min(most, longest + GROW)
        self.own = self._larger(self.own, len(self.length), self.width)

    def _larger(self, slots: tuple[Tensor, Tensor], count: int, width: int) -> Any:
        """So many slots of so many tokens that hold what these held."""
        larger, self.held = self.decoder.empty(count, width), None
        for old, new in zip(slots, larger, strict=True):
            if old.numel():
                new[:, : old.shape[1], :, : old.shape[3]] = old
        return larger

    def _hold(self) -> Any:
        if self.held is None:
            self.held = self.decoder.holding(self.shared, self.own)
        return self.held


def takes(policy: Policy) -> bool:
    """Whether the kernel has this policy, and is the faster way."""
    decoder: Any = policy.model.get_decoder()
    if not cpu_layers.known(decoder) or policy.compute not in (torch.float32, torch.bfloat16):
        return False
    if not heads.alone(policy.model):
        return False
    layers, table = [*decoder.layers], structure.weight(decoder.embed_tokens)
    linears = [policy.head, *chain.from_iterable(map(structure.linears, layers))]
    norms = [decoder.norm, *chain.from_iterable(map(structure.norms, layers))]
    weights, scales = [*map(structure.weight, linears)], [*map(structure.weight, norms)]
    biases = [x for x in map(structure.bias, linears) if x is not None]
    return (
        all(map(cpu_layers.plain, linears))
        and all(map(_usable, (table, *weights, *scales, *biases)))
        and len({scale.dtype for scale in scales}) == 1
        and type(decoder.embed_tokens) is nn.Embedding
        and table.dtype in (torch.float32, policy.compute)
        and angles.fixed(decoder.rotary_emb)
        and sum(weight.numel() for weight in weights) <= MOST
    )  # fmt: skip


def whole(policy: Policy, positions: int) -> Any:
    """The decoder and its head, packed as they are now; angles of so many positions."""
    decoder, dtype = policy.model.get_decoder(), policy.compute
    table = decoder.embed_tokens.weight.detach()
    attn, mlp = decoder.layers[0].self_attn, decoder.layers[0].mlp
    size, output = attn.head_dim, policy.head
    heads_of = [x.out_features // size for x in (attn.q_proj, attn.k_proj)]
    sizes = table.shape[1], mlp.gate_proj.out_features, *heads_of, size, output.out_features
    norm, products = decoder.norm, [part for layer in decoder.layers for part in _products(layer)]
    *packed, head = native("pack_linears")([*products, ([_linear(output)], False)], dtype)
    four = zip(*[iter(packed)] * 4, strict=True)
    layers = [_layer(*known) for known in zip(decoder.layers, four, strict=True)]
    known = (
        norm.weight.detach(),
        norm.variance_epsilon,
        head,
        angles.table(decoder.rotary_emb, table, positions),
        sizes,
        dtype,
    )
    return native("WholeDecoder")(layers, table, *known)


def _products(layer: Any) -> list[tuple[list[Any], bool]]:
    """Those of a layer, in `DecodeLayer`'s order."""
    q, k, v, out, gate, up, down = map(_linear, structure.linears(layer))
    return [([q, k, v], False), ([out], False), ([gate, up], True), ([down], False)]


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    return structure.weight(module), structure.bias(module)


def _layer(layer: Any, packed: Sequence[Any]) -> Any:
    first, second, *norms = structure.norms(layer)
    heads = tuple(norm.weight.detach() for norm in norms) or (None, None)
    eps = first.variance_epsilon, second.variance_epsilon
    eps = *eps, norms[0].variance_epsilon if norms else 0.0
    weights = first.weight.detach(), second.weight.detach()
    return native("DecodeLayer")(weights, heads, eps, layer.self_attn.scaling, *packed)


def _usable(parameter: Any) -> bool:
    known = type(parameter) in TYPES and parameter.dtype in DTYPES
    return known and parameter.is_cpu and parameter.is_contiguous()
