"""Trust-GRPO inside TRL's trainer: our numbers on TRL's groups, its clock, its tables."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from trl_tiny import ROWS, trainer

import reasonrl as rr
from reasonrl.integrations.trl import Trust
from reasonrl.integrations.trl_rows import rollout_of
from reasonrl.records import InputError, Rewards, Score, Step, infra, scored, unscorable
from reasonrl.rewards.thinking import ThinkingScorer

OUTCOME = [1.0, 1, 1, 0, 0, 0, 0, 1]  # the worked example: mu_c 0.2, mu_w 0.825
THINKING = [0.2, 0.3, 0.1, 0.9, 0.8, 0.9, 0.7, 0.2]


class Known:
    """A reward function and a scorer that go by the columns of a row: `o` and `t`, one number, or
    a list with one for every place in the group."""

    def __init__(self):
        self.asked, self.problems, self.evaluated, self.table = [], [], [], {}

    def outcome(self, completion_ids, o, t, **_):
        pick = lambda v, i: v[i % len(v)] if isinstance(v, list) else v  # noqa: E731
        rows = list(zip(completion_ids, o, t, strict=True))
        self.table = {tuple(ids): pick(think, i) for i, (ids, _, think) in enumerate(rows)}
        assert len(self.table) == len(rows)  # random completions: no two are the same
        return [pick(value, i) for i, (_, value, _) in enumerate(rows)]

    def __call__(self, rollout):
        found = [self.table[tuple(ids)] for ids in rollout.completion_ids]
        self.asked += found
        self.problems += [rollout.problems[g].prompt for g in rollout.group.tolist()]
        return [v if isinstance(v, Score) else scored(v) for v in found]


def scored_batch(t, outcome, thinking, first=0):
    """What the trainer makes of completions whose outcome and thinking are these."""
    rows = [
        {"prompt": ROWS[(first + i) // t.num_generations]["prompt"], "o": o, "t": s}
        for i, (o, s) in enumerate(zip(outcome, thinking, strict=True))
    ]
    t.model.train()
    torch.manual_seed(0)
    return t._generate_and_score_completions(rows)


def one(folder, **options):
    known = Known()
    t = trainer(folder, **{"reward_funcs": known.outcome, "thinking": known, **options})
    return t, known


def last(t):
    return {k: v[-1] for k, v in t._metrics["train"].items()}


EXAMPLE = [
    (
        0,
        [1.032116, 1.048174, 1.016058, 0.144521, 0.128463, 0.144521, 0.112405, 1.032116],
        [0.935059, 0.968439, 0.901679, -0.910024, -0.943404, -0.910024, -0.976784, 0.935059],
    ),
    (
        750,
        [1.019479, 1.029219, 1.009740, 0.087656, 0.077917, 0.087656, 0.068177, 1.019479],
        [0.935293, 0.954693, 0.915893, -0.920743, -0.940143, -0.920743, -0.959543, 0.935293],
    ),
    (
        1500,
        [1.011815, 1.017722, 1.005907, 0.053166, 0.047259, 0.053166, 0.041351, 1.011815],
        [0.935371, 0.946846, 0.923896, -0.926765, -0.938239, -0.926765, -0.949714, 0.935371],
    ),
]
RELEASED = [0.935038, 0.987965, 0.882112, *[-0.935038] * 4, 0.935038]  # without annealing


@pytest.mark.parametrize("step, reward, advantage", EXAMPLE, ids=["0", "750", "1500"])
def test_the_papers_example(tmp_path, step, reward, advantage):
    trust = Trust(anneal=step > 0)  # a run's first step is 1, so step 0 is a run without annealing
    t, known = one(tmp_path, num_generations=8, trust=trust)
    t.state.global_step, t.state.max_steps = step - 1, 1500
    output = scored_batch(t, OUTCOME, THINKING)
    assert known.asked == THINKING
    assert output["advantages"].tolist() == pytest.approx(advantage, rel=1e-5)
    assert list(t._logs["advantages"]) == pytest.approx(advantage, rel=1e-5)
    added = t._logs["rewards"]["thinking"]
    assert [o + a for o, a in zip(OUTCOME, added, strict=True)] == pytest.approx(reward, abs=6e-7)
    seen = last(t)
    assert seen["reward"] == pytest.approx(sum(reward) / 8, abs=1e-6)
    assert seen["process/gamma"] == pytest.approx(0.535261, rel=1e-5)
    assert seen["process/thinking_weight"] == pytest.approx(0.3 * math.exp(-step / 1500), rel=1e-6)
    assert seen["process/thinking_right"] == pytest.approx(0.2)
    assert seen["process/thinking_wrong"] == pytest.approx(0.825)
    assert seen["process/no_contrast"] == 0.0 and seen["process/outcome_mean"] == 0.5
    assert seen["frac_reward_zero_std"] == 0.0
    assert list(t._logs["extra"]["gamma"]) == pytest.approx([0.535261] * 8, rel=1e-5)


def test_the_released_code_asks_about_right_answers_alone(tmp_path):
    trust = Trust(anneal=False, score_wrong=False)
    t, known = one(tmp_path, num_generations=8, trust=trust)
    output = scored_batch(t, OUTCOME, THINKING)
    assert known.asked == [0.2, 0.3, 0.1, 0.2]
    assert output["advantages"].tolist() == pytest.approx(RELEASED, rel=1e-5)
    assert list(t._logs["extra"]["thinking"])[2:5] == [0.1, None, None]
    assert last(t)["process/thinking_unscorable"] == 0.0


def test_without_trust_every_thinking_is_paid_in_full(tmp_path):
    t, _ = one(tmp_path, num_generations=8, trust=Trust(trust=False, anneal=False))
    scored_batch(t, OUTCOME, THINKING)
    added = list(t._logs["rewards"]["thinking"])
    assert added == pytest.approx([0.3 * s for s in THINKING], abs=1e-6)
    assert last(t)["process/gamma"] == 1.0


def test_what_is_unknown_takes_the_mean_and_stays_out(tmp_path):
    """Two groups against our own functions: a failed scorer, a reply that is no number, an outcome
    that nobody knows, and a group without contrast."""
    t, known = one(tmp_path)
    t.state.global_step, t.state.max_steps = 9, 100
    outcome = [1.0, None, 0.0, 1.0, 1.0, 1.0, 0.6, 0.8]
    thinking = [0.4, 0.9, 0.8, infra("down"), 0.5, unscorable("no number"), 0.7, 0.2]
    output = scored_batch(t, outcome, thinking)
    assert 0.9 not in known.asked  # without an outcome nobody asks
    mine = torch.tensor([0, 2, 3, 4, 5, 6, 7])
    o = torch.tensor([1.0, 0, 1, 1, 1, 0.6, 0.8])
    s = torch.tensor([0.4, 0.8, 0, 0.5, 0, 0.7, 0.2])
    have = torch.tensor([True, True, False, True, False, True, True])
    group = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    reward = rr.trust_reward(o, s, group, 10, 100, scored=have)
    weight = 0.3 * math.exp(-10 / 100)
    assert reward[2] == pytest.approx(1 + math.exp(0.4 - 0.8) * weight * 0.6, rel=1e-6)
    added = torch.tensor(list(t._logs["rewards"]["thinking"]))
    assert added[1].isnan()
    assert torch.allclose(added[mine] + o, reward, rtol=1e-6)
    advantage = rr.group_advantage(reward, group)
    assert torch.allclose(output["advantages"][mine], advantage, rtol=1e-5, atol=1e-6)
    assert output["advantages"][1] == 0
    seen = last(t)
    assert seen["process/thinking_infra"] == 1 and seen["process/thinking_unscorable"] == 1
    assert seen["process/no_contrast"] == 0.5
    assert seen["process/gamma"] == pytest.approx((math.exp(0.4 - 0.8) + 1) / 2, rel=1e-6)
    assert seen["process/outcome_mean"] == pytest.approx(float(o.mean()), rel=1e-6)


def test_a_group_all_right_is_not_moved_by_its_thinking(tmp_path):
    for keep in (False, True):
        t, _ = one(tmp_path, trust=Trust(keep_degenerate=keep))
        output = scored_batch(t, [1.0] * 4 + [1.0, 0, 0, 0], THINKING)
        assert bool((output["advantages"][:4] != 0).any()) == keep
        assert bool((output["advantages"][4:] != 0).all())


def test_scale_rewards(tmp_path):
    group = torch.arange(8) // 4
    reward = rr.trust_reward(torch.tensor(OUTCOME), torch.tensor(THINKING), group, 1, 100)
    centred = rr.group_advantage(reward, group, kind="dr_grpo")
    for how, wanted in (("none", centred), ("batch", centred / (reward.std() + 1e-4))):
        t, _ = one(tmp_path, scale_rewards=how)
        t.state.max_steps = 100
        output = scored_batch(t, OUTCOME, THINKING)
        assert torch.allclose(output["advantages"], wanted, atol=1e-6), how  # "batch": TRL's own


def test_the_outcome_is_trls_weighted_sum(tmp_path):
    known = Known()

    def half(completions, **_):
        return [0.5] * len(completions)

    functions = [known.outcome, half]
    t = trainer(tmp_path, reward_funcs=functions, reward_weights=[0.5, 2.0], thinking=known,
                trust=Trust(trust=False, anneal=False, keep_degenerate=True))  # fmt: skip
    scored_batch(t, OUTCOME, THINKING)
    assert last(t)["process/outcome_mean"] == pytest.approx(0.5 * 0.5 + 2.0 * 0.5)
    assert last(t)["reward"] == pytest.approx(1.25 + 0.3 * sum(THINKING) / 8)
    assert len(functions) == 2  # the caller's own list


RUN = {"o": [1.0, 0.0, 1.0, 0.0], "t": [0.2, 0.9, 0.4, 0.8]}


def run(folder, **options):
    rows = Dataset.from_list([{"prompt": row["prompt"], **RUN} for row in ROWS])
    t, known = one(folder, train_dataset=rows, **options)
    given, compute = [], t._compute_loss  # `known.evaluated`: the same of the evaluation

    def watched(model, inputs):
        (given if model.training else known.evaluated).append(inputs["advantages"])
        return compute(model, inputs)

    t._compute_loss = watched
    t.train(resume_from_checkpoint=options.get("max_steps") == 5)
    return t, known, given


def weights(t):
    rows = t.state.log_history
    found = [r["process/thinking_weight"] for r in rows if "process/thinking_weight" in r]
    return [pytest.approx(w, rel=1e-6) for w in found]


def at(steps, total):
    return [0.3 * math.exp(-step / total) for step in steps]


def test_the_weight_follows_trls_clock_and_the_loss_gets_what_is_paid(tmp_path):
    t, known, given = run(tmp_path, max_steps=4, gradient_accumulation_steps=2)
    assert at([1, 2, 3, 4], 4) == weights(t)
    assert len(known.asked) == 4 * 16 and len(given) == 8
    for step in range(4):  # the halves of one generation, shuffled
        got = torch.cat(given[2 * step : 2 * step + 2]).sort().values
        o, s = (torch.tensor(RUN[k] * 4) for k in ("o", "t"))
        group = torch.arange(16) // 4
        want = rr.group_advantage(rr.trust_reward(o, s, group, step + 1, 4), group)
        assert torch.allclose(got, want.sort().values, rtol=1e-5)
    assert "rewards/thinking/mean" in t.state.log_history[0]


def test_completions_used_twice_are_paid_once(tmp_path):
    t, known, given = run(tmp_path, max_steps=4, num_iterations=2)
    assert at([1, 3], 4) == weights(t) and len(known.asked) == 16
    assert torch.equal(given[0].sort().values, given[1].sort().values)


def test_a_total_of_its_own_and_a_resumed_run(tmp_path):
    options = {"trust": Trust(total_steps=12000.0), "save_strategy": "steps", "save_steps": 1}
    t, _, _ = run(tmp_path, max_steps=2, **options)
    assert at([1, 2], 12000) == weights(t)
    t, known, _ = run(tmp_path, max_steps=5, **options)  # goes on from step 2
    assert at([1, 2, 3, 4, 5], 12000) == weights(t) and len(known.asked) == 3 * 8


def test_an_evaluation_counts_outcomes_and_asks_nobody(tmp_path):
    rows = Dataset.from_list([{"prompt": row["prompt"], **RUN} for row in ROWS[:2]])
    t, known, _ = run(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, eval_dataset=rows,
                      log_completions=True, per_device_eval_batch_size=8)  # fmt: skip
    assert len(known.asked) == 2 * 8
    (shown,) = [r for r in t.state.log_history if "eval_reward" in r]
    assert shown["eval_reward"] == 0.5 and shown["eval_rewards/thinking/mean"] is None
    assert not any("process/gamma" in key for key in shown)
    (evaluated,) = known.evaluated
    assert evaluated.tolist() == pytest.approx([0.5 / (3**-0.5 + 1e-4) * s for s in [1, -1] * 4])
    paths = sorted((tmp_path / "completions").glob("*.parquet"))  # a step, then the evaluation
    trained, evaluated = (pyarrow.parquet.read_table(path).to_pydict() for path in paths)
    assert trained["thinking"] == RUN["t"] * 2 and None not in trained["gamma"]
    assert len(evaluated["completion"]) == 8
    assert all(v is None or math.isnan(v) for v in evaluated["thinking"] + evaluated["gamma"])


def test_process_returns_come_on_top(tmp_path):
    def second_half(rollout):
        steps = [[Step(0, len(t), float(b % 2))] for b, t in enumerate(rollout.text)]
        return Rewards([scored(0.0)] * len(steps), steps=steps)

    outputs = []
    for scorer in (None, second_half):
        t, _ = one(tmp_path, scorer=scorer)
        outputs.append(scored_batch(t, OUTCOME, THINKING))
    trust, both = (o["advantages"] for o in outputs)
    t = trainer(tmp_path, scorer=second_half, reward_funcs=Known().outcome)
    dense = scored_batch(t, [0.0] * 8, THINKING)["advantages"]
    mask = outputs[0]["completion_mask"]
    assert dense.abs().max() > 0 and torch.allclose(both, (trust[:, None] + dense) * mask)


@pytest.mark.parametrize("options, message", [
    ({"thinking": None, "trust": Trust()}, "trust: expected a scorer as thinking="),
    ({"trust": {"alpha": 0.3}}, "trust: expected a Trust, got dict"),
    ({"thinking": "runs/trm"}, "thinking: expected a scorer, got str"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "aggregation: thinking needs"),
])  # fmt: skip
def test_wrong_arguments_are_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        one(tmp_path, **options)


def test_a_scorer_of_whole_rewards_pays_its_outcomes(tmp_path):
    known = Known()
    t, _ = one(tmp_path, num_generations=8, reward_funcs=known.outcome,
               thinking=lambda rollout: Rewards(known(rollout)))  # fmt: skip
    t.state.global_step, t.state.max_steps = 749, 1500
    output = scored_batch(t, OUTCOME, THINKING)
    assert output["advantages"].tolist() == pytest.approx(EXAMPLE[1][2], rel=1e-5)


def test_wrong_knobs_and_scorers_are_refused_by_name(tmp_path):
    for knobs in ({"alpha": -1.0}, {"alpha": math.nan}, {"total_steps": 0.0}):
        with pytest.raises(InputError, match=f"^{next(iter(knobs))}: expected"):
            Trust(**knobs)
    for value in (1.7, -0.1, math.nan):
        t, _ = one(tmp_path)
        with pytest.raises(InputError, match="thinking: completion 3: expected a score from 0 to"):
            scored_batch(t, OUTCOME, [*THINKING[:3], value, *THINKING[4:]])
    for scorer, message in (
        (lambda rollout: [scored(0.5)], "thinking: the scorer must give 8 scores, got 1"),
        (lambda rollout: [0.5] * 8, "thinking: the scorer must give Scores, got float"),
    ):
        t, _ = one(tmp_path, thinking=scorer)
        with pytest.raises(ValueError, match=message):
            scored_batch(t, OUTCOME, THINKING)
    with pytest.raises(ValueError, match="must be divisible by num_generations"):  # TRL's own
        one(tmp_path, num_generations=3)


def test_a_process_reward_model_scores_what_stands_between_the_tags(tmp_path):
    """`ThinkingScorer` without a task, inside a trainer whose completions are known."""
    seen = []

    def prm(rollout):
        seen.extend(rollout.text)
        return Rewards([scored(len(text) / 20) for text in rollout.text])

    said = ["<think>abcd</think>7", "abc</think>7", "<think>ab", "7"]
    rows = [{"prompt": "7?", "answer": 7}] * 4
    vocab = rollout_of(rows, [[i] for i in range(4)], Words(said), 4)
    assert [s.value for s in ThinkingScorer(prm)(vocab)] == [0.2, None, None, None]
    assert [s.value for s in ThinkingScorer(prm, opened=True)(vocab)] == [0.55, 0.15, None, None]
    assert seen == ["abcd", "<think>abcd", "abc"]
    assert vocab.problems[0].answer == "7" and len(vocab.problems) == 1
    with pytest.raises(InputError, match="opened: a task, or whole_response"):
        ThinkingScorer(prm, opened=True, whole_response=True)


class Words:
    """A tokenizer of whole completions."""

    eos_token_id = 99

    def __init__(self, said):
        self.said = said

    def decode(self, ids, **_):
        return "".join(self.said[i] for i in ids)


def test_pictures_of_a_row_reach_the_scorer():
    from PIL import Image

    image = Image.new("L", (2, 2), 7)
    one, more = {"prompt": "?", "image": image}, {"prompt": "?", "images": [image, "/a.png"]}
    first, second = rollout_of([one, one, more, more], [[0]] * 4, Words(["x"]), 2).problems
    assert first.images[0].draw().getpixel((0, 0)) == (7, 7, 7) and first.images[0].key
    assert second.images[1] == "/a.png" and "images" not in second.extra


def test_two_ranks_that_hold_half_a_group_each(tmp_path):
    """Groups are put together before anybody is paid: the worked example, cut in the middle."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script, ranks = Path(__file__).parent / "trl_worker.py", []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        env = os.environ | {k: str(v) for k, v in place.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, str(script), str(tmp_path)]
        log = (tmp_path / f"{rank}.log").open("w")
        ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0], (tmp_path / "0.log").read_text()[-3000:]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = torch.cat([f["advantages"] for f in found]).tolist()
    assert whole == pytest.approx(EXAMPLE[1][2], rel=1e-5)
    released = torch.cat([f["released"] for f in found]).tolist()
    assert released == pytest.approx(RELEASED, rel=1e-5)
    assert [f["released asked"] for f in found] == [[0.2, 0.3, 0.1], [0.2]]
    asked = [[ROWS[(6 * rank + i) // 4]["prompt"] for i in range(6)] for rank in range(2)]
    assert [f["problems"] for f in found] == asked
    for rank, f in enumerate(found):
        assert f["asked"] == THINKING[4 * rank : 4 * rank + 4]
        assert f["table"] == pytest.approx(EXAMPLE[1][2], rel=1e-5)
        assert f["thinking"] == THINKING
        assert f["metrics"]["process/gamma"] == pytest.approx(0.535261, rel=1e-5)
        assert f["metrics"]["reward"] == pytest.approx(sum(EXAMPLE[1][1]) / 8, abs=1e-6)
