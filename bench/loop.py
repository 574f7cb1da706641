"""The rooms of a step against the least work there is: rollout, one decode step, update, growth.

    python -m bench loop --out bench/results                  # SmolLM2-135M, 8 x 8 x 48 tokens

rollout  tokens a second beside transformers' `generate` on the same prompts and number of tokens.
         Gate: greedy tokens equal `generate`'s, in fp32; both draw exactly the tokens asked for.
decode   one token of all rows, over the bare products of its linear layers (weights packed, and of
         one input joined, as the rollout does). A token's time is that of twice as many tokens less
         that of as many.
update   one optimiser step, over the bare products of the same tokens (forward, dX, dW; the head's
         for completion tokens alone; nothing for attention, norms, loss and AdamW).
growth   step time of one prompt as completions and as tokens double: the time that one takes, over
         that of the smallest.
memory   peak of a process that does an update, as its micro-batches (1024 tokens) grow in number.

Sides alternate; medians over `--repeats` rounds with their range; products are a *floor*. Exit
status 1 where the gate is red.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.machine import high_water, machine
from bench.step_ours import Ours, Settings, now
from reasonrl import cpu_layers
from reasonrl.config import BatchLimit
from reasonrl.records import Rollout
from reasonrl.rollout import Sampling

PARTS = ("rollout", "decode", "update", "growth", "memory")
GOALS = {
    "rollout": "tokens a second at least 3 times generate's",
    "decode": "at most 1.5 times its products",
    "update": "at most 1.3 times its products",
    "growth": "within 15 % of linear",
    "memory": "flat",
}
GREEDY = 16  # tokens of the gate
DOUBLINGS = (1, 2, 4)
MICRO = 1024  # tokens of a micro-batch whose number grows


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    torch.manual_seed(0)
    settings = Settings(
        options.model, options.prompts, options.group, options.tokens, options.prompt_tokens
    )
    if options.alone:  # a process that only shows how much memory so many micro-batches take
        print(peak_of_update(Ours(replace(settings, repeats=0), options.dtype), settings))
        return 0
    facts = machine()
    ours = Ours(replace(settings, repeats=0), options.dtype)
    reason = gate(ours)
    report: dict[str, Any] = {"bench": "loop", "settings": vars(options) | {"out": None}}
    report |= {"machine": facts, "gate": {"green": not reason, "reason": reason}, "parts": {}}
    if reason:
        print(f"red: {reason}")
        return 1
    for part in options.parts:
        found = PART[part](ours, settings, options)
        report["parts"][part] = found
        print(f"{part}: {line(part, found)}   (goal: {GOALS[part]})", flush=True)
    facts["load_after"] = os.getloadavg()
    loads = f"load {facts['load_before'][0]:.2f} -> {facts['load_after'][0]:.2f}"
    print(f"{facts['cpu']}, {facts['threads']} threads, {options.dtype}, {loads}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / time.strftime("loop-%Y%m%d-%H%M%S.json")
        path.write_text(json.dumps(report, indent=1, default=str) + "\n")
        print(f"written to {path}")
    return 0


def gate(ours: Ours) -> str:
    """Why the rollout is not `generate`'s, in fp32 and greedily; empty where it is."""
    policy = replace(ours.policy, compute=torch.float32)
    ids = ours.algo.plain_prompt(ours.problems[:2])
    sampling = Sampling(GREEDY, temperature=0.0)
    mine = replace(ours.algo, policy=policy).rollout(ours.problems[:2], 1, sampling, 0)
    rival = stock(policy.model, torch.float32)
    for row, prompt in enumerate(ids):
        theirs = generate(rival, torch.tensor([prompt]), GREEDY, greedy=True)[0].tolist()
        if theirs != mine.completion_ids[row]:
            return f"prompt {row}: greedy {mine.completion_ids[row]}, generate {theirs}"
    return ""


def generate(model: Any, ids: Tensor, tokens: int, *, greedy: bool = False) -> Tensor:
    """Exactly `tokens` tokens of transformers, (B, T)."""
    own = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
            **own,
        )
    return out[:, ids.shape[1] :]


