"""PRIME: the implicit reward model against logits, the worked examples, order, memory, resume."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from reasonrl import config as configs
from reasonrl import models
from reasonrl.algos import Prime
from reasonrl.algos.base import Start, make
from reasonrl.algos.prime import Held
from reasonrl.batch import cu_seqlens, pack
from reasonrl.logprobs import batch_logp
from reasonrl.lora import merged, trainable
from reasonrl.records import InputError, Problem, Rewards, Rollout, infra, scored
from reasonrl.rewards.implicit import ImplicitPRM
from reasonrl.tasks import make_task
from reasonrl.train import train

SMALL = [
    "model_options={width: 32, layers: 1, heads: 2}",
    "task_options={terms: 2, ops: '+', mod: 5, low: 0, style: compact}",
    "steps=4",
    "cold_start_steps=60",
    "cold_start.batch=32",
    "cold_start.learning_rate=1e-2",
    "prompts_per_step=3",
    "group=4",
    "max_completion_length=12",
    "eval_problems=4",
    "optim.schedule=constant",
    "threads=1",
]
Q = [[2.0, -1.0, 3.0], [-2.0, -2.0], [1.0, 0.0, -1.0, -4.0], [0.0, 4.0]]
WON = [1.0, 0.0, 0.0, 1.0]


class Alone:
    """An accelerator of one process."""

    num_processes = 1
    process_index = 0


def tiny(seed):
    return models.load("tiny", dtype="fp32", seed=seed, width=32, layers=2)


def made_up(sizes=((3, 5, 1), (4, 2, 2)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(4, 90, (n,), generator=generator).tolist()  # noqa: E731
    completions = [ids(n) for row in sizes for n in row]
    return Rollout(
        problems=[Problem(str(g), "", "0") for g in range(len(sizes))],
        prompt_ids=[ids(6) for _ in sizes],
        group=torch.tensor([g for g, row in enumerate(sizes) for _ in row]),
        completion_ids=completions,
        text=[""] * len(completions),
        finished=[True] * len(completions),
        logp=[torch.zeros(len(c)) for c in completions],
        pieces=[[0] * (len(c) + 1) for c in completions],
    )


def plain_logp(policy, rollout):
    """Each completion in its own sequence through transformers, logits and all; differentiable."""
    policy.model.set_attn_implementation("sdpa")
    try:
        out = []
        for b, completion in enumerate(rollout.completion_ids):
            prompt = list(rollout.prompt_ids[int(rollout.group[b])])
            logits = policy.model(torch.tensor([prompt + list(completion)])).logits[0]
            logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
            out.append(logp.gather(1, torch.tensor(completion)[:, None])[:, 0])
        return out
    finally:
        policy.model.set_attn_implementation("reasonrl")


@pytest.mark.parametrize("tokens", [10_000, 12, 1])
def test_scores_loss_and_gradient_are_those_of_the_logits(tokens):
    ref, prm = tiny(0), trainable(tiny(1))
    rollout, beta = made_up(), 0.05
    outcome = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 1.0])
    known = torch.tensor([True, True, True, False, True, True])
    rewards, loss = ImplicitPRM(prm, ref, beta=beta, tokens=tokens).learn(
        rollout, outcome, known, 5.0
    )
    got = {n: p.grad.clone() for n, p in prm.model.named_parameters()}
    prm.model.zero_grad()

    with torch.no_grad():
        base = plain_logp(ref, rollout)
    gaps = [beta * (a - b) for a, b in zip(plain_logp(prm, rollout), base, strict=True)]
    sums = torch.stack([gap.sum() for gap in gaps])[known]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(sums, outcome[known])
    expected.backward()

    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in prm.model.named_parameters():
        error = (got[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-12)
        assert error < 1e-4, name
    for b, (token, gap) in enumerate(zip(rewards.token, gaps, strict=True)):
        if known[b]:
            assert torch.allclose(token, gap.detach(), atol=1e-6)
            assert rewards.outcome[b].value == pytest.approx(float(gap.sum()), abs=1e-6)
        else:
            assert token.isnan().all() and rewards.outcome[b].kind == "unscorable"


def test_the_scorer_gives_what_learning_saw_and_starts_at_zero():
    ref, rollout = tiny(0), made_up()
    prm = ImplicitPRM(trainable(tiny(1)), ref)
    outcome = torch.ones(6)
    seen, _ = prm.learn(rollout, outcome, outcome > 0, 6.0)
    again = prm(rollout)
    assert all(torch.equal(a, b) for a, b in zip(seen.token, again.token, strict=True))
    same = ImplicitPRM(ref.frozen(), ref)(rollout)
    assert all(bool((token == 0).all()) for token in same.token)


def test_its_first_gradient_is_the_policy_gradient_of_the_outcomes():
    """While it equals the reference: with 1/2 for a baseline, the same in every group."""
    rollout, beta = made_up(), 0.7
    prm, ref = tiny(1), tiny(1).frozen()
    outcome = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    known = torch.ones(6, dtype=torch.bool)
    ImplicitPRM(prm, ref, beta=beta, tokens=64).learn(rollout, outcome, known, 6.0)
    policy = tiny(1)
    each = (0.5 - outcome).repeat_interleave(cu_seqlens(rollout).diff())
    for batch in pack(rollout, each, 64):
        (beta / 6.0 * batch.advantage * batch_logp(policy, batch)).sum().backward()
    for mine, theirs in zip(prm.model.parameters(), policy.model.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)
    assert max(float(p.grad.abs().max()) for p in prm.model.parameters()) > 1e-4


def test_another_vocabulary_is_refused(tmp_path):
    other = tiny(1)
    tokenizer = copy.deepcopy(other.tokenizer)
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(InputError, match="vocabulary"):
        ImplicitPRM(models.Policy(other.model, tokenizer), tiny(0))


def prime(**knobs):
    algo = make(Prime, make_task("arithmetic", style="compact"), tiny(0), knobs)
    return algo


def example_rollout():
    return Rollout(
        problems=[Problem("0", "")],
        prompt_ids=[[5]],
        group=torch.zeros(4, dtype=torch.long),
        completion_ids=[[9] * len(q) for q in Q],
        text=[""] * 4,
        finished=[True] * 4,
        logp=[torch.zeros(len(q)) for q in Q],
        pieces=[[0] * (len(q) + 1) for q in Q],
    )


def test_worked_example_of_equation_5():
    rewards = Rewards([scored(o) for o in WON], token=[0.05 * torch.tensor(q) for q in Q])
    a = prime(whiten=False).advantage(rewards, example_rollout())
    expected = [0.916667, 0.8, 0.833333, -0.944444, -0.805556]
    expected += [-0.955556, -0.983333, -0.961111, -0.888889, 0.922222, 0.894444]
    assert torch.allclose(a, torch.tensor(expected), rtol=1e-5, atol=2e-6)


def held_alone(algo):
    object.__setattr__(algo, "held", Held(start=Start(None, False, Alone(), 4096)))  # type: ignore[arg-type]
    return algo


def test_worked_example_of_the_released_code():
    """Raw log-ratios over their largest return, the released baseline, whitened."""
    algo = held_alone(prime(batch_norm=True, batch_norm_floor=1e-6, verl_baseline=True, beta=1.0))
    rollout = example_rollout()
    scores = Rewards([scored(o) for o in WON], token=[torch.tensor(q) for q in Q])
    token = algo._process(scores, rollout)
    a = algo.advantage(Rewards(scores.outcome, token=list(token.split([3, 2, 4, 2]))), rollout)
    expected = [1.108799, 0.816889, 0.981882, -0.858425, -0.541131]
    expected += [-0.883809, -1.023418, -1.010727, -0.845733, 1.121491, 1.134183]
    assert torch.allclose(a, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_flags_of_the_token_rewards():
    rollout = example_rollout()
    scores = Rewards([scored(o) for o in WON], token=[0.05 * torch.tensor(q) for q in Q])
    ends = (cu_seqlens(rollout)[1:] - 1).tolist()
    without = held_alone(prime(last_token=False))._process(scores, rollout)
    whole = held_alone(prime())._process(scores, rollout)
    assert without[ends].tolist() == [0.0] * 4
    rest = [i for i in range(11) if i not in ends]
    assert torch.equal(without[rest], whole[rest])
    # the largest return is .25, under the floor of 1: nothing is blown up
    assert torch.equal(held_alone(prime(batch_norm=True))._process(scores, rollout), whole)


def test_unknown_outcomes_get_no_advantage_and_touch_nothing():
    token = [0.05 * torch.tensor(q) for q in Q]
    base = Rewards([scored(o) for o in WON], token=token)
    five = example_rollout()
    five = Rollout(
        **{
            **five.__dict__,
            "group": torch.zeros(5, dtype=torch.long),
            "completion_ids": [*five.completion_ids, [9, 9]],
            "text": [""] * 5,
            "finished": [True] * 5,
            "logp": [torch.zeros(1)] * 5,
            "pieces": [[0]] * 5,
        }
    )
    more = Rewards([*base.outcome, infra("down")], token=[*token, torch.full((2,), math.nan)])
    for whiten in (False, True):
        algo = held_alone(prime(whiten=whiten))
        a = algo.advantage(more, five)
        assert a[-2:].tolist() == [0.0, 0.0]
        assert torch.allclose(a[:-2], algo.advantage(base, example_rollout()), atol=1e-6)


def begun(policy, **knobs):
    algo = make(Prime, Graded(), policy, {"prm_learning_rate": 0.01, **knobs})
    algo.begin(Start(policy.frozen(), False, Alone(), 4096))  # type: ignore[arg-type]
    return algo


class Graded:
    """Right where the completion's first token id is even."""

    name = "graded"

    def grades(self, problems, completions):
        raise AssertionError("the outcomes are in the rollout")


