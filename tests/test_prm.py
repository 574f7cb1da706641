"""The process reward model: one packed forward, its training, published heads, the scorer."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForTokenClassification, LlamaConfig, LlamaForCausalLM, Qwen2Config

from reasonrl import InputError, Problem, config, models
from reasonrl.asking import answered, questions
from reasonrl.choice import texts
from reasonrl.cli import main
from reasonrl.labels import rows as label_rows
from reasonrl.labels import rule_labels
from reasonrl.prm import PRM, Reading, Scored
from reasonrl.prm_heads import load
from reasonrl.prm_train import PRMConfig, _loss, train
from reasonrl.rewards.prm import PRMScorer
from reasonrl.rows import Refused
from reasonrl.segment import split_steps
from reasonrl.stepwise import Trace, read_traces, trace_of, trace_row, write_rows
from reasonrl.tasks import make_task

SMALL = {"layers": 2, "width": 32, "heads": 2}
QUIET = {"note": lambda text: None}


@pytest.fixture(scope="module")
def task():
    return make_task("arithmetic", seed=0, terms=3, mod=7, ops="+-", style="compact")


def policy(seed=0):
    return models.load("tiny", seed=seed, dtype="fp32", **SMALL)


def many(prompt, completions):
    return texts([Problem("p", prompt)] * len(completions), completions)


def traces(task, count=40, wrong=True):
    """Worked completions; every second one has its last result changed."""
    out = []
    for i, problem in enumerate(task.problems("train", 0, count)):
        text = task.worked(problem)
        if wrong and i % 2:
            at = text.rindex("#") - 1
            text = text[:at] + str((int(text[at]) + 1) % 7) + text[at + 1 :]
        steps = split_steps(text, ";")
        labels = rule_labels(task, problem, text, steps)
        row = {"prompt": problem.prompt, "completions": [text[s.start : s.end] for s in steps]}
        row |= {"labels": labels, "final": task.grade(problem, text).value}
        out.append(trace_of(row, f"t{i}", True, ";"))
    return out


def model(end=True, **reading):
    policy_ = policy()
    end_id = policy_.tokenizer.eos_token_id if end else None
    return PRM.new(policy_, Reading(end=end_id, delimiter=";", **reading))


@pytest.mark.parametrize("reading", [{}, {"kind": "softmax"}, {"separator": 5}, {"kind": "value"}])
def test_packed_scores_are_those_of_a_plain_forward(task, reading):
    prm, chosen = model(**reading), traces(task, 12)
    chosen.append(chosen[0])  # a prompt that stands once for two completions
    packed = prm.score(chosen)
    body = prm.body.model
    body.set_attn_implementation("eager")
    for trace, scored in zip(chosen, packed, strict=True):
        encoded = prm.encode(trace)
        prompt = prm._prompt(trace)
        with torch.no_grad():
            hidden = body(torch.tensor([[*prompt, *encoded.ids]])).last_hidden_state[0]
        at = torch.tensor([len(prompt) + e for e in encoded.ends])
        expected = prm.probability(prm.head(hidden[at])).tolist()
        assert scored.steps == pytest.approx(expected, abs=1e-5)
        assert scored.final == pytest.approx(prm.final(hidden[-1]).sigmoid().item(), abs=1e-5)


def test_two_logits_are_a_softmax_and_the_total_is_eq_11():
    prm = model(kind="softmax")
    logits = torch.tensor([[1.2, -0.3], [0.1, 2.0]])
    assert prm.probability(logits).tolist() == pytest.approx([0.182426, 0.869892], rel=1e-5)
    scored = Scored([0.760742, 0.426490, 0.376126], 0.625)
    for alpha, total in ((0.1, 0.583619), (0.8, 1.021119), (1.0, 1.146119), (1.5, 1.458619)):
        assert scored.total(alpha) == pytest.approx(total, rel=1e-5)
    assert Scored([0.25, 0.75], None).total(9.0) == 0.5


def test_the_joint_loss_by_hand():
    """Worked numbers: predictions .7 .5 .4 against three targets, .55 against .625."""
    prm = model()
    target = [0.760742, 0.426490, 0.376126]
    trace = Trace("a", "p", ["x", "y", "z"], target, 0.625)
    logit = torch.tensor([0.7, 0.5, 0.4]).logit()[:, None]
    final = torch.tensor([0.55]).logit()
    loss = _loss(prm, logit, final, [3], [trace], PRMConfig())
    assert float(loss) == pytest.approx(0.008846, rel=1e-3)
    only = _loss(prm, logit, final, [3], [trace], PRMConfig(lambda_final=0.0))
    assert float(only) == pytest.approx(0.003221, rel=1e-3)
    # yes-or-no labels go by cross-entropy, unless the mean squared error is asked for
    yes = Trace("a", "p", ["x", "y", "z"], [1.0, 0.0, 1.0], None, True)
    entropy = _loss(prm, logit, final, [3], [yes], PRMConfig())
    expected = -(torch.tensor([0.7, 0.5, 0.4]).log()).mean()
    assert float(entropy) == pytest.approx(float(expected), rel=1e-5)
    square = _loss(prm, logit, final, [3], [yes], PRMConfig(loss="mse"))
    assert float(square) == pytest.approx((0.3**2 + 0.5**2 + 0.6**2) / 3, rel=1e-5)


def test_it_learns_and_a_resumed_run_equals_an_unbroken_one(task, tmp_path):
    data = traces(task, 120)
    keys = {"learning_rate": 2e-3, "batch_traces": 32, "dtype": "fp32", "delimiter": ";"}
    knobs = PRMConfig(steps=60, **keys, optim=config.Optim(schedule="constant"))
    whole = train(data, knobs, tmp_path / "a", policy=policy(), **QUIET)
    rows = [json.loads(s) for s in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and len(rows) == 60
    assert whole.metrics["eval/step_accuracy"] > 0.6 and whole.metrics["eval/traces"] > 0
    half = knobs.model_copy(update={"steps": 30})
    train(data, half, tmp_path / "b", policy=policy(), **QUIET)
    resumed = train(data, knobs, tmp_path / "b", resume=True, policy=policy(7), **QUIET)
    for a, b in zip(whole.prm.parameters(), resumed.prm.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len((tmp_path / "b/metrics.jsonl").read_text().splitlines()) == 60
    # it is found by the run's folder, scores the same, and is no language model
    loaded = load(tmp_path / "a", dtype="fp32")
    assert loaded.score(data[:5]) == whole.prm.score(data[:5])
    assert loaded.reading == whole.prm.reading
    with pytest.raises(InputError, match="expected a language model, got a process reward model"):
        models.load(str(tmp_path / "a/checkpoint-60"))
    with pytest.raises(InputError, match="holds a run already"):
        train(data, knobs, tmp_path / "a", policy=policy(), **QUIET)
    other = knobs.model_copy(update={"learning_rate": 1e-3})
    with pytest.raises(InputError, match="learning_rate: the run has 0.002"):
        train(data, other, tmp_path / "a", resume=True, policy=policy(), **QUIET)


def test_an_adapter_learns_and_comes_back(task, tmp_path):
    pytest.importorskip("peft")
    data = traces(task, 40)
    knobs = PRMConfig(steps=6, lora_rank=4, batch_traces=16, dtype="fp32", delimiter=";")
    whole = train(data, knobs, tmp_path / "a", policy=policy(), **QUIET)
    train(data, knobs.model_copy(update={"steps": 3}), tmp_path / "b", policy=policy(), **QUIET)
    resumed = train(data, knobs, tmp_path / "b", resume=True, policy=policy(), **QUIET)
    for name, p in whole.prm.body.model.named_parameters():
        assert torch.equal(p, dict(resumed.prm.body.model.named_parameters())[name]), name
    a, b = whole.prm.score(data[:4]), load(tmp_path / "a", dtype="fp32").score(data[:4])
    for x, y in zip(a, b, strict=True):
        assert x.steps == pytest.approx(y.steps, abs=1e-6)


def test_what_cannot_be_read_is_named_or_unscorable(task):
    prm = model(separator=5)
    mark = prm.body.tokenizer.convert_ids_to_tokens(5)
    inside = Trace("a", "1+1%7:", ["1+1=2;", f"#{mark}"], [1.0, 1.0], where="rows: row 3")
    with pytest.raises(Refused, match="step 1: holds the separator token"):
        prm.encode(inside)
    with pytest.raises(InputError, match="rows: row 3: step 1: holds the separator token"):
        train([inside], PRMConfig(separator=mark, held_out=0.0), None, policy=policy(), **QUIET)
    long = Trace("b", "1+1%7:", ["1+1=2;", "1" * 3000], [1.0, 1.0], where="rows: row 4")
    with pytest.raises(InputError, match="rows: row 4: step 1: 30.. tokens of completion"):
        train([long], PRMConfig(held_out=0.0), None, policy=policy(), **QUIET)
    rewards = PRMScorer(prm)(many("1+1%7:", ["1+1=2;#2", f"#{mark}", " ", "é"]))
    kinds = [s.kind for s in rewards.outcome]
    assert kinds == ["scored", "unscorable", "unscorable", "unscorable"]
    assert rewards.outcome[2].reason == "no steps" and "no token" in rewards.outcome[3].reason
    assert rewards.metrics["process/prm_unscorable"] == 3.0
    assert [s.reward for s in rewards.steps[1]] == [None]


def test_the_scorer_gives_steps_and_the_total(task):
    prm = model()
    rewards = PRMScorer(prm, alpha=0.5)(many("1+1-1%7:", ["1+1=2;2-1=1#1", "#"]))
    steps = [s.reward for s in rewards.steps[0]]
    (found,) = prm.score([Trace("a", "1+1-1%7:", ["1+1=2;", "2-1=1#1"])])
    assert steps == found.steps and len(steps) == 2
    assert rewards.outcome[0].value == pytest.approx(sum(steps) / 2 + 0.5 * found.final)


def test_labels_follow_the_rule_step_by_step(task):
    problem = task.problem("train", 0)
    text = task.worked(problem)
    broken = text.replace(";", ";;", 1)[:-1] + "x"  # a stray mark, and an answer that is no number
    rollout = texts([problem] * 3, [text, broken, " "])
    good, bad = label_rows(task, rollout, ";")
    assert good["labels"] == [True, True] and good["final"] == 1.0
    assert bad["labels"][-1] is False and bad["final"] == 0.0
    assert "".join(bad["completions"]) == broken and bad["problem_id"] == problem.id


# published heads ---------------------------------------------------------------------------------

WORDS = 40


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer that knows <extra_0>, to put models in."""
    tokenizer = policy().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, tokenizer


