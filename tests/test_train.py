"""A run: it learns, stops, resumes bit for bit, refuses what it must, and survives NaN."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from reasonrl import config as configs
from reasonrl.cli import main
from reasonrl.records import InputError, NonFiniteStop
from reasonrl.train import Run, train

SMALL = [
    "model_options={width: 32, layers: 1, heads: 2}",
    "task_options={terms: 2, ops: '+', mod: 5, low: 0, style: compact}",
    "steps=4",
    "cold_start_steps=3",
    "cold_start.batch=8",
    "prompts_per_step=3",
    "group=4",
    "max_completion_length=12",
    "eval_problems=4",
    "learning_rate=1e-4",
    "optim.schedule=constant",
    "threads=1",
]


def small(*changes):
    return configs.load("tiny", [*SMALL, *changes])


def rows(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(small(), out, quiet=True)
    return out


def test_a_run_leaves_what_the_contract_lists(unbroken):
    written = rows(unbroken)
    assert [r["step"] for r in written] == [1, 2, 3, 4]
    names = """reward reward_std frac_reward_zero_std completions/mean_length kl entropy grad_norm
    completions/clipped_ratio clip_ratio/region_mean num_tokens step_time loss learning_rate
    time/rollout time/score time/update""".split()
    for row in written:
        assert not [n for n in names if n not in row]
    assert written[-1]["eval/problems"] == 4
    assert [r["step"] for r in rows(unbroken, "evals.jsonl")] == [0, 4]
    assert [r["step"] for r in rows(unbroken, "cold_start.jsonl")] == [1, 2, 3]
    table = pyarrow.parquet.read_table(unbroken / "completions" / "completions_00001.parquet")
    assert table.num_rows == 12
    assert {"step", "prompt", "completion", "advantage", "reward"} <= set(table.column_names)
    assert {"steps", "step_rewards", "step_advantages"} <= set(table.column_names)
    assert configs.read(unbroken / "config.yaml") == small()


def test_checkpoints_load_in_transformers(unbroken):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(unbroken / "checkpoint-4")
    tokenizer = AutoTokenizer.from_pretrained(unbroken / "checkpoint-4")
    assert tokenizer.decode(tokenizer("1+2:")["input_ids"]) == "1+2:"
    assert model.config.use_cache


def test_loaded_weights_lie_at_addresses_like_those_of_new_ones(unbroken):
    """A matrix product rounds by alignment: weights in a mapped file would give other last bits."""
    from reasonrl import models

    model = models.load(str(unbroken / "checkpoint-4"), dtype="fp32").model
    assert {p.data_ptr() % models.ALIGNED for p in model.parameters()} == {0}


def test_resumed_equals_unbroken_bit_for_bit(unbroken, tmp_path):
    out = tmp_path / "run with spaces"
    train(small("steps=2"), out, quiet=True)
    assert train(small(), out, resume=True, quiet=True)
    assert same(weights(out / "checkpoint-4"), weights(unbroken / "checkpoint-4"))
    a = load_file(out / "checkpoint-4" / "optimizer.safetensors")
    assert same(a, load_file(unbroken / "checkpoint-4" / "optimizer.safetensors"))
    timeless = lambda r: {k: v for k, v in r.items() if "time" not in k and "eval" not in k}  # noqa: E731
    assert list(map(timeless, rows(out))) == list(map(timeless, rows(unbroken)))


def test_stopped_in_the_cold_start_resumes_bit_for_bit(unbroken, tmp_path):
    out = tmp_path / "run"
    run = Run(small(), out, resume=False, quiet=True)
    original = run._cold_step

    def stop_after_two(sft):
        original(sft)
        if run.cold == 2:
            signal.raise_signal(signal.SIGTERM)

    run._cold_step = stop_after_two
    assert not run.train()
    assert (out / "checkpoint-0").is_dir()
    assert train(small(), out, resume=True, quiet=True)
    assert same(weights(out / "checkpoint-4"), weights(unbroken / "checkpoint-4"))
    assert [r["step"] for r in rows(out, "cold_start.jsonl")] == [1, 2, 3]


def test_resume_may_change_steps_and_nothing_that_matters(unbroken, tmp_path):
    with pytest.raises(InputError, match="learning_rate: the run has 0.0001"):
        train(small("learning_rate=1e-3"), unbroken, resume=True)
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        train(small(), tmp_path / "nothing", resume=True)
    with pytest.raises(InputError, match="holds a run already"):
        train(small(), unbroken)


def test_a_data_file_trains_by_any_recipe(tmp_path):
    data = tmp_path / "sums.jsonl"
    lines = [{"prompt": f"{a}+{b}:", "answer": str(a + b)} for a in range(9) for b in range(9)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = [c for c in SMALL if not c.startswith("task_options")] + [f"task={data}"]
    assert main(["train", "tiny", *changes, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert rows(tmp_path / "run")[-1]["step"] == 4
    # every row may be learned from where none is to be held out
    changes += ["task_options={dev: 0.0, test: 0.0}", "eval_problems=0"]
    assert main(["train", "tiny", *changes, "--out", str(tmp_path / "all"), "--quiet"]) == 0


def test_rl_learns_beyond_the_cold_start(tmp_path):
    """Outcomes of the last ten steps are plainly above those of the first ten."""
    changes = ["model_options={width: 64, layers: 2, heads: 4}", "eval_problems=0", "steps=70"]
    changes += ["cold_start_steps=160", "cold_start.batch=32", "cold_start.learning_rate=4e-3"]
    changes += ["cold_start.warmup=5", "prompts_per_step=16", "group=8", "learning_rate=1e-3"]
    changes += ["optim.warmup=2", "optim.schedule=linear", "log.completions_every=0"]
    train(small(*changes), tmp_path / "run", quiet=True)
    reward = [r["reward"] for r in rows(tmp_path / "run")]
    assert sum(reward[-10:]) / 10 > sum(reward[:10]) / 10 + 0.1


def test_a_nan_gradient_leaves_the_parameters_and_stops_after_three(tmp_path):
    run = Run(small("cold_start_steps=0"), tmp_path / "run", resume=False, quiet=True)
    before = {k: v.clone() for k, v in run.algo.policy.model.state_dict().items()}
    hook = lambda grad: torch.full_like(grad, float("nan"))  # noqa: E731
    next(iter(run.algo.policy.model.parameters())).register_hook(hook)
    advantage = type(run.algo).advantage
    ones = lambda self, rewards, rollout: advantage(self, rewards, rollout) + 1  # noqa: E731
    object.__setattr__(run.algo, "advantage", ones.__get__(run.algo))
    with pytest.raises(NonFiniteStop, match="3 steps in a row"):
        run.train()
    assert same(before, run.algo.policy.model.state_dict())


def test_kl_and_several_updates_run_and_measure(tmp_path):
    changes = ["loss={name: grpo, kl_coef: 0.5}", "updates=3", "steps=3", "learning_rate=1e-2"]
    train(small(*changes), tmp_path / "run", quiet=True)
    written = rows(tmp_path / "run")
    assert written[0]["kl"] < written[2]["kl"] and written[2]["kl"] > 1e-5
    assert (tmp_path / "run" / "reference" / "checkpoint-0").is_dir()
    out = tmp_path / "parts"
    train(small(*changes[:2], "steps=2", changes[3]), out, quiet=True)
    train(small(*changes), out, resume=True, quiet=True)
    assert same(weights(out / "checkpoint-3"), weights(tmp_path / "run" / "checkpoint-3"))


def test_micro_batches_do_not_change_the_step(unbroken, tmp_path):
    train(small("batch.tokens=20"), tmp_path / "run", quiet=True)
    a, b = weights(tmp_path / "run" / "checkpoint-4"), weights(unbroken / "checkpoint-4")
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


@pytest.mark.parametrize("name", ["dr_grpo", "gspo", "gspo_token", "cispo", "sapo", "gmpo", "bnpo"])
def test_every_named_loss_trains(name, tmp_path):
    train(small(f"loss={{name: {name}}}", "steps=1", "eval_problems=0"), tmp_path / "r", quiet=True)
    assert rows(tmp_path / "r")[0]["grad_norm"] >= 0


def test_sigterm_finishes_the_step_and_the_run_resumes(unbroken, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "reasonrl.cli", "train", "tiny", *SMALL, "--out", str(out)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([*command, "steps=400"], env=env, cwd=tmp_path, text=True)
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 0
    done = rows(out)[-1]["step"]
    assert (out / f"checkpoint-{done}").is_dir()
    assert (
        main(
            ["train", "tiny", *SMALL, f"steps={done + 1}", "--out", str(out), "--resume", "--quiet"]
        )
        == 0
    )
    assert rows(out)[-1]["step"] == done + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tyny"], "unknown recipe 'tyny'; did you mean 'tiny'"),
        (["tiny", "learning_rat=1"], "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        (["tiny", "steps=many"], "steps: expected an integer, got 'many'"),
        (["tiny", "task=arithmetik"], "did you mean 'arithmetic'"),
        (["tiny", "group=1"], "group: process needs at least 2 completions, got 1"),
        (["tiny", "algorithm=ppo"], "algorithm"),
        (["tiny", "sample.temperature=0"], "sample.temperature: expected > 0"),
        (["tiny", "loss.clip=0.1"], "loss"),
        (["tiny", "model=./nowhere"], "no such folder"),
        (["tiny", "task=missing.jsonl"], "missing.jsonl"),
        (["tiny", "max_completion_length=2000"], "2000 exceeds the model's context of 1024"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments, "--out", str(tmp_path / "run"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(Path(tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "words",
    [
        ["train", "tiny"],
        ["eval", "tiny"],
        ["judge", "data", "tiny", "--out", "rows.jsonl"],
        ["prm", "label", "tiny", "--out", "rows.jsonl"],
    ],
)
def test_the_device_of_a_config_is_where_its_model_goes(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*words, "device=cuda"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("device: expected a usable NVIDIA GPU for cuda, found none")


def test_unwritable_output_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", "tiny", *SMALL, "--out", str(tmp_path / "file" / "run"), "--quiet"]) == 2
    assert "file" in capsys.readouterr().err


def test_a_model_with_another_vocabulary_is_refused(unbroken, tmp_path):
    from transformers import AutoTokenizer

    folder = tmp_path / "mixed"
    tokenizer = AutoTokenizer.from_pretrained(unbroken / "checkpoint-4")
    from reasonrl import models, tiny

    model, _ = tiny.build(width=32, layers=1, heads=2)
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(9)])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="tokenizer has 109 tokens, the embedding 100 rows"):
        models.load(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="expected weights"):
        models.load(str(folder))


def test_signals_belong_to_their_owner_again_after_a_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(small("steps=1", "cold_start_steps=0", "eval_problems=0"), tmp_path / "a", quiet=True)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    errors = []

    def in_a_thread():
        try:
            train(small("steps=1", "cold_start_steps=0"), tmp_path / "b", quiet=True)
        except ValueError as error:  # what signal.signal raises outside the main thread
            errors.append(error)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert not errors and (tmp_path / "b" / "checkpoint-1").is_dir()
