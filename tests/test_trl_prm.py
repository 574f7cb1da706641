"""TRL's former PRM trainer, and our verifiers as its reward functions."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForTokenClassification, LlamaConfig

from reasonrl import InputError, Rewards, Step, infra, models, scored
from reasonrl.integrations.trl import PRMConfig, PRMTrainer, code_reward, math_reward, scorer_reward
from reasonrl.integrations.trl_prm import accuracy, tokenize_row
from reasonrl.prm_heads import load
from reasonrl.stepwise import Trace

ROW = {"prompt": "1+1=", "completions": ["1+1=2", "#2"], "labels": [True, False]}


@pytest.fixture(scope="module")
def tokenizer():
    return models.load("tiny", layers=1, width=32, heads=2).tokenizer


def args(tmp_path, **more):
    return PRMConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **more)


def test_a_row_becomes_tokens_with_labels_on_the_separators(tokenizer, tmp_path):
    made = tokenize_row(ROW, tokenizer, args(tmp_path, step_separator=";"))
    ids = lambda s: tokenizer(s, add_special_tokens=False)["input_ids"]  # noqa: E731
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert made["input_ids"] == [*start, *ids("1+1="), *ids("1+1=2;"), *ids("#2;")]
    labelled = [i for i, label in enumerate(made["labels"]) if label != -100]
    assert [made["labels"][i] for i in labelled] == [1, 0]
    assert all(made["input_ids"][i] == ids(";")[0] for i in labelled)
    last = args(tmp_path, step_separator=";", train_on_last_step_only=True)
    assert [x for x in tokenize_row(ROW, tokenizer, last)["labels"] if x != -100] == [0]
    assert [x for x in tokenize_row(ROW, tokenizer, last, True)["labels"] if x != -100] == [1, 0]
    short = args(tmp_path, step_separator=";", max_prompt_length=2, max_length=5)
    assert tokenize_row(ROW, tokenizer, short)["input_ids"] == [*ids("1="), *ids("1+1")]


def test_it_trains_and_our_scorer_reads_the_result(tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=2,
    )
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(config)
    rows = []
    for a in range(6):
        for b in range(6):
            rows.append({"prompt": f"{a}+{b}", "completions": [f"{a}{b}=1", f"{a}{b}=2"]})
            rows[-1]["labels"] = [True, False]  # the last character decides
    data = Dataset.from_list(rows)
    knobs = args(
        tmp_path / "run",
        step_separator=";",
        learning_rate=1e-2,
        num_train_epochs=6,
        per_device_train_batch_size=12,
        seed=1,
        logging_steps=1,
        save_strategy="no",
    )
    trainer = PRMTrainer(
        model, knobs, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    assert losses[-1] < 0.3 * losses[0]
    assert trainer.evaluate()["eval_accuracy"] == 1.0
    trainer.save_model(str(tmp_path / "prm"))
    tokenizer.save_pretrained(tmp_path / "prm")
    found = load(tmp_path / "prm", separator=";", dtype="fp32")
    (scores,) = found.score([Trace("a", "2+3", ["23=1", "23=2"])])
    assert scores.steps[0] > 0.5 > scores.steps[1]


def test_an_old_script_may_ask_for_an_adapter(tokenizer, tmp_path):
    from peft import LoraConfig, TaskType

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=2,
    )  # fmt: skip
    model = AutoModelForTokenClassification.from_config(config)
    lora = LoraConfig(task_type=TaskType.TOKEN_CLS, r=2, target_modules=["q_proj"])
    knobs = args(tmp_path, max_steps=2, save_strategy="no", dataset_num_proc=2, learning_rate=0.1)
    rows = Dataset.from_list([ROW] * 4)
    trainer = PRMTrainer(
        model, knobs, train_dataset=rows, processing_class=tokenizer, peft_config=lora
    )
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("lora" in n for n in moved) and any("modules_to_save" in n for n in moved)
    assert all("lora" in n or "modules_to_save" in n for n in moved)


def test_bad_rows_and_calls(tokenizer, tmp_path):
    def trainer(rows=(ROW,), model=None, **more):
        given = {"processing_class": tokenizer, "train_dataset": list(rows)} | more
        return PRMTrainer(model, args(tmp_path), **given)

    with pytest.raises(InputError, match="dataset: row 2: field 'labels': expected 2"):
        trainer([ROW, ROW | {"labels": [True]}])
    with pytest.raises(InputError, match="row 1: field 'labels': a classifier needs true or false"):
        trainer([ROW | {"labels": [0.5, 1.0]}])
    with pytest.raises(ValueError, match="processing_class: PRMTrainer needs a tokenizer"):
        trainer(processing_class=None)
    with pytest.raises(ValueError, match="args must be a PRMConfig, got str"):
        PRMTrainer(None, "x", processing_class=tokenizer)
    import numpy as np

    logits = np.array([[[0.0, 1.0], [1.0, 0.0], [0.0, 9.0]]])
    assert accuracy((logits, np.array([[1, 1, -100]])))["accuracy"] == 0.5


def test_verifiers_are_reward_functions():
    math = math_reward()
    said = ["\\boxed{4}", "\\boxed{5}", [{"role": "assistant", "content": "#### 4"}]]
    assert math(["p"] * 3, said, answer=["4", "4", 4]) == [1.0, 0.0, 1.0]
    assert math(["p"], ["4"], answer=["{{"]) == [None]  # no gold: unknown, not 0
    with pytest.raises(ValueError, match="math_reward: expected a dataset column 'answer', got x"):
        math(["p"], ["4"], x=[1])
    code = code_reward("hidden")
    program = "def f(x):\n    return x + 1\n"
    tests = ["assert f(1) == 2\nassert f(2) == 4"]
    assert code(["p"], [program], hidden=tests) == [0.5]


def test_a_scorer_is_a_reward_function():
    seen = []

    def scorer(rollout):
        seen.append(rollout)
        steps = [[Step(0, 1, 0.9), Step(1, 2, float(n))] for n in range(3)]
        return Rewards(outcome=[scored(1.0), scored(1.0), infra("down")], steps=steps)

    score = scorer_reward(scorer, how="mean")
    columns = {"answer": [4, 4, 5], "level": [1, 1, 2], "trainer_state": object()}
    got = score(["p", "p", "q"], ["ab", "cd", "ef"], **columns)
    assert got == [pytest.approx(0.45), pytest.approx(0.95), None]
    (rollout,) = seen
    assert rollout.group.tolist() == [0, 0, 1] and rollout.problems[1].extra == {"level": 2}
    assert rollout.problems[0].answer == "4"
    with pytest.raises(ValueError, match="how must be one of"):
        scorer_reward(scorer, how="best")
