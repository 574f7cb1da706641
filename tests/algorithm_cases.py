"""Every algorithm as a short run whose completions depend on their problem alone, so that a run of
several ranks can be held against a run of one; what it ends with.

A text is the worked answer, a spoilt one, or nothing at all, by a hash of problem and place: the
lengths are uneven, and groups are right, wrong and mixed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock
from zlib import crc32

import distributed_worker as worker
import pyarrow.parquet
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from reasonrl.loss import LossSpec
from reasonrl.models import Policy
from reasonrl.records import Problem, Rollout
from reasonrl.rollout import Sampling, given
from reasonrl.sharded import Shards, local
from reasonrl.train import train

COMMON = (
    "model_options={width: 32, layers: 1, heads: 2}",
    "prompts_per_step=5",
    "cold_start_steps=0",
    "eval_problems=0",
    "max_completion_length=24",
    "learning_rate=1e-3",
    "optim.warmup=0",
    "optim.eps=1e-5",  # above the rounding of a gradient
    "batch.tokens=96",  # several micro-batches, not as many on every rank
    "log.tokens=false",
)
PLAIN = "loss={name: dapo}"  # no KL: a rank may be left without a live row
NAMED = "grpo bnpo dr_grpo dapo gspo gspo_token cispo sapo gmpo reinforce".split()
PRIME = {
    "rloo": "",
    "grpo": "form: grpo, whiten: false",
    "reinforce": "form: reinforce, last_token: false",
    "verl": "verl_baseline: true, batch_norm: true, batch_norm_floor: 0.001",
    "double": "order: double, gamma: 0.9",
    "policy": "reference: policy, process_warmup: 3",
    "adapter": "lora_rank: 2, prm_updates: 2",
    "average": "prm_average: 0.5, prm_updates: 2",
}
OWN_PRM = "prm_problems: 2, prm_group: 2, prm_steps: 2"
OWN_JUDGE = "judge_problems: 2, judge_samples: 2, judge_steps: 2, style: compact, max_tokens: 8"
CASES: dict[str, tuple[str, ...]] = {
    **{f"loss {n}": (f"loss={{name: {n}, kl_coef: 0.1, entropy_coef: 0.01}}",) for n in NAMED},
    **{f"prime {k}": ("algorithm=prime", f"algo={{prm_learning_rate: 1e-3, {v}}}", PLAIN)
       for k, v in PRIME.items()},
    "grpo": (PLAIN,),
    "grpo two updates": (PLAIN, "updates=2"),
    "grpo rloo": ("algo={kind: rloo}", PLAIN),
    "grpo adapter": ("lora.rank=2", PLAIN),
    "grpo filter": (PLAIN, "filter={low: 0.01, high: 0.49}"),
    "process step": ("algorithm=process", "algo={credit: step, kind: dr_grpo}", PLAIN),
    "process position": ("algorithm=process", "algo={baseline: position}", PLAIN),
    "reasonflux dense": ("algorithm=reasonflux", f"algo={{{OWN_PRM}}}", PLAIN),
    "reasonflux scalar": ("algorithm=reasonflux", f"algo={{mode: scalar, {OWN_PRM}}}", PLAIN),
    "sophia": ("algorithm=sophia", "algo={scorer: rule}", PLAIN),
    "merf": ("algorithm=merf", "task=marks", "algo={text: short, motivated: 0.5}", PLAIN),
    "libra": ("algorithm=libra", f"algo={{{OWN_JUDGE}}}", PLAIN),
    "judging": ("algorithm=judging", "task=judging", "task_options={data: DATA, style: compact}",
                "algo={l_exp: 4, l_max: 12}", "max_completion_length=48", PLAIN),
    "dpo": ("algorithm=dpo", "task=DATA", "task_options={}", "group=2",
            "loss={name: reinforce, reduce: fixed, max_length: 1}"),
    "sft": ("algorithm=sft", "group=1", "loss={name: reinforce}"),
}  # fmt: skip
SHARDED = ("loss grpo", "grpo filter", "grpo adapter", "prime rloo")
DATA = {
    "judging": [
        {"question": f"{a}+{b}", "response": f"={a + b + wrong}", "label": 1 - wrong}
        for a in range(5) for b in range(6) for wrong in (0, 1)
    ],
    "dpo": [
        {"prompt": f"{a}+{b}:", "chosen": f"so ={a + b}", "rejected": "=" + "7" * (1 + a)}
        for a in range(5) for b in range(8)
    ],
}  # fmt: skip


def words(policy: Policy, problems, prompts, group: int, sampling: Sampling, seed) -> Rollout:
    """In place of `sample`."""
    texts = [_text(p, j) for p in problems for j in range(group)]
    return given(policy, problems, prompts, texts)


def _text(problem: Problem, place: int) -> str:
    draw = crc32(f"{problem.id} {place}".encode())
    worked = _worked(problem)
    if draw % 3 == 0:
        return worked
    return worked[: draw // 3 % len(worked)] + "=0" * (draw % 3 - 1)


def verdicts(policy, problems: Sequence[Problem], prompts, votes: int, sampling, seed) -> Rollout:
    """In place of the judge's `sample`: verdicts by a hash of what is judged, some unreadable."""
    draws = [crc32(f"{p.prompt} {v}".encode()) for p in problems for v in range(votes)]
    texts = [("?", "!0", "!1", "!1")[draw % 4] for draw in draws]
    group = torch.arange(len(problems)).repeat_interleave(votes)
    return Rollout(problems, [], group, [], texts, [True] * len(texts), [], [])


def _worked(problem: Problem) -> str:
    return TASK["now"].worked(problem) or "none"


TASK: dict = {}  # the task of the run under way: `sample` is not told


@contextlib.contextmanager
def scripted() -> Iterator[None]:
    from reasonrl import train as loop

    make = loop.make_task

    def noted(*args, **options):
        TASK["now"] = make(*args, **options)
        return TASK["now"]

    with (
        mock.patch("reasonrl.algos.base.sample", words),
        mock.patch("reasonrl.rewards.judge.sample", verdicts),
        mock.patch.object(loop, "make_task", noted),
    ):
        yield


def write_data(out: Path) -> None:
    out.mkdir(exist_ok=True)
    for name, rows in DATA.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def go(name: str, out: Path, kind: str, steps: int, resume: bool = False) -> None:
    """The case's run in out/kind/name up to `steps`; a collective."""
    data = str(out / f"{name}.jsonl")
    changes = [change.replace("DATA", json.dumps(data)) for change in CASES[name]]
    algorithm = [] if any(c.startswith("algorithm=") for c in changes) else ["algorithm=grpo"]
    if not any(c.startswith("algo=") for c in changes):
        changes.append("algo={}")
    config = worker.small(*COMMON, *algorithm, *changes, f"steps={steps}")
    with scripted():
        assert train(config, out / kind / name, resume=resume, quiet=True)


def alone(out: Path, names: Sequence[str] = tuple(CASES)) -> None:
    """Every case unbroken to step 4 in out/one; as it was after step 2 in out/grown too."""
    write_data(out)
    for name in names:
        go(name, out, "one", 2)
        shutil.copytree(out / "one" / name, out / "grown" / name)
        go(name, out, "one", 4, resume=True)


def ranks(out: Path) -> None:
    """Two steps of every case in out/shrunk, for one process to go on with; the last two of
    out/grown, which one process began."""
    for name in CASES:
        go(name, out, "shrunk", 2)
        go(name, out, "grown", 4, resume=True)


def sharded(out: Path, accelerator: Accelerator) -> dict[str, Any]:
    """The same of a few cases with shards, and what a step does that must not change anything; how
    many elements of the policy this rank held, and how many there are."""
    done: dict[str, Any] = {"held": {}, "backend": accelerator.distributed_type.value}
    made: list[Shards] = []
    init = Shards.__init__

    def noted(self: Shards, *args) -> None:
        init(self, *args)
        made.append(self)

    with (
        mock.patch("reasonrl.train.accelerator", lambda *_: accelerator),
        mock.patch.object(Shards, "__init__", noted),
    ):
        for name in SHARDED:
            for kind, steps in (("shrunk", 2), ("grown", 4)):
                go(name, out, kind, steps, resume=steps == 4)
                accelerator.free_memory()
            both = [list(p.model.parameters()) for p in (made[-1].trained, made[-1].policy)]
            parts = [getattr(p, "ds_tensor", local(p)).numel() for p in both[0]]
            done["held"][name] = sum(parts), sum(p.numel() for p in both[1])
    done["dead"] = worker.warm_then_dead(accelerator)
    done["nan"] = poisoned(accelerator)
    return done


def poisoned(accelerator: Accelerator) -> list[Any]:
    """Weights before and after a step in which rank 1 has no finite gradient; its norm."""
    case = worker.CASES["grpo"]
    learner = worker.learner(case, accelerator)
    rollout, advantage = worker.dealt(case, accelerator.process_index, accelerator.num_processes)
    before, trained = worker.snapshot(learner), learner.shards.trained
    if accelerator.process_index == 1:
        plain = trained.at_head
        trained.at_head = lambda *args: plain(*args) * torch.nan  # type: ignore[method-assign]
    metrics = learner.step(rollout, advantage, LossSpec.named("grpo"), 1e-3)
    accelerator.free_memory()
    return [before, worker.snapshot(learner), metrics["grad_norm"]]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path, step: int) -> dict[str, Tensor]:
    """All that was learned: the policy, and a reward model or its average."""
    folder, out = run / f"checkpoint-{step}", {}
    for path in sorted(folder.rglob("*.safetensors")):
        if path.stem not in ("rng", "waiting") and "optimizer" not in path.stem:
            found = load_file(path)
            out |= {f"{path.relative_to(folder)} {k}": v for k, v in found.items()}
    return out


def owners(run: Path) -> list[set[int]]:
    """The ranks, of two, whose groups every step learned from."""
    out = []
    for path in sorted((run / "completions").iterdir()):
        ids = pyarrow.parquet.read_table(path)["id"].to_pylist()
        first = 5 * (len(out))  # problems drawn before it
        out.append({(int(i.split(".")[0]) - first) % 2 for i in ids})
    return out
