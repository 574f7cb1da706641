"""What the server says: each host's protocol; our judge client against it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from served import Served, rows, scripted

from reasonrl import Problem, models
from reasonrl.chat import ChatClient, Patience
from reasonrl.choice import texts
from reasonrl.cli import main
from reasonrl.prm import PRM, Reading
from reasonrl.prompts import render
from reasonrl.records import infra, scored, unscorable
from reasonrl.rewards.judge import Judge
from reasonrl.rewards.prm import PRMScorer
from reasonrl.rollout import Sampling, sample
from reasonrl.serve import scorers
from reasonrl.serve.protocols import Ask
from reasonrl.serve.queue import Queue
from reasonrl.serve.scorers import Plan, Scorer, judge_scorer, open_scorer, prm_scorer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_openrlhf_protocol_with_the_real_verifier():
    with Served(open_scorer("math", Plan())) as served:
        said = (r"\boxed{\frac{8}{2}}<|im_end|>", "so 5</s>", "####4", "")
        status, _, reply = served.call("/get_reward", rows(*said))
        assert status == 200 and reply["rewards"] == [1.0, 0.0, 1.0, 0.0]
        assert reply["scores"] == reply["rewards"]
        assert reply["extra_logs"] == {"unscored": [0.0] * 4}
        status, _, reply = served.call("/reward/math", rows("4", label=None))
        assert reply["rewards"] == [None] and reply["kinds"] == ["unscorable"]
        assert "gold answer" in reply["reasons"][0] and reply["extra_logs"]["unscored"] == [1.0]
        assert served.call("/", rows("4", label=4))[2]["rewards"] == [1.0]
        assert served.call("/", {"query": [], "prompts": [], "labels": []})[2]["rewards"] == []
        _, _, page = served.call("/metrics")
        assert 'reasonrl_scores_total{kind="scored",scorer="math"} 5' in page
        assert 'reasonrl_scores_total{kind="unscorable",scorer="math"} 1' in page
        assert 'reasonrl_requests_total{path="/get_reward",status="200"} 1' in page
        assert "reasonrl_request_seconds_count 4" in page and 'le="+Inf"} 4' in page
        assert served.call("/health")[2] == {"status": "ok", "scorers": ["math"]}


def test_what_has_no_score_is_never_a_silent_zero():
    kinds = [scored(2.5), unscorable("odd"), infra("down")]
    with Served(scripted(lambda r: kinds), unscored=-1.0) as served:
        reply = served.call("/", rows("a", "b", "c"))[2]
        assert reply["rewards"] == [2.5, -1.0, -1.0] and reply["scores"] == [1.0, 0.0, 0.0]
        assert reply["extra_logs"]["unscored"] == [0.0, 1.0, 1.0]
        assert reply["reasons"] == [None, "odd", "down"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"query": [', 400, "the body is not JSON"),
        (b"\xff\xfe{}", 400, "the body is not UTF-8"),
        (b"[" * 4000, 400, "nested too deeply"),
        (b'{"query": [], "query": []}', 400, "a name stands twice"),
        (b"[1]", 400, "expected a JSON object"),
        ({}, 400, "field 'query': expected a list, got None"),
        ({"query": "x", "prompts": ["x"], "labels": ["4"]}, 400, "field 'query': expected a list"),
        (
            {"query": ["x"], "prompts": [], "labels": ["4"]},
            400,
            "expected equal lengths, got 1, 0, 1",
        ),
        (
            {"query": [3], "prompts": ["x"], "labels": ["4"]},
            400,
            "query[0]: expected a string, got 3",
        ),
        ({"query": ["y"], "prompts": ["x"], "labels": ["4"]}, 400, "query[0]: expected the prompt"),
        (b"x" * 5000, 413, "a body has at most 4096 bytes"),
        (rows(*["4"] * 40), 413, "more rows in one request than the queue can hold"),
    ],
)
def test_bad_requests_say_what_to_change(body, status, says):
    with Served(scripted(waiting=32), body=4096) as served:
        got, _, reply = served.call("/reward", body)
        assert got == status and says in reply["error"]["message"]
        assert served.call("/reward", rows("4"))[0] == 200


@pytest.fixture(scope="module")
def policy():
    return models.load("tiny", layers=1, width=32, heads=2)


def judge_of(served: Served, **options) -> Judge:
    patience = Patience("mask", deadline=60.0, timeout=60.0, retries=0)
    client = ChatClient(f"http://127.0.0.1:{served.port}/v1", "judge", patience=patience)
    return Judge(client, **options)


def test_our_judge_against_our_server():
    """Votes over HTTP are the votes that the judge behind it gives, in order."""
    seen = []

    def answer(batch):
        out = []
        for row in batch:
            assert isinstance(row, Ask)
            prompt = str(row.prompt)
            nonce = prompt.split("<verdict-")[1].split(">")[0]
            right = "good" in prompt and (row.seed or 0) % 3 != 2
            seen.append(row.sampling)
            text = f"<verdict-{nonce}>{int(right)}</verdict-{nonce}>"
            out.append(([("unsure" if "odd" in prompt else text, True, 5)], 9))
        return out

    scorer = Scorer("judge", Queue(answer, size=64), model="judge")
    with Served(scorer) as served:
        judge = judge_of(served, votes=3, max_tokens=33, temperature=0.5)
        said = ["good", "bad", "odd", "good too"] * 20
        found = judge(texts([Problem("p", "2+2")] * len(said), said)).outcome
        assert [s.value for s in found] == [2 / 3, 0.0, None, 2 / 3] * 20
        assert found[2].kind == "unscorable" and set(seen) == {(33, 0.5, 1.0, 0, 1)}
        names = [m["id"] for m in served.call("/v1/models")[2]["data"]]
        assert names == ["judge"]


def test_a_model_answers_as_it_does_in_this_process(policy):
    prompts = ["1+2-3", "4*5", "7", "2-2+6"]
    ids = [render(policy.tokenizer, p) for p in prompts]
    problems = [Problem(p, p) for p in prompts]
    with Served(judge_scorer(policy, "tiny", Plan(batch=3))) as served:
        client = ChatClient(f"http://127.0.0.1:{served.port}/v1", "tiny")
        greedy = client.ask(prompts, max_tokens=6, temperature=0.0, seeds=[0] * 4)
        assert greedy == list(sample(policy, problems, ids, 1, Sampling(6, 0.0), 0).text)
        together = client.ask(prompts, max_tokens=6, temperature=1.0, seeds=[7, 8, 9, 10])
        alone = [
            sample(policy, [p], [i], 1, Sampling(6), s).text[0]
            for p, i, s in zip(problems, ids, (7, 8, 9, 10), strict=True)
        ]
        assert together == alone and len(set(together)) > 1
        body = {"model": "tiny", "messages": [{"role": "user", "content": "7"}], "max_tokens": 6}
        status, _, reply = served.call("/v1/chat/completions", body | {"n": 3, "seed": 1})
        assert status == 200 and len({c["message"]["content"] for c in reply["choices"]}) > 1
        counts = reply["usage"]
        assert counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"]
        assert counts["prompt_tokens"] == len(render(policy.tokenizer, "7"))
        for change, says in [
            ({"model": "other"}, "model: expected 'tiny', got 'other'"),
            ({"stream": True}, "field 'stream': not supported here"),
            ({"tools": [{}]}, "field 'tools'"),
            ({"max_tokens": 0}, "field 'max_tokens': expected a whole number in [1"),
            ({"max_tokens": 5000}, "maximum context length is 1024 tokens"),
            ({"temperature": "hot"}, "field 'temperature': expected a number"),
            ({"n": True}, "field 'n'"),
            ({"messages": [{"role": "user"}]}, "messages[0]: expected role and content"),
            ({"messages": []}, "field 'messages': expected chat messages"),
        ]:
            status, _, reply = served.call("/v1/chat/completions", body | change)
            assert 400 <= status < 500 and says in reply["error"]["message"], change
        reply = served.call("/reward/judge", rows("4", prompt="2+2"))[
            2
        ]  # it has learnt nothing yet
        assert reply["rewards"] == [None] and reply["kinds"] == ["unscorable"]
        (long,) = client.ask(["1+" * 600 + "1"], max_tokens=6, temperature=0.0, seeds=[0])
        assert not isinstance(long, str) and long.reason == "the prompt is too long"


def test_verl_protocol_by_a_prm(policy):
    prm = PRM.new(policy.frozen(), Reading(end=policy.tokenizer.eos_token_id, delimiter=";"))
    scorer = PRMScorer(prm)
    said = ["1;2;3", "4;5"]
    want = scorer(texts([Problem("a", "1+2"), Problem("b", "3-1")], said)).outcome
    with Served(prm_scorer(scorer, Plan())) as served:
        for (prompt, text), score in zip(zip(["1+2", "3-1"], said, strict=True), want, strict=True):
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            sent = {"model": "m", "messages": turns, "use_activation": False}
            status, _, reply = served.call("/classify", sent)
            # packed alone or beside others: the same numbers up to rounding
            assert status == 200 and reply["data"][-1]["probs"][-1] == pytest.approx(score.value)
            status, _, reply = served.call("/v1/embeddings", {"model": "m", "input": turns})
            assert reply["data"][-1]["embedding"][-1] == pytest.approx(score.value)
        reply = served.call("/reward/prm", rows("1;2;3", prompt="1+2"))[2]
        assert reply["rewards"] == [pytest.approx(want[0].value)]
        empty = [{"role": "user", "content": "1"}, {"role": "assistant", "content": ""}]
        status, _, reply = served.call("/classify", {"input": empty})
        assert status == 422 and "unscorable" in reply["error"]["message"]
        status, _, reply = served.call("/classify", {"input": "text"})
        assert status == 400 and "no chat template" in reply["error"]["message"]
        status, _, reply = served.call("/classify", {"input": empty, "truncate": 1})
        assert status == 400 and "'truncate'" in reply["error"]["message"]


def test_a_rendered_conversation_is_taken_apart():
    class Tokenizer:
        chat_template = CHATML

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            out = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
            return "SYS" + out + "<|im_start|>assistant\n" * add_generation_prompt

    asked = []

    def note(batch):
        asked.extend(batch)
        return [scored(0.25)] * len(batch)

    turns = [{"role": "user", "content": "2+2?\n"}, {"role": "assistant", "content": "so\n4"}]
    tokenizer = Tokenizer()
    text = tokenizer.apply_chat_template(turns, False, False)
    with Served(Scorer("prm", Queue(note, size=4), tokenizer)) as served:
        payload = {"model": "m", "input": text, "activation": False}
        assert served.call("/classify", payload)[2]["data"][-1]["probs"] == [0.25]
        assert asked[-1].prompt == "2+2?\n" and asked[-1].completion == "so\n4"
        bad = served.call("/classify", payload | {"input": text[3:]})
        assert bad[0] == 400 and "chat template" in bad[2]["error"]["message"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["maths"], "expected math, code, prm=FOLDER or judge=MODEL, got 'maths'"),
        (["prm="], "got 'prm='"),
        (["prm=/nowhere"], "/nowhere"),
        (["math", "--port", "70000"], "--port: expected 0..65535, got 70000"),
        (["math", "--queue", "0"], "--queue: expected 1..1.04858e+06, got 0"),
        (["math", "--unscored", "nan"], "--unscored: expected a number, got nan"),
        (["math", "--timeout", "nan"], "--timeout: expected"),
        (
            ["judge=tiny", "--device", "gpu"],
            "device: expected auto, cpu, cuda or cuda:N, got 'gpu'",
        ),
    ],
)
def test_the_command_refuses(words, says, capsys):
    assert main(["serve", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "there", "place"),
    [("auto", True, "meta"), ("auto", False, "cpu"), ("cpu", True, "cpu")],
)
@pytest.mark.parametrize("kind", ["prm", "judge"])
def test_models_are_where_the_command_says(
    kind, given, there, place, tmp_path, policy, monkeypatch
):
    """`auto` is a GPU where there is one; meta stands in for it."""
    PRM.new(policy.frozen(), Reading(delimiter=";")).save(tmp_path)
    monkeypatch.setattr(
        models, "placed", lambda d: torch.device("meta" if d == "auto" and there else "cpu")
    )
    found = []
    monkeypatch.setattr(scorers, f"{kind}_scorer", lambda model, *_: found.append(model))
    open_scorer({"prm": f"prm={tmp_path}", "judge": "judge=tiny"}[kind], Plan(device=given))
    model = found[0].prm.body if kind == "prm" else found[0]
    assert model.device.type == place