def _config(kind, size, **more):
    return kind(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **more,
    )


def _marked(tokenizer, trace, mark):
    """Ids of prompt and steps with a mark behind each step, and where the marks stand."""
    ids = tokenizer(trace.prompt, add_special_tokens=False)["input_ids"]
    ends = []
    for step in trace.steps:
        ids = [*ids, *tokenizer(step, add_special_tokens=False)["input_ids"], mark]
        ends.append(len(ids) - 1)
    return torch.tensor([ids]), ends


TRACE = Trace("a", "1+1-1%7:", ["1+1=2;", "2-1=1#1"])


def test_a_token_classifier(folder):
    path, tokenizer = folder
    torch.manual_seed(0)
    published = AutoModelForTokenClassification.from_config(
        _config(Qwen2Config, len(tokenizer), num_labels=2)
    ).eval()
    published.save_pretrained(path)
    mark = tokenizer.convert_tokens_to_ids("<extra_0>")
    ids, ends = _marked(tokenizer, TRACE, mark)
    with torch.no_grad():
        expected = published(ids).logits[0, ends].softmax(-1)[:, 1].tolist()
    (found,) = load(path, dtype="fp32").score([TRACE])
    assert found.steps == pytest.approx(expected, abs=1e-5) and found.final is None


def test_two_layers_with_a_relu(folder):
    """The layout of Qwen2ForProcessRewardModel: `model.*`, `score.0.*`, `score.2.*`."""
    path, tokenizer = folder
    torch.manual_seed(0)
    published = LlamaForCausalLM(_config(LlamaConfig, len(tokenizer), tie_word_embeddings=False))
    published.lm_head = nn.Linear(32, 1)  # not part of it
    published.config.architectures = ["Qwen2ForProcessRewardModel"]
    score = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    from safetensors.torch import save_file

    tensors = {f"model.{k}": v for k, v in published.model.state_dict().items()}
    tensors |= {f"score.{k}": v for k, v in score.state_dict().items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    published.config.save_pretrained(path)
    about = json.loads((path / "config.json").read_text())
    about["architectures"] = ["Qwen2ForProcessRewardModel"]
    (path / "config.json").write_text(json.dumps(about))
    mark = tokenizer.convert_tokens_to_ids("<extra_0>")
    ids, ends = _marked(tokenizer, TRACE, mark)
    with torch.no_grad():
        hidden = published.model.eval()(ids).last_hidden_state[0, ends]
        expected = score(hidden).softmax(-1)[:, 1].tolist()
    assert load(path, dtype="fp32").score([TRACE])[0].steps == pytest.approx(expected, abs=1e-5)


def test_a_pair_of_tokens_and_the_wrong_ways_to_ask(folder):
    path, tokenizer = folder
    torch.manual_seed(0)
    published = LlamaForCausalLM(_config(LlamaConfig, len(tokenizer))).eval()
    published.save_pretrained(path)
    wrong, right = (tokenizer.convert_tokens_to_ids(c) for c in "-+")
    mark = tokenizer.convert_tokens_to_ids("<extra_0>")
    ids, ends = _marked(tokenizer, TRACE, mark)
    with torch.no_grad():
        logits = published(ids).logits[0, ends][:, [wrong, right]]
    found = load(path, pair=("-", "+"), dtype="fp32").score([TRACE])[0]
    assert found.steps == pytest.approx(logits.softmax(-1)[:, 1].tolist(), abs=1e-5)
    with pytest.raises(InputError, match="name them .--pair WRONG RIGHT."):
        load(path)
    with pytest.raises(InputError, match='expected one token, "ab" is 2'):
        load(path, pair=("ab", "+"))
    with pytest.raises(InputError, match="no such folder"):
        load(path / "nothing")


def test_a_scalar_head_is_read_at_the_last_token_of_a_step(folder):
    from transformers import AutoModelForSequenceClassification

    path, tokenizer = folder
    torch.manual_seed(0)
    published = AutoModelForSequenceClassification.from_config(
        _config(LlamaConfig, len(tokenizer), num_labels=1, pad_token_id=0)
    ).eval()
    published.save_pretrained(path)
    expected, text = [], TRACE.prompt
    for step in TRACE.steps:
        text += step
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(float(published(ids).logits))
    assert load(path, dtype="fp32").score([TRACE])[0].steps == pytest.approx(expected, abs=1e-5)


# people, and repeats -----------------------------------------------------------------------------


def test_equal_traces_are_scored_once(task, monkeypatch):
    prm, chosen = model(), traces(task, 6)
    alone = prm.score(chosen)
    packed, real = [], prm.batches

    def counted(some, encoded, tokens):
        packed.append(len(some))
        return real(some, encoded, tokens)

    monkeypatch.setattr(prm, "batches", counted)
    assert prm.score([*chosen, *chosen[::-1]]) == [*alone, *alone[::-1]]
    assert packed == [6]


def test_people_are_asked_about_the_least_sure_steps(tmp_path):
    def trace(name, steps, labels=None):
        return Trace(name, "p", steps, labels, where=name)

    pool = [trace("a", ["x", "y"], [1.0, 1.0]), trace("b", ["z"]), trace("c", ["w"])]
    scores = [Scored([0.9, 0.52], None), Scored([0.4], None), Scored([], None, "too long")]
    asked = questions(pool, scores, 2)
    assert [(q["id"], q["step"], q["text"]) for q in asked] == [("a", 1, "y"), ("b", 0, "z")]
    assert asked[0]["before"] == ["x"] and asked[0]["answer"] is None
    path = tmp_path / "asked.jsonl"

    def answer(*values, **change):
        rows = [q | {"answer": v} | change for q, v in zip(asked, values, strict=True)]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return path

    (first,), left = answered(pool, scores, answer(False, None))
    assert (first.id, first.labels, first.boolean, left) == ("a", [1.0, 0.0], True, 1)
    done, left = answered(pool, scores, answer(0.25, True))
    assert [t.labels for t in done] == [[1.0, 0.25], [1.0]] and left == 0
    for change, says in [
        ({"id": "q"}, "row 1: field 'id': no such trace"),
        ({"step": 5}, "row 1: field 'step': expected 0..1, got 5"),
        ({"text": "other"}, "row 1: field 'text': expected 'y', got 'other'"),
    ]:
        with pytest.raises(InputError, match=says):
            answered(pool, scores, answer(True, True, **change))
    with pytest.raises(InputError, match="row 1: field 'answer': expected true, false"):
        answered(pool, scores, answer("yes", None))


def test_asking_by_command(task, tmp_path, capsys):
    model().save(tmp_path / "prm")
    data, out = tmp_path / "rows.jsonl", tmp_path / "asked.jsonl"
    write_rows(data, map(trace_row, traces(task, 4)))
    own = ["--prm", str(tmp_path / "prm"), "--data", str(data)]
    assert main(["prm", "label", "--ask", "3", *own, "--out", str(out)]) == 0
    rows = [json.loads(s) for s in out.read_text().splitlines()]
    assert len(rows) == 3 and all(r["answer"] is None for r in rows)
    back = ["prm", "label", "--answers", str(out), *own, "--out", str(tmp_path / "labelled.jsonl")]
    assert main(back) == 2
    assert "no question is answered (3 open)" in capsys.readouterr().err
    write_rows(out, [rows[0] | {"answer": True}, *rows[1:]])
    assert main(back) == 0
    assert "1 traces labelled; 2 questions still open" in capsys.readouterr().out
    (done,) = read_traces(tmp_path / "labelled.jsonl")
    assert done.labels[rows[0]["step"]] == 1.0
    for bad in (["--ask", "0", *own], ["--ask", "3"], [], ["tiny", "--ask", "2", *own]):
        assert main(["prm", "label", *bad, "--out", "x"]) == 2
