"""Rollouts from a server: what it drew is what the policy would draw, what is broken is refused,
and a run learns through it, survives it, and never learns from stale weights unknowingly."""

from __future__ import annotations

import json
import math

import pytest
import torch
from engine_server import BROKEN, EngineServer

from reasonrl import importance, models
from reasonrl.batch import pack
from reasonrl.chat import Patience
from reasonrl.cli import main
from reasonrl.engine import Engine
from reasonrl.engine_protocols import VLLM, SGLang
from reasonrl.logprobs import rollout_logp
from reasonrl.records import InputError, Problem, ScorerDown
from reasonrl.rollout import sample
from reasonrl.sampling import Sampling

SIZE = {"width": 32, "layers": 1, "heads": 2}
SHORT = Patience(timeout=20.0, deadline=20.0, wait=1.0, pause=0.01, retries=2)
PROMPTS = [[10, 20, 30], [11, 7, 9, 40, 41]]
KINDS = {"sglang": SGLang(), "vllm": VLLM("tiny")}


def problems(n=2):
    return [Problem(str(i), "") for i in range(n)]


def policy(seed=3):
    return models.load("tiny", dtype="fp32", seed=seed, **SIZE)


@pytest.fixture(params=list(KINDS))
def server(request):
    with EngineServer(request.param, **SIZE) as running:
        yield running


def engine(server, folder, **more):
    how = {"patience": SHORT} | more
    return Engine(server.url, KINDS[server.kind], folder / "weights", **how)


def test_it_draws_from_the_weights_that_were_pushed(server, tmp_path):
    served, own = policy(), policy()
    served.engine = engine(server, tmp_path)
    for number, factor in ((4, 1.0), (5, 3.0)):
        with torch.no_grad():
            for p in (*served.model.parameters(), *own.model.parameters()):
                p.mul_(factor)
        served.engine.push(served, number)
        rollout = sample(served, problems(), PROMPTS, 3, Sampling(12), seed=number)
        assert rollout.served and rollout.group.tolist() == [0, 0, 0, 1, 1, 1]
        ours = rollout_logp(own, rollout, 4096)
        torch.testing.assert_close(torch.cat(list(rollout.logp)), ours, rtol=1e-4, atol=1e-4)
        assert len({tuple(ids) for ids in rollout.completion_ids}) == 6
        eos = own.tokenizer.eos_token_id
        assert [ids[-1] == eos for ids in rollout.completion_ids] == list(rollout.finished)
    assert [f.rsplit("/", 1)[1] for f in server.weights] == ["weights-4", "weights-5"]
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["weights-5"]
    again = sample(served, problems(), PROMPTS, 3, Sampling(12), seed=5)
    assert again.completion_ids == rollout.completion_ids  # by seeds, whatever order they came in


def test_greedy_is_the_policys_own(server, tmp_path):
    served, own = policy(), policy()
    served.engine = engine(server, tmp_path)
    served.engine.push(served, 0)
    plan = Sampling(16, temperature=0.0)
    theirs = sample(served, problems(), PROMPTS, 1, plan, seed=0)
    assert theirs.completion_ids == sample(own, problems(), PROMPTS, 1, plan, 0).completion_ids


@pytest.mark.parametrize("fault", ["status-500", "status-503", "status-429", "drop", "abort"])
def test_what_may_pass_is_asked_again(server, fault, tmp_path):
    served = policy()
    served.engine = engine(server, tmp_path)
    served.engine.push(served, 0)
    plain = sample(served, problems(), PROMPTS, 2, Sampling(8), seed=1)
    server.faults = [fault, "", fault]
    again = sample(served, problems(), PROMPTS, 2, Sampling(8), seed=1)
    assert again.completion_ids == plain.completion_ids and not server.faults


REFUSED = {
    "positive": r"a log-probability of 0\.5 is above 0",
    "outside": r"token 1000000 is outside the policy's vocabulary of 100",
    "nothing": r"expected 1 to 8 tokens, got 0",
    "too-many": r"expected 1 to 8 tokens, got \d+",
    "cut": r"it was cut at 1 tokens, 8 were asked for",
    "behind": r"it goes on behind the end-of-sequence token at 0",
    "text-ids": r"holds a",
    "nan": r"NaN",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_reply_that_is_not_about_this_is_refused(server, fault, tmp_path, monkeypatch):
    served = policy()
    monkeypatch.setattr(models.Policy, "eos", frozenset({served.tokenizer.eos_token_id}))
    served.engine = engine(server, tmp_path, parallel=1)
    served.engine.push(served, 0)
    plain = sample(served, problems(1), PROMPTS[:1], 1, Sampling(8), seed=1)
    assert len(plain.completion_ids[0]) == 8  # so that a cut one is shorter
    server.faults = [fault, fault]
    with pytest.raises(
        ScorerDown, match=rf"rollout server http.*: completion 0: .*{REFUSED[fault]}"
    ):
        sample(served, problems(1), PROMPTS[:1], 1, Sampling(8), seed=1)
    assert set(BROKEN) <= {*REFUSED, "more-logps"}


def test_other_tokens_or_weights_are_refused(tmp_path):
    cases = {
        "sglang": {
            "version": "weights 7000 wrote it, the server should hold 0",
            "more-logps": "are about different tokens",
            "no-logps": "output_token_logprobs is no list",
            "status-404": "it has no /generate",
        },
        "vllm": {
            "retokenised": "it read other prompt tokens than it was sent",
            "more-logps": "8 tokens came with 9 log-probabilities",
            "no-ids": "it returns no token_ids",
            "status-401": "status 401",
        },
    }
    for kind, faults in cases.items():
        with EngineServer(kind, **SIZE) as server:
            served = policy()
            served.engine = engine(server, tmp_path / kind, parallel=1)
            served.engine.push(served, 0)
            for fault, words in faults.items():
                server.faults = [fault, fault]
                with pytest.raises(ScorerDown, match=f"rollout server http.*{words}"):
                    sample(served, problems(1), PROMPTS[:1], 1, Sampling(8), seed=1)
                server.faults = []


def test_refused_weights_and_a_dead_server_are_named(tmp_path):
    with EngineServer("sglang", **SIZE) as server:
        served = policy()
        served.engine = engine(server, tmp_path)
        server.faults = ["refuse"]
        with pytest.raises(ScorerDown, match="it refused the weights: another architecture"):
            served.engine.push(served, 0)
        served.engine.push(served, 0)
    with pytest.raises(
        ScorerDown, match=r"rollout server http://127.* stayed down for 1 s, 2 requ"
    ):
        sample(served, problems(), PROMPTS, 1, Sampling(8), seed=1)


def test_images_are_refused(server, tmp_path):
    served = policy()
    served.engine = engine(server, tmp_path)
    with pytest.raises(InputError, match="engine: a rollout server takes no images"):
        sample(served, problems(1), PROMPTS[:1], 1, Sampling(4), 0, seen=[object()])


def test_importance_weights_by_hand():
    old, drawn = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -1.0])
    token = importance.weights(old, drawn, [2, 1], "token", 2.0)
    torch.testing.assert_close(token, torch.tensor([math.exp(0.5), 1.0, math.exp(-2.0)]))
    whole = importance.weights(old, drawn, [2, 1], "sequence", 1.5)
    torch.testing.assert_close(whole, torch.tensor([1.5, 1.5, math.exp(-2.0)]))
    ranks = [importance.sums(old, drawn, whole, 1.5), importance.sums(old[:0], old[:0], None, 1.5)]
    found = importance.metrics(ranks)
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(2.5 / 3)
    assert found["sampling/sampling_logp_difference/max"] == 2.0
    assert found["sampling/importance_sampling_ratio/max"] == 1.5
    assert found["sampling/capped"] == pytest.approx(2 / 3)


def test_weights_travel_with_their_tokens(server, tmp_path):
    served = policy()
    served.engine = engine(server, tmp_path)
    served.engine.push(served, 0)
    rollout = sample(served, problems(), PROMPTS, 3, Sampling(9), seed=2)
    n = sum(map(len, rollout.completion_ids))
    weight = torch.arange(float(n))
    for batch in pack(rollout, torch.zeros(n), 20, rows=[5, 0, 3], weight=weight):
        assert batch.weight is not None
        at = 0
        starts = torch.tensor([0, *map(len, rollout.completion_ids)]).cumsum(0)
        for b in batch.rows.tolist():
            size = len(rollout.completion_ids[b])
            want = weight[int(starts[b]) : int(starts[b]) + size]
            assert torch.equal(batch.weight[at : at + size], want)
            at += size


