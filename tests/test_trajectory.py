"""Labels without a rule, from rows to rows: judges that fail, the cache, redaction, the command."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from fault_server import MODEL, FaultServer

from reasonrl import InputError, models, template
from reasonrl.asker import ClientAsker, PolicyAsker, Remembered
from reasonrl.cache import FILE, Cache, fingerprint
from reasonrl.cli import main
from reasonrl.commands import label as command
from reasonrl.encoder import Encoder
from reasonrl.records import infra
from reasonrl.rows import Refused
from reasonrl.stepwise import read_traces, write_rows
from reasonrl.systems import reasonflux_step_target
from reasonrl.trajectory import Labeller, read_thoughts, thought_of

SMALL = {"layers": 1, "width": 32, "heads": 2}


class Rates:
    """A judge that gives 0.9 where the step holds no "wrong", and counts what it is asked."""

    def __init__(self, reply=None):
        self.asked, self.reply = [], reply

    def ask(self, prompts):
        self.asked += prompts
        out = []
        for prompt in prompts:
            nonce = re.findall(r"number ([0-9a-f]+)", prompt)[0]
            step = prompt.split(f"[step to rate {nonce}]")[1].split("[end")[0]
            value = 0.2 if "wrong" in step else 0.9
            own = f"<quality-{nonce}>{value}</quality-{nonce}>"
            out.append(own if self.reply is None else self.reply(step, own))
        return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("encoder")
    policy = models.load("tiny", seed=3, dtype="fp32", **SMALL)
    policy.model.save_pretrained(out)
    policy.tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder.load(str(folder), Cache(None))


ROWS = [
    {"prompt": "2+3?", "completion": "<think>2+3=5\n\nso five</think>It is\n\n5", "answer": "5"},
    {
        "prompt": "1+1?",
        "completions": ["wrong: 3\n\n", "then 2"],
        "response": "so\n\n2",
        "answer": "2",
    },
    {"prompt": "7-3?", "completion": "7-3\n\n=4\n\nyes", "response": "4\n\nfour", "answer": "4"},
]


def thoughts(tmp_path, rows=ROWS, redact=None):
    path = tmp_path / "traces.jsonl"
    write_rows(path, rows)
    return read_thoughts(path, "\n\n", redact)


def test_labels_are_the_mixed_scores_of_each_step(tmp_path, encoder):
    labeller = Labeller(encoder, Rates(), coherence="infonce", tau=0.5, others=3)
    rows = list(labeller(thoughts(tmp_path)))
    assert [r["completions"] for r in rows] == [
        ["2+3=5\n\n", "so five"],
        ["wrong: 3\n\n", "then 2"],
        ["7-3\n\n", "=4\n\nyes"],  # three steps, a response of two: the surplus is merged
    ]
    assert rows[1]["scores"]["quality"] == [0.2, 0.9]
    for row in rows:
        scores = [torch.tensor(row["scores"][k], dtype=torch.float64) for k in row["scores"]]
        assert row["labels"] == pytest.approx(reasonflux_step_target(*scores).tolist())
        assert all(0 < x <= 1 for x in row["scores"]["coherence"])
        assert "final" not in row
    write_rows(tmp_path / "out.jsonl", rows)
    assert [t.labels for t in read_traces(tmp_path / "out.jsonl")] == [r["labels"] for r in rows]


def test_alignment_and_coherence_are_cosines_of_the_encoder(tmp_path, encoder):
    (row,) = Labeller(encoder, Rates())(thoughts(tmp_path, ROWS[:1]))
    vectors = torch.nn.functional.normalize(
        encoder(["2+3?", "2+3=5\n\n", "so five", "It is\n\n", "5"]).double(), dim=-1
    )
    q, one, two, a, b = vectors
    assert row["scores"]["align"] == pytest.approx([float(one @ a), float(two @ b)])
    near = [float((1 + q @ one) / 2), float((1 + one @ two) / 2)]
    assert row["scores"]["coherence"] == pytest.approx(near)


def test_a_judge_that_talks_nonsense_leaves_a_reason_and_loses_nothing(tmp_path, encoder):
    judge = Rates(lambda step, own: "as you like: 11/10" if "wrong" in step else own)
    good, bad, last = Labeller(encoder, judge)(thoughts(tmp_path))
    assert "reason" not in good and "reason" not in last
    wrote = "no quality; the judge wrote 'as you like: 11/10'"
    assert bad["reason"] == f"step 0: field 'quality': {wrote}"
    assert "labels" not in bad and bad["completions"] == ROWS[1]["completions"]
    assert bad["response"] == "so\n\n2" and bad["answer"] == "2"


def test_infonce_needs_a_second_prompt(tmp_path, encoder):
    with pytest.raises(InputError, match="two prompts"):
        list(Labeller(encoder, Rates(), coherence="log")(thoughts(tmp_path, ROWS[:1])))


class Plans:
    def ask(self, prompts):
        found = [re.findall(r"number ([0-9a-f]+)", p)[0] for p in prompts]
        return [f"ok <template-{n}>add them</template-{n}>" for n in found]


class Answers:
    """Right in three of four answers to the first question, silent on the last."""

    def __init__(self):
        self.count = 0

    def ask(self, prompts):
        out = []
        for prompt in prompts:
            assert "add them" in prompt
            self.count += 1
            right = "5" if "2+3" in prompt else "2"
            wrong = self.count % 4 == 0
            out.append("" if "7-3" in prompt else rf"\boxed{{{'9' if wrong else right}}}")
        return out


def test_the_trajectory_reward_is_the_share_of_right_answers(tmp_path, encoder):
    rows = [*ROWS, {"prompt": "no answer?", "completions": ["a"], "response": "b"}]
    labeller = Labeller(encoder, Rates(), expert=Plans(), policy=Answers(), attempts=4)
    first, second, silent, unknown = labeller(thoughts(tmp_path, rows))
    assert first["final"] == 0.75 and first["template"] == "add them"
    assert second["final"] == 0.75
    assert "final" not in silent and silent["final_reason"] == "no answer was given"
    assert "final" not in unknown and "answer" in unknown["final_reason"]
    assert all("labels" in row for row in (first, second, silent, unknown))


def test_a_template_that_is_no_template_is_a_reason():
    class Rambles:
        def ask(self, prompts):
            return ["Sure! Here is a plan."] * len(prompts)

    ((score, plan),) = template.rewards([template.Asked("q", "t", "1")], Rambles(), Answers(), 2)
    assert score.kind == "unscorable" and score.reason == "no template" and plan == ""


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "p", "completions": ["a"]}, "field 'response'"),
        ({"prompt": "p", "completion": "no end"}, "field 'response'"),
        ({"prompt": "p", "completion": "<think>a</think>  "}, "field 'response'"),
        ({"prompt": "p", "completion": "<think> </think>b"}, "field 'completion'"),
        ({"prompt": "p", "completions": ["a", " "], "response": "b"}, "step 1"),
        ({"prompt": "p", "completions": ["a"], "response": 3}, "field 'response'"),
        ({"prompt": "p", "completions": ["a"], "response": ["b", ""]}, "step 1"),
        ({"completions": ["a"], "response": "b"}, "field 'prompt'"),
    ],
)
def test_rows_that_are_no_traces_are_refused(row, named):
    with pytest.raises(Refused, match=named):
        thought_of(row, "x", "\n\n")


def test_equal_ids_are_refused(tmp_path):
    rows = [{**row, "id": "same"} for row in ROWS]
    with pytest.raises(InputError, match="row 2: field 'id'.*row 1"):
        thoughts(tmp_path, rows)


def test_vectors_do_not_depend_on_neighbours_and_long_texts_are_read_whole(folder, encoder):
    texts = ["a", "some longer text", "b" * 2000 + "c"]
    together = encoder(texts)
    fresh = Encoder.load(str(folder), Cache(None))
    alone = torch.cat([fresh([text]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.equal(fresh(["b" * 2000]), fresh(["b" * 2000 + "c"]))  # 1024 fit at once
    ids = fresh.tokenizer("some longer text", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = fresh.model(input_ids=ids).last_hidden_state.mean(1)[0]
    assert torch.allclose(together[1], plain, atol=1e-5)
    with pytest.raises(InputError, match="encoder nowhere"):
        Encoder.load("nowhere", Cache(None))


def test_what_was_asked_once_is_not_asked_again(tmp_path, folder):
    judge = Rates()
    for _ in range(2):
        cache = Cache(tmp_path)
        encoder = Encoder.load(str(folder), cache)
        rows = list(Labeller(encoder, Remembered(judge, "j", cache))(thoughts(tmp_path)))
    assert len(judge.asked) == 6 and cache.misses == 0
    other = list(Labeller(encoder, Remembered(judge, "other judge", cache))(thoughts(tmp_path)))
    assert len(judge.asked) == 12 and rows == other


def test_samples_of_one_prompt_stay_apart_and_empty_replies_are_asked_again(tmp_path):
    class Counts:
        def __init__(self):
            self.n = 0

        def ask(self, prompts):
            out = [
                "" if p == "fails" and self.n < 4 else f"{p}{self.n + i}"
                for i, p in enumerate(prompts)
            ]
            self.n += len(prompts)
            return out

    inner = Counts()
    asker = Remembered(inner, "m", Cache(tmp_path))
    first = asker.ask(["p", "p", "fails"])
    assert first == ["p0", "p1", ""]
    assert asker.ask(["p", "p", "fails"]) == ["p0", "p1", ""] and inner.n == 4
    assert asker.ask(["fails"]) == ["fails4"]
    assert len(set(asker.ask(["p"] * 3))) == 3 and inner.n == 8  # three are another draw


def test_a_damaged_cache_says_so(tmp_path):
    (tmp_path / FILE).write_bytes(b"not a database at all" * 100)
    with pytest.raises(InputError, match="remove it"):
        Cache(tmp_path)


def test_another_model_has_another_fingerprint(tmp_path, folder):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    before = fingerprint(tmp_path)
    assert before == fingerprint(tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(bytes(data))
    assert fingerprint(tmp_path) != before


def test_a_model_in_this_process_answers_and_one_without_room_says_nothing():
    asker = PolicyAsker(models.load("tiny", dtype="fp32", context=64, **SMALL), max_tokens=8)
    short, long = asker.ask(["hello", "x" * 60])
    assert short and long == ""
    assert asker.ask(["hello"]) == [short]  # greedy
    warm = PolicyAsker(models.load("tiny", dtype="fp32", **SMALL), max_tokens=8, temperature=1.0)
    assert len({*warm.ask(["hello"] * 6), *warm.ask(["hello"] * 6)}) == 12


def test_a_client_of_a_server_is_an_asker(caplog):
    class Server:
        def ask(self, prompts, *, max_tokens, temperature, seeds):
            self.given = (max_tokens, temperature, seeds)
            return [
                infra("503") if "bad" in p else f"{p}-{s}"
                for p, s in zip(prompts, seeds, strict=True)
            ]

    server = Server()
    asker = ClientAsker(server, max_tokens=9, temperature=0.5)
    assert asker.ask(["a", "bad", "a"]) == ["a-0", "", "a-1"]  # equal prompts, different seeds
    assert server.given == (9, 0.5, [0, 0, 1]) and "1 of 3 prompts" in caplog.text
    assert "503" in caplog.text


def test_redaction_comes_before_judge_cache_and_disk(tmp_path, encoder):
    secret = [{**ROWS[0], "prompt": "Ann: 2+3?", "notes": {"who": ["Ann"]}}]
    hide = lambda text: text.replace("Ann", "[name]")  # noqa: E731
    judge = Rates()
    cache = Cache(tmp_path / "cache")
    labeller = Labeller(encoder, Remembered(judge, "j", cache))
    (row,) = labeller(thoughts(tmp_path, secret, hide))
    assert "Ann" not in json.dumps(row) and row["notes"] == {"who": ["[name]"]}
    assert judge.asked and not any("Ann" in prompt for prompt in judge.asked)
    cache.db.close()
    assert b"Ann" not in (tmp_path / "cache" / FILE).read_bytes()


def test_the_command_labels_and_keeps_what_it_could_not(tmp_path, folder, monkeypatch, capsys):
    judge = Rates(lambda step, own: "hm" if "wrong" in step else own)
    monkeypatch.setattr(command, "asker", lambda name, options, cache, heat: judge)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hide_prompts.py").write_text(
        "def hide(text):\n    return text.replace('?', '!')\n"
    )
    data, out = tmp_path / "traces.jsonl", tmp_path / "rows.jsonl"
    write_rows(data, ROWS)
    words = ["prm", "label", "--source", "scores", "--data", str(data), "--encoder", str(folder)]
    words += ["--judge", "any", "--redact", "hide_prompts:hide", "--out", str(out)]
    assert main(words) == 0
    assert "2 of 3 traces labelled" in capsys.readouterr().out
    assert [t.prompt for t in read_traces(out)] == ["2+3!", "7-3!"]
    aside = [json.loads(line) for line in (tmp_path / "rows.unlabelled.jsonl").open()]
    assert [row["id"] for row in aside] == ["traces-2"] and "quality" in aside[0]["reason"]


def test_the_command_asks_a_server(tmp_path, folder):
    """The same labels from a judge behind an OpenAI-compatible server, on loopback."""

    async def rate(message: str, _: int) -> str:
        return Rates().ask([message])[0]

    data, out = tmp_path / "traces.jsonl", tmp_path / "rows.jsonl"
    write_rows(data, ROWS[:1])
    words = ["prm", "label", "--source", "scores", "--data", str(data), "--encoder", str(folder)]
    with FaultServer(rate) as server:
        words += ["--judge", server.url, "--out", str(out)]
        assert main(words) == 2  # which model?
        assert main([*words, "--judge-model", MODEL]) == 0
    (here,) = Labeller(Encoder.load(folder, Cache(None)), Rates())(thoughts(tmp_path, ROWS[:1]))
    (trace,) = read_traces(out)
    assert list(trace.labels) == pytest.approx(here["labels"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--source", "scores"], "--data FILE"),
        (
            ["tiny", "--source", "scores", "--data", "x", "--encoder", "y", "--judge", "z"],
            "no recipe",
        ),
        (
            [
                "--source",
                "scores",
                "--data",
                "x",
                "--encoder",
                "y",
                "--judge",
                "z",
                "--expert",
                "e",
            ],
            "go together",
        ),
        (
            ["--source", "scores", "--data", "x", "--encoder", "y", "--judge", "z", "--tau", "0"],
            "--tau",
        ),
        (
            [
                "--source",
                "scores",
                "--data",
                "x",
                "--encoder",
                "y",
                "--judge",
                "z",
                "--others",
                "0",
            ],
            "--others",
        ),
        ([], "expected a recipe"),
    ],
)
def test_usage_in_one_line(words, named, tmp_path, capsys):
    assert main(["prm", "label", *words, "--out", str(tmp_path / "o.jsonl")]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error and len(error.splitlines()) == 1


def test_a_judge_in_this_process_that_cannot_judge_ends_with_a_reason(tmp_path, folder, capsys):
    data, out = tmp_path / "traces.jsonl", tmp_path / "rows.jsonl"
    write_rows(data, ROWS)
    words = ["prm", "label", "--source", "scores", "--data", str(data), "--encoder", str(folder)]
    words += ["--judge", str(folder), "--max-tokens", "8", "--cache", str(tmp_path / "kept")]
    assert main([*words, "--out", str(out)]) == 2
    assert "no trace could be labelled" in capsys.readouterr().err
    aside = [json.loads(line) for line in (tmp_path / "rows.unlabelled.jsonl").open()]
    assert not out.exists()
    assert len(aside) == 3 and all("field 'quality'" in row["reason"] for row in aside)
