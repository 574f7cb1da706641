"""A decoder in one call on the CPU: its logits against float64, bits over threads, neighbours and
ways to call it, and the books of the batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_cpu_layers import SIZES, built
from test_native import isa, native  # noqa: F401, fixtures
from test_parity import within

from reasonrl import burst, layers
from reasonrl.attention import Packed
from reasonrl.kernels import native_decode
from reasonrl.kernels.native_draw import draw
from reasonrl.models import Policy

FULL, HALF = torch.float32, torch.bfloat16
SLOTS, WIDTH = 5, 300
LENGTHS = {3: 1, 0: 7, 4: 41, 1: 260}  # of the prompts in slots; more than one pass has
ODD = {"hidden_size": 35, "intermediate_size": 37, "num_attention_heads": 3,
       "num_key_value_heads": 1, "head_dim": 6}  # fmt: skip
WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 16}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "biases and more queries than keys": ("Qwen2", {}),
    "biases everywhere": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "odd": ("Mistral", ODD),
    "norms of heads": ("Qwen3", {"rms_norm_eps": 0.1}),
    "whole vectors": ("Llama", WIDE),
    "a query a key": ("Llama", {"num_key_value_heads": 6}),  # some rows share a tile everywhere
}


def policy_of(name: str, kind: torch.dtype, residual: torch.dtype = FULL) -> Policy:
    family, sizes = MODELS[name]
    known = dict(SIZES)
    SIZES.update(sizes)
    SIZES["max_position_embeddings"] = 512
    try:
        policy = built(family)
    finally:
        SIZES.clear()
        SIZES.update(known)
    for name, parameter in policy.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    policy.model.to(residual)
    assert layers.fuse(policy.model, "auto")
    policy.compute = kind
    return policy


class Held:
    """A decoder and its slots: of every text a part stands as a prompt, the rest follows it."""

    def __init__(self, policy: Policy, slots: int = SLOTS):
        with torch.no_grad():
            self.decoder = burst.whole(policy, WIDTH)
        # what stands behind a slot's end may be anything
        self.shared, self.own = self.decoder.empty(SLOTS, WIDTH), self.decoder.empty(slots, 70)
        for kept in (*self.shared, *self.own):
            kept.view(torch.uint8).fill_(0xFF)
        self.held = self.decoder.holding(self.shared, self.own)
        words, draw = self.decoder.sizes[-1], torch.Generator().manual_seed(3)
        lengths = LENGTHS.items()  # the last word is in no text
        self.text = {s: torch.randint(words - 1, (n,), generator=draw) for s, n in lengths}

    def prompts(self, spans: dict[int, tuple[int, int]], asked: Any = None) -> torch.Tensor:
        """Logits of the tokens `spans` of each text, kept as its prompt."""
        token = torch.cat([self.text[s][a:b] for s, (a, b) in spans.items()])
        home = torch.cat([torch.full((b - a,), s) for s, (a, b) in spans.items()])
        position = torch.cat([torch.arange(a, b) for a, b in spans.values()])
        asked = torch.ones(len(token), dtype=torch.bool) if asked is None else asked
        given = token, home, position + 1, None, position, asked
        return self.decoder.logits(self.held, *given)

    def follow(self, at: dict[int, int], prompt: dict[int, int]) -> torch.Tensor:
        """Of the token `at` of each text, which follows so many of its prompt."""
        token = torch.stack([self.text[s][n] for s, n in at.items()])
        home, position = torch.tensor(list(at)), torch.tensor(list(at.values()))
        seen, slot = torch.tensor([prompt[s] for s in at]), (home + 2) % SLOTS
        asked = torch.ones(len(token), dtype=torch.bool)
        return self.decoder.logits(self.held, token, home, seen, slot, position, asked)


def by_modules(policy: Policy, held: Held) -> torch.Tensor:
    """Logits of all tokens, prompt after prompt."""
    ids, layout, at = list(held.text.values()), [], 0
    for text in ids:
        layout.append((at, len(text), ()))
        at += len(text)
    positions = torch.cat([torch.arange(len(text)) for text in ids])
    with policy.inference(), policy.autocast():
        hidden = policy.hidden(torch.cat(ids), positions, Packed(layout, "cpu"))
        return policy.logits(hidden)


@pytest.mark.parametrize("kinds", [(FULL, FULL), (HALF, FULL), (HALF, HALF)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_prompts_and_of_what_follows(isa, name, kinds):  # noqa: F811
    policy = policy_of(name, *kinds)
    held = Held(policy)
    exact = Policy(copy.deepcopy(policy.model).double(), policy.tokenizer, torch.float64)
    yard = by_modules(policy, held)
    exact.compute = torch.float32  # no autocast
    truth = by_modules(exact, held)
    assert truth.dtype == torch.float64 and yard.dtype == kinds[0]
    last = 67  # tokens of a text that come alone: more than a panel has, none of a prompt's
    prompt = {s: max(1, n - last) for s, n in LENGTHS.items()}
    first = held.prompts({s: (0, n) for s, n in prompt.items()})
    got = {s: [x] for s, x in zip(prompt, first.split(list(prompt.values())), strict=True)}
    for k in range(last):
        at = {s: n + k for s, n in prompt.items() if n + k < LENGTHS[s]}
        for s, row in zip(at, held.follow(at, prompt) if at else (), strict=True):
            got[s].append(row[None])
    found = torch.cat([torch.cat(rows) for rows in got.values()])
    assert found.dtype == kinds[0]
    within(found, truth, yard, 2, scale=float(truth.abs().max()))


@pytest.mark.parametrize("name", ["odd", "whole vectors"])
def test_pairs_by_one_instruction_and_widened_agree(native, name):  # noqa: F811
    if not native.core().has_dots():
        pytest.skip("this CPU has no instruction for pairs of bf16")
    policy = policy_of(name, HALF)
    held, plain = Held(policy), Held(policy)
    plain.decoder = copy.copy(plain.decoder)
    object.__setattr__(plain.decoder, "dots", False)
    plain.held = plain.decoder.holding(plain.shared, plain.own)
    spans = {s: (0, n) for s, n in LENGTHS.items()}
    a, b = held.prompts(spans), plain.prompts(spans)
    exact = Policy(copy.deepcopy(policy.model).double(), policy.tokenizer, torch.float32)
    truth = by_modules(exact, held)
    within(a, truth, b, 2, scale=float(truth.abs().max()))


def siblings(policy: Policy, rows: list[int], prompt: int = 41) -> torch.Tensor:
    """Logits of three tokens each, one after the other, of these completions of one prompt."""
    held = Held(policy)
    held.prompts({4: (0, prompt)})
    home, seen = torch.full((len(rows),), 4), torch.full((len(rows),), prompt)
    slot, asked = torch.tensor(rows), torch.ones(len(rows), dtype=torch.bool)
    found = []
    for k in range(3):
        known = seen, slot, seen + k, asked
        found.append(held.decoder.logits(held.held, slot * 7 + k, home, *known))
    return torch.stack(found, 1)


@pytest.mark.parametrize("kind", [FULL, HALF], ids=str)
@pytest.mark.parametrize("name", ["Llama", "odd", "whole vectors"])
def test_the_same_bits_for_any_threads_and_neighbours(isa, name, kind):  # noqa: F811
    policy, seen, spans = policy_of(name, kind), [], {s: (0, n) for s, n in LENGTHS.items()}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        seen.append((Held(policy).prompts(spans), siblings(policy, [3, 0, 4, 1, 2])))
    for one in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, seen[0], strict=True))
    prompts, following = seen[0]
    ends = torch.tensor(list(LENGTHS.values())).cumsum(0) - 1
    for s, row in zip(spans, ends, strict=True):
        assert torch.equal(Held(policy).prompts({s: spans[s]})[-1], prompts[row])
    for rows in ([3], [4, 1], [2, 3, 0]):
        where = [[3, 0, 4, 1, 2].index(r) for r in rows]
        assert torch.equal(siblings(policy, rows), following[where])


def crowd(policy: Policy, rows: list[int], steps: int = 40) -> dict[int, torch.Tensor]:
    """Logits of completions of two prompts that begin one after the other, where they are asked."""
    held = Held(policy, 13)
    held.prompts({4: (0, 41), 0: (0, 7)})
    words = len(policy.tokenizer) - 1
    found: dict[int, list[torch.Tensor]] = {row: [] for row in rows}
    for k in range(steps):
        slot = torch.tensor([row for row in rows if 2 * row <= k])
        if not len(slot):
            continue
        first, asked = slot < 7, (slot + k) % 3 != 1
        home, seen = torch.where(first, 4, 0), torch.where(first, 41, 7)
        known = seen, slot, seen + k - 2 * slot, asked
        logits = held.decoder.logits(held.held, (slot * 7 + k) % words, home, *known)
        for row, one in zip(slot[asked].tolist(), logits, strict=True):
            found[row].append(one)
    return {row: torch.stack(x) for row, x in found.items()}


@pytest.mark.parametrize("kind", [FULL, HALF], ids=str)
@pytest.mark.parametrize("name", ["odd", "biases and more queries than keys", "a query a key"])
def test_a_crowd_has_the_bits_of_each_alone(isa, name, kind):  # noqa: F811
    policy, seen = policy_of(name, kind), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        seen.append(crowd(policy, list(range(13))))
    for one in [*seen[1:], *(crowd(policy, [row]) for row in (0, 3, 8, 12))]:
        assert all(torch.equal(x, seen[0][row]) for row, x in one.items())


def test_only_those_asked(isa):  # noqa: F811
    policy, spans = policy_of("Llama", HALF), {s: (0, n) for s, n in LENGTHS.items()}
    want, asked = Held(policy).prompts(spans), torch.zeros(sum(LENGTHS.values()), dtype=torch.bool)
    asked[[0, 3, 7, 47, 48, 255, 256, 308]] = True
    assert torch.equal(Held(policy).prompts(spans, asked), want[asked])


def test_a_broken_row_breaks_no_other(isa):  # noqa: F811
    policy = policy_of("Llama", FULL)
    prompt = {s: max(1, n - 1) for s, n in LENGTHS.items()}
    last = {s: n - 1 for s, n in LENGTHS.items() if n > 1}
    held = Held(policy)
    held.prompts({s: (0, n) for s, n in prompt.items()})
    want = held.follow(last, prompt)
    spare = len(policy.tokenizer) - 1
    policy.model.model.embed_tokens.weight.data[spare] = torch.nan
    held = Held(policy)
    held.prompts({s: (0, n) for s, n in prompt.items()})
    held.text[4][-1] = spare
    got = held.follow(last, prompt)
    words = torch.arange(want.shape[1]) != spare  # its own logit is broken for all
    assert got[1].isnan().any()
    assert torch.equal(got[[0, 2]][:, words], want[[0, 2]][:, words])


def books(rows: int, most: int, words: int) -> dict[str, torch.Tensor]:
    whole = {"dtype": torch.long}
    return {
        "token": torch.tensor([3, 5, 7, 2, 11]),
        "length": torch.zeros(SLOTS, **whole),
        "row": torch.tensor([4, 6, 0, 1, 3]),
        "home": torch.tensor([4, 0, 1, 4, 1]),
        "prompt": torch.tensor([41, 7, 260, 41, 260]),
        "done": torch.tensor([False, False, True, False, False]),
        "uniform": torch.rand(rows, most, dtype=torch.float64),
        "tokens": torch.full((rows, most + 1), -1, **whole),
        "count": torch.tensor([1, most - 3, 0, 1, 2, 0, 1]),
        "logp": torch.zeros(rows, most + 1),
        "eos": torch.arange(0, words, 9),
    }


@pytest.mark.parametrize("until", [0, 2])
@pytest.mark.parametrize("kind", [FULL, HALF], ids=str)
def test_the_books_are_those_of_one_token_after_the_other(isa, kind, until):  # noqa: F811
    policy, most, calls = policy_of("Llama", kind), 40, (1, 4, 16)
    spans = {s: (0, n) for s, n in LENGTHS.items()}
    words = len(policy.tokenizer)
    state = books(7, most, words)
    held, other = Held(policy), Held(policy)
    held.prompts(spans), other.prompts(spans)
    mine = {k: v.clone() for k, v in state.items()}
    for n in calls:
        native_decode.DecodeBatch(**mine).go_on(held.held, 0.9, n, until)
    for _ in range(sum(calls)):
        going = (~state["done"]).nonzero()[:, 0]
        if len(going) <= until:
            break
        going = going[state["home"][going].argsort(stable=True)]
        row, seen = state["row"][going], state["prompt"][going]
        asked = torch.ones(len(going), dtype=torch.bool)
        known = seen, going, seen + state["length"][going], asked
        given = state["token"][going], state["home"][going], *known
        at = state["count"][row]
        logits = other.decoder.logits(other.held, *given)
        token, logp = draw(logits, state["uniform"][row, at], 0.9)
        state["tokens"][row, at], state["logp"][row, at] = token, logp
        state["count"][row] += 1
        state["length"][going] += 1
        state["token"][going] = token
        ended = torch.isin(token, state["eos"]) | (at + 1 >= most)
        state["done"][going] = ended
    for name, want in state.items():
        assert torch.equal(mine[name], want), name
    assert state["count"][1] <= most and state["done"].sum() >= 2


@pytest.mark.parametrize("kind", [FULL, HALF], ids=str)
def test_prompts_enter_with_the_first_tokens_of_their_completions(isa, kind):  # noqa: F811
    policy = policy_of("Llama", kind)
    held, other = Held(policy), Held(policy)
    state = books(7, 9, len(policy.tokenizer)) | {"count": torch.zeros(7, dtype=torch.long)}
    asked = torch.zeros(48, dtype=torch.bool)
    asked[[40, 47]] = True
    logits = other.prompts({4: (0, 41), 0: (0, 7)}, asked)
    prompts, at = [held.text[s].tolist() for s in (4, 0)], [3, 0, 4, 1]
    assert torch.equal(held.decoder.prompts(held.held, prompts, [2, 0]), logits)
    native_decode.DecodeBatch(**state).enter(held.held, prompts, [2, 0], at, 2, 0.9)
    token, logp = draw(logits.repeat_interleave(2, 0), state["uniform"][2:6, 0].contiguous(), 0.9)
    assert torch.equal(state["tokens"][2:6, 0], token) and torch.equal(state["token"][at], token)
    assert torch.equal(state["logp"][2:6, 0], logp) and state["count"].tolist() == [
        0,
        0,
        *[1] * 4,
        0,
    ]
    assert torch.equal(state["done"][at], torch.isin(token, state["eos"]))
    found = [state[name][at].tolist() for name in ("row", "home", "prompt", "length")]
    assert found == [[2, 3, 4, 5], [2, 2, 0, 0], [41, 41, 7, 7], [0] * 4]


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("kind", [FULL, HALF], ids=str)
def test_packing_keeps_every_number_once(isa, kind, halves):  # noqa: F811
    parts = [(torch.randn(37, 11), None), (torch.randn(37, 11), torch.randn(37))]
    if not halves:
        parts.append((torch.randn(5, 11).bfloat16(), None))
    wider = [(torch.randn(40, 23), None)]  # whose numbers are to stay in their own product
    _, found = native_decode.pack_linears([(wider, False), (parts, halves)], kind)
    numbers = found.weight.view(kind).float()
    want = torch.cat([w.to(kind).float().flatten() for w, _ in parts])
    assert torch.equal(numbers[numbers != 0].sort().values, want.sort().values)
    assert found.bias is not None
    bias = found.bias[found.bias != 0].sort().values
    assert torch.equal(bias, torch.as_tensor(parts[1][1]).to(kind).float().sort().values)