def words(server, out, **more):
    known = {
        "model_options": "{width: 32, layers: 1, heads: 2}", "cold_start_steps": 2, "steps": 3,
        "prompts_per_step": 2, "group": 3, "eval_problems": 4, "dtype": "fp32", "threads": 1,
        "engine.url": server.url, "engine.kind": server.kind, "engine.model": "tiny",
        "loss.entropy_coef": 0.1, "engine.wait": 1, "engine.timeout": 20,
        "max_completion_length": 24,
    } | more  # fmt: skip
    pairs = [f"{key}={value}" for key, value in known.items()]
    return ["train", "tiny", *pairs, "--quiet", "--out", str(out)]


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_through_the_server(server, tmp_path):
    out = tmp_path / "run"
    assert main(words(server, out, updates=2)) == 0
    names = [folder.rsplit("/", 1)[1] for folder in server.weights]
    assert names == [f"weights-{n}" for n in (2, 3, 4, 5)]  # before every rollout and evaluation
    for row in rows(out):
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert "time/sync" in row
    ours = models.load(str(out / "checkpoint-3"), dtype="fp32").model.state_dict()
    theirs = server.policy.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_may_lag_and_the_gap_is_seen_and_weighed(tmp_path):
    with EngineServer("sglang", **SIZE) as server:
        more = {"engine.max_lag": 2, "learning_rate": 0.02, "eval_problems": 0, "steps": 4}
        assert main(words(server, tmp_path / "run", **more)) == 0
        assert [f.rsplit("/", 1)[1] for f in server.weights] == ["weights-2", "weights-5"]
        found = rows(tmp_path / "run")
        gaps = [row["sampling/sampling_logp_difference/max"] for row in found]
        assert gaps[0] < 1e-3 < 0.01 < gaps[2] and gaps[3] < 1e-3
        assert found[2]["sampling/importance_sampling_ratio/max"] <= 2.0


def test_a_server_that_dies_ends_the_run_with_status_4_and_it_goes_on(tmp_path):
    out = tmp_path / "run"
    with EngineServer("sglang", **SIZE) as server:
        whole = tmp_path / "whole"
        assert main(words(server, whole)) == 0
    with EngineServer("sglang", **SIZE) as server:
        assert main(words(server, out, steps=1)) == 0
    assert main([*words(server, out), "--resume"]) == 4
    with EngineServer("sglang", **SIZE) as server:
        assert main([*words(server, out), "--resume"]) == 0
    assert all(row["grad_norm"] > 0 for row in rows(whole))
    for a, b in zip(rows(whole), rows(out), strict=True):
        assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]


def test_a_server_that_says_something_wrong_ends_the_run_as_a_dead_one(tmp_path, capsys):
    whole, more = tmp_path / "whole", {"eval_problems": 0, "cold_start_steps": 0, "steps": 2}
    with EngineServer("sglang", **SIZE) as server:
        assert main(words(server, whole, **more)) == 0
    for fault in ("outside", "version", "status-401", "refuse"):
        with EngineServer("sglang", **SIZE) as server:
            out = tmp_path / fault
            first = [""] * (1 + 6)  # the weights and the completions of a step
            server.faults = [*first, *[""] * (fault != "refuse"), fault]
            assert main(words(server, out, **more)) == 4
            said = capsys.readouterr().err.splitlines()[-1]
            assert said.startswith("reasonrl: rollout server http") and len(rows(out)) == 1
            assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-1"]
            assert main([*words(server, out, **more), "--resume"]) == 0
        for a, b in zip(rows(whole), rows(out), strict=True):
            assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"] > 0


def test_vllm_needs_a_name_and_says_what_its_log_probabilities_are(server, tmp_path, capsys):
    for more, said in (
        ({"engine.model": '""', "engine.kind": "vllm"}, "engine.model: expected the name"),
        (
            {"sample.temperature": 0.7, "engine.kind": "vllm"},
            "engine.processed: vLLM says log-probabilities at temperature 1",
        ),
    ):
        assert main(words(server, tmp_path / "run", **more)) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