def graded(rollout):
    outcome = [scored(float(ids[0] % 2 == 0)) for ids in rollout.completion_ids]
    return Rollout(**{**rollout.__dict__, "outcome": outcome})


def test_single_scores_before_the_step_double_after():
    rollout = graded(made_up())
    single, double = begun(tiny(0)), begun(tiny(0), order="double")
    before = single.score(rollout)
    assert all(bool((t == 0).all()) for t in before.token)  # pi_phi is still the reference
    assert single.update(rollout, before)["process/prm_grad_norm"] > 0
    after = single.held.prm(rollout)
    scores = double.score(rollout)
    assert double.update(rollout, scores) == {}
    assert any(bool((t != 0).any()) for t in after.token)
    for a, b in zip(after.token, scores.token, strict=True):
        assert torch.equal(a, b)
    assert scores.metrics["process/prm_loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "knobs",
    [{}, {"lora_rank": 4}, {"reference": "policy"}, {"lora_rank": 4, "reference": "policy"}],
)
def test_it_learns_outcomes_and_the_reference_stands_still(knobs, tmp_path):
    policy = tiny(0)
    first = plain_logp(policy, made_up())
    algo = begun(policy, **knobs)
    rollout = graded(made_up(sizes=((4, 3, 4, 2), (3, 3, 2, 5)), seed=1))
    accuracy = []
    for _ in range(60):
        rewards = algo.score(rollout)
        accuracy.append(rewards.metrics["process/prm_accuracy"])
        algo.update(rollout, rewards)
    assert accuracy[-1] == 1.0 and accuracy[0] < 1.0
    kept = algo.held.prm
    if knobs.get("reference") != "policy":
        base = kept._ref(next(iter(_packed(rollout))))
        again = torch.cat(plain_logp(tiny(0), rollout))
        assert torch.allclose(base, again, atol=1e-5)
    now = plain_logp(policy, made_up())
    assert all(torch.equal(a, b) for a, b in zip(first, now, strict=True))

    algo.save(tmp_path)  # an ordinary checkpoint, a scorer afterwards
    loaded = models.load(str(tmp_path / "prm"), dtype="fp32")
    score = ImplicitPRM(loaded, tiny(0))(rollout)
    for a, b in zip(score.token, algo.score(rollout).token, strict=True):
        assert torch.allclose(a, b, atol=2e-5)
    other = begun(tiny(0), **knobs)
    other.restore(tmp_path)
    for a, b in zip(other.score(rollout).token, score.token, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def _packed(rollout):
    from reasonrl.batch import pack

    return pack(rollout, None, 4096)


def test_a_merged_adapter_is_a_plain_model():
    prm = trainable(tiny(0), lora_rank=3)
    with torch.no_grad():
        for name, p in prm.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    model = merged(prm)
    assert not [n for n, _ in model.named_parameters() if "lora" in n]
    rollout = made_up()
    plain = plain_logp(models.Policy(model, prm.tokenizer), rollout)
    for a, b in zip(plain, plain_logp(prm, rollout), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"beta": 0.0}, "algo.beta"),
        ({"form": "grpo", "verl_baseline": True}, "algo.verl_baseline"),
        ({"lora_rank": 2, "prm": "x"}, "algo.prm"),
        ({"kind": "grpo"}, "algo.kind"),
        ({"prm_updates": 0}, "algo.prm_updates"),
        ({"prm_replay": 3}, "algo.prm_replay"),
        ({"process_warmup": -1}, "algo.process_warmup"),
        ({"prm_average": 1.0}, "algo.prm_average"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(knobs, named):
    with pytest.raises(InputError, match=named):
        prime(**knobs)


def test_the_process_weight_grows_from_nothing():
    algo = held_alone(prime(process_warmup=4, process_weight=2.0, whiten=False))
    rewards = Rewards([scored(o) for o in WON], token=[0.05 * torch.tensor(q) for q in Q])
    found = []
    for step in (1, 2, 4, 5, 9):
        algo.clock.step = step
        found.append(algo.advantage(rewards, example_rollout()))
    outcome = torch.tensor([1.0, 1, 1, -1, -1, -1, -1, -1, -1, 1, 1]) * 2 / 3
    assert torch.allclose(found[0], outcome, atol=1e-6)
    for advantage, share in zip(found[1:], (0.25, 0.75, 1.0, 1.0), strict=True):
        whole = found[-1] - outcome
        assert torch.allclose(advantage - outcome, share * whole, atol=1e-5)


def small(*changes):
    return configs.load("prime", [*SMALL, *changes])


@pytest.mark.parametrize(
    "more",
    [
        ("filter={low: 0.1, high: 0.9, rounds: 4}", "prompts_per_step=2", "seed=1"),
        ("algo={lora_rank: 2, order: double}", "filter={low: 0, high: 1}", "loss.kl_coef=0.01"),
        ("algo={prm_updates: 3, prm_replay: 2, prm_average: 0.9, process_warmup: 3}",),
    ],
)
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, more):
    config = lambda *changes: small(*more, *changes)  # noqa: E731
    assert train(config(), tmp_path / "whole", quiet=True)
    train(config("steps=2"), tmp_path / "broken", quiet=True)
    assert train(config(), tmp_path / "broken", resume=True, quiet=True)
    for name in ("model.safetensors", "prm/model.safetensors", "prm_optimizer.safetensors"):
        a, b = (load_file(tmp_path / run / "checkpoint-4" / name) for run in ("whole", "broken"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    rows = [
        json.loads(line)
        for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert all("process/prm_accuracy" in r and r["process/prm_grad_norm"] > 0 for r in rows)
    if "prm_replay" in more[0]:
        assert [r["process/weight"] for r in rows] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    if "filter" in more[0]:
        assert rows[1]["filter/waiting"] > 0  # what waited went through the checkpoint