def timed(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every side, in turn, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(repeats + 1):
        for name, call in sides.items():
            began = now("cpu")
            call()
            if round_:
                times[name].append(now("cpu") - began)
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """Median and range of the rounds' ratios, and both medians."""
    every = [a / b for a, b in zip(over, under, strict=True)]
    return {
        "ratio": statistics.median(every),
        "range": [min(every), max(every)],
        "seconds": [statistics.median(over), statistics.median(under)],
    }


def rollout(ours: Ours, settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    problems = ours.problems[: settings.prompts]
    prompts = ours.algo.plain_prompt(problems)
    width = min(map(len, prompts))
    rows = torch.tensor([p[:width] for p in prompts]).repeat_interleave(settings.group, 0)
    rival = stock(ours.policy.model, ours.policy.compute)
    drawn: dict[str, int] = {}

    def mine() -> None:
        out = ours.algo.rollout(problems, settings.group, Sampling(settings.tokens), 1)
        drawn["ours"] = sum(map(len, out.completion_ids))

    def theirs() -> None:
        drawn["generate"] = generate(rival, rows, settings.tokens).numel()

    times = timed({"ours": mine, "generate": theirs}, options.repeats)
    if len(set(drawn.values())) > 1:
        raise SystemExit(f"bench loop: the sides drew different numbers of tokens: {drawn}")
    speed = {name: drawn[name] / statistics.median(times[name]) for name in times}
    return ratio(times["generate"], times["ours"]) | {"tokens_per_second": speed}


def stock(model: Any, dtype: torch.dtype) -> Any:
    """A copy as a user of `generate` has it: transformers' own attention and layers, weights in the
    dtype."""
    copied = copy.deepcopy(model).to(dtype).eval()
    for module in copied.modules():
        vars(module).pop("forward", None)
    copied.set_attn_implementation("sdpa")
    return copied


def decode(ours: Ours, settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    problems = ours.problems[: settings.prompts]

    def sample(tokens: int) -> Callable[[], Any]:
        return lambda: ours.algo.rollout(problems, settings.group, Sampling(tokens), 1)

    rows, products = settings.prompts * settings.group, []
    with ours.policy.inference():
        alone, together = set(linears(ours.policy.model)), []
        for module, parts in cpu_layers.joinable(ours.policy.model):
            if joined := vars(module).get("joined"):
                together.append((joined, parts[0].in_features))
                alone -= set(parts)
        for product, width in [*together, *((layer, layer.in_features) for layer in alone)]:
            products.append((product, torch.randn(rows, width).to(ours.policy.compute)))

        def floor() -> None:
            for _ in range(settings.tokens):
                for layer, x in products:
                    layer(x)

        bare = timed({"floor": floor}, options.repeats)["floor"]
    sides = {"short": sample(settings.tokens), "long": sample(2 * settings.tokens)}
    times = timed(sides, options.repeats)
    step = [long - short for long, short in zip(times["long"], times["short"], strict=True)]
    found = ratio(step, bare)
    found["seconds"] = [s / settings.tokens for s in found["seconds"]]
    return found


def linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if type(m) is nn.Linear]


def update(ours: Ours, settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    rollout = ours.algo.rollout(
        ours.problems[: settings.prompts], settings.group, Sampling(settings.tokens), 1
    )
    advantage = ours.algo.advantage(ours.algo.score(rollout), rollout)
    count = sum(map(len, rollout.completion_ids))
    packed = sum(map(len, rollout.prompt_ids)) + count
    head, dtype = ours.policy.head, ours.policy.compute
    work = []
    for layer in linears(ours.policy.model):
        size = count if layer is head else packed
        shapes = (size, layer.in_features), (size, layer.out_features)
        x, y = (torch.randn(shape).to(dtype) for shape in shapes)
        work.append((x, y, layer.weight.detach().to(dtype)))

    def floor() -> None:
        for x, y, weight in work:
            _ = (x @ weight.T, y @ weight, y.T @ x)

    def mine() -> None:
        ours.learner.step(rollout, advantage, ours.spec, 1e-6)

    times = timed({"ours": mine, "floor": floor}, options.repeats)
    return ratio(times["ours"], times["floor"]) | {"tokens": packed}


def growth(ours: Ours, settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in (("completions", "group"), ("length", "tokens")):
        sides = {}
        for times in DOUBLINGS:
            value = getattr(settings, field) * times
            sides[str(value)] = _step(ours, replace(settings, prompts=1, **{field: value}))
        seconds = timed(sides, options.repeats)
        a_unit = [statistics.median(seconds[k]) / int(k) for k in sides]
        found[name] = {k: u / a_unit[0] for k, u in zip(sides, a_unit, strict=True)}
    return found


def _step(ours: Ours, settings: Settings) -> Callable[[], Any]:
    def step() -> None:
        ours.settings = settings
        ours.step(0)

    return step


def memory(ours: Ours, settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    peaks, prompts = {}, max(1, settings.prompts // 4)
    for times in DOUBLINGS:
        command = [sys.executable, "-m", "bench", "loop", "--alone", "--dtype", options.dtype]
        command += ["--model", settings.model, "--prompts", str(prompts * times)]
        command += ["--group", str(settings.group), "--tokens", str(settings.tokens)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        peaks[str(prompts * times)] = int(done.stdout.splitlines()[-1])
    return {"prompts": peaks}


def peak_of_update(ours: Ours, settings: Settings) -> int:
    """MiB, of a process that samples nothing: the completions are made up."""
    limit = {"batch": BatchLimit(tokens=MICRO)}
    ours.learner.config = ours.learner.config.model_copy(update=limit)
    problems = ours.problems[: settings.prompts]
    rows = settings.prompts * settings.group
    ids = torch.randint(4, 90, (rows, settings.tokens)).tolist()
    rollout = Rollout(
        problems=problems,
        prompt_ids=ours.algo.plain_prompt(problems),
        group=torch.arange(settings.prompts).repeat_interleave(settings.group),
        completion_ids=ids,
        text=[""] * rows,
        finished=[True] * rows,
        logp=[torch.zeros(settings.tokens)] * rows,
        pieces=[[0] * (settings.tokens + 1)] * rows,
    )
    advantage = ours.algo.advantage(ours.algo.score(rollout), rollout)
    ours.learner.step(rollout, advantage, ours.spec, 1e-6)
    return high_water()


PART = {"rollout": rollout, "decode": decode, "update": update, "growth": growth, "memory": memory}


def line(part: str, found: Mapping[str, Any]) -> str:
    if part == "growth":
        cells = [f"{n} " + " ".join(f"{k}: {v:.2f}" for k, v in found[n].items()) for n in found]
        return "time a unit, " + "; ".join(cells)
    if part == "memory":
        return "peak MiB by prompts, " + ", ".join(f"{k}: {v}" for k, v in found["prompts"].items())
    low, high = found["range"]
    text = f"{found['ratio']:.2f} ({low:.2f}-{high:.2f})"
    if part == "rollout":
        speed = found["tokens_per_second"]
        return (
            f"{text} times generate, {speed['ours']:.0f} against {speed['generate']:.0f} tokens/s"
        )
    first, second = found["seconds"]
    return f"{text} times the products, {1000 * first:.1f} against {1000 * second:.1f} ms"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="a folder")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser
