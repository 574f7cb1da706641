"""DPO through the loop: the gradient of the pair loss, and a run on a file of pairs."""

import json

import pytest
import torch

from reasonrl import config as configs
from reasonrl import models
from reasonrl.algos import Dpo
from reasonrl.algos.base import Start
from reasonrl.cli import main
from reasonrl.loss import LossSpec
from reasonrl.records import InputError, Problem
from reasonrl.rollout import Sampling
from reasonrl.systems import dpo_loss
from reasonrl.tasks import make_task
from reasonrl.train import train
from reasonrl.update import Learner

PAIRS = [("1+1:", "=2", "=3"), ("2+2:", "so =4", "=5 or 6"), ("0+1:", "=1", "=7")]


def problems(pairs=PAIRS):
    return [
        Problem(str(i), prompt, extra={"chosen": good, "rejected": bad})
        for i, (prompt, good, bad) in enumerate(pairs)
    ]


def tiny(seed):
    return models.load("tiny", dtype="fp32", seed=seed, width=32, layers=1)


def sums(policy, rollout):
    policy.model.set_attn_implementation("sdpa")
    out = []
    for b, completion in enumerate(rollout.completion_ids):
        prompt = list(rollout.prompt_ids[int(rollout.group[b])])
        logp = policy.model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        taken = logp[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])
        out.append(taken.sum())
    policy.model.set_attn_implementation("reasonrl")
    return torch.stack(out)


class Alone:
    num_processes = 1
    process_index = 0


def begun(policy, reference, beta=0.3):
    algo = Dpo(make_task("arithmetic", style="compact"), policy, beta=beta)
    algo.begin(Start(reference, False, Alone(), 64))  # type: ignore[arg-type]
    return algo


def test_the_advantage_gives_the_gradient_of_the_pair_loss():
    policy, reference = tiny(0), tiny(1)
    algo = begun(policy, reference)
    rollout = algo.rollout(problems(), 2, Sampling(0), 0)
    rewards = algo.score(rollout)
    with torch.no_grad():
        ref = sums(reference, rollout)
    own = sums(policy, rollout)
    loss = dpo_loss(own[0::2], ref[0::2], own[1::2], ref[1::2], beta=0.3)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in policy.model.named_parameters()}
    assert rewards.metrics["dpo/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)

    policy.model.zero_grad()
    config = configs.load("tiny", ["batch.tokens=24"])
    from accelerate import Accelerator

    learner = Learner(policy, config, Accelerator(cpu=True))
    spec = LossSpec.named(**Dpo.needs_loss)
    grads = {}
    learner._apply = lambda usable: (
        grads.update(  # type: ignore[method-assign]
            {n: p.grad.clone() for n, p in policy.model.named_parameters()}
        )
        or 0.0
    )
    learner.step(rollout, algo.advantage(rewards, rollout), spec, 1e-3)
    for name, grad in expected.items():
        assert (grads[name] - grad).norm() <= 1e-4 * grad.norm().clamp(min=1e-9), name


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("a", "", "b"), "problem 0: chosen: expected a non-empty text"),
        (("a", "b", None), "problem 0: rejected: expected a non-empty text"),
        (("a", "b", "b"), "chosen and rejected are the same"),
    ],
)
def test_pairs_that_are_none_are_named(pair, message):
    algo = begun(tiny(0), tiny(1))
    with pytest.raises(InputError, match=message):
        algo.rollout(problems([pair]), 2, Sampling(0), 0)


def pair_file(folder):
    path = folder / "pairs.jsonl"
    rows = [
        {
            "prompt": f"{a}+{b}:",
            "answer": str(a + b),
            "chosen": f"={a + b}",
            "rejected": f"={a - b}",
        }
        for a in range(1, 7)
        for b in range(1, 7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SMALL = [
    "model=tiny",
    "model_options={width: 32, layers: 1, heads: 2}",
    "threads=1",
    "eval_problems=0",
]


def test_a_run_learns_the_pairs(tmp_path):
    pairs = pair_file(tmp_path)
    config = configs.load(
        "dpo", [*SMALL, f"task={pairs}", "steps=30", "prompts_per_step=12", "learning_rate=3e-3"]
    )
    assert train(config, tmp_path / "run", quiet=True)
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["dpo/loss"] == pytest.approx(0.693147, rel=1e-4)  # policy = reference
    assert rows[-1]["dpo/loss"] < 0.5 and rows[-1]["dpo/accuracy"] > 0.9


def test_another_loss_is_refused(tmp_path, capsys):
    pairs = pair_file(tmp_path)
    arguments = ["train", "dpo", f"task={pairs}", "loss.name=grpo", "--out", str(tmp_path / "r")]
    assert main([*arguments, *SMALL]) == 2
    assert "loss: dpo needs" in capsys.readouterr().err
