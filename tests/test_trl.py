"""TRL's trainer with our loss: TRL's numbers for every loss type, dense advantages end to end."""

import json
import warnings

import pyarrow.parquet
import pytest
import torch
import trl
from trl_tiny import trainer

from reasonrl import tiny
from reasonrl.integrations.trl import GRPOTrainer
from reasonrl.records import Rewards, Step, infra, scored
from reasonrl.segment import split_steps


def batch(dense=False, sequence=False, seed=0, off_policy=0.3):
    """Rows of TRL's inputs: left-padded prompts, ragged completions, an empty one, a dead group."""
    generator = torch.Generator().manual_seed(seed)
    rows, prompt, length = 8, 6, 10
    prompt_mask = torch.ones(rows, prompt, dtype=torch.long)
    prompt_mask[1, :3] = 0
    completion_mask = torch.ones(rows, length, dtype=torch.long)
    for row, size in enumerate([10, 7, 1, 10, 4, 0, 9, 10]):
        completion_mask[row, size:] = 0
    draw = lambda *shape: torch.randint(4, 90, shape, generator=generator)  # noqa: E731
    noise = lambda: off_policy * torch.randn(rows, length, generator=generator)  # noqa: E731
    advantages = torch.tensor([1.0, -0.5, 0.7, -1.2, 0.0, 0.0, 0.0, 0.0])
    if dense:
        advantages = torch.randn(rows, length, generator=generator)
    return {
        "prompt_ids": draw(rows, prompt),
        "prompt_mask": prompt_mask,
        "completion_ids": draw(rows, length),
        "completion_mask": completion_mask,
        "advantages": advantages,
        "num_items_in_batch": completion_mask.sum(),
        "old_per_token_logps": -4.5 + noise(),
        "ref_per_token_logps": -4.5 + noise(),
    }


def loss_and_gradients(t, kind, inputs):
    t.model.train()
    t.model.zero_grad()
    loss = kind._compute_loss(t, t.model, inputs)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in t.model.named_parameters()}
    metrics = {k: v[-1] for k, v in t._metrics["train"].items()}
    t._metrics["train"].clear()
    return loss.detach(), grads, metrics


def compare(t, inputs):
    # TRL's own path calls our log-prob method through self, so it is put back to TRL's for it
    ours = loss_and_gradients(t, GRPOTrainer, inputs)
    t.fused = False
    theirs = loss_and_gradients(t, trl.GRPOTrainer, inputs)
    t.fused = True
    assert torch.allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-6), (ours[0], theirs[0])
    for name, grad in theirs[1].items():
        error = (ours[1][name] - grad).norm() / grad.norm().clamp(min=1e-8)
        assert error < 1e-5, (name, float(error))
    assert ours[2].keys() == theirs[2].keys()
    for name, value in theirs[2].items():
        assert ours[2][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


CASES = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo"},
    {"loss_type": "dapo"},
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "sapo"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon_high": 0.28},
    {"loss_type": "grpo", "beta": 0.04},
    {"loss_type": "dapo", "beta": 0.1, "delta": 1.5, "epsilon": 0.1},
    {"loss_type": "bnpo", "gradient_accumulation_steps": 4},
    {"loss_type": "dapo", "gradient_accumulation_steps": 4, "steps_per_generation": 4},
    {"loss_type": "grpo", "entropy_coef": 0.02},
    {"loss_type": "sapo", "beta": 0.02, "temperature": 0.7},
]


@pytest.mark.parametrize("dense", [False, True], ids=["row", "token"])
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_loss_gradient_and_metrics_are_trls(tmp_path, options, dense):
    t = trainer(tmp_path, **options)
    inputs = batch(dense)
    if not options.get("beta"):
        inputs.pop("ref_per_token_logps")
    compare(t, inputs)
    inputs.pop("old_per_token_logps")  # on-policy: TRL leaves them out
    compare(t, inputs)


def test_tool_tokens_do_not_count(tmp_path):
    t = trainer(tmp_path, loss_type="dapo")
    inputs = batch(dense=True)
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][:, 2:5] = 0
    compare(t, inputs)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_type": "luspo"}, "loss_type"),
        ({"loss_type": "vespo"}, "loss_type"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold"),
        ({"beta": 0.1, "use_bias_correction_kl": True}, "use_bias_correction_kl"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "importance_sampling"),
        ({"loss_type": "grpo", "epsilon": 0.2, "delta": 1.1}, "delta must be >= 1"),
    ],
)
def test_what_has_no_fused_path_is_refused_by_name(tmp_path, options, named):
    with pytest.raises(ValueError, match=rf"{named}.*fused=False"):
        trainer(tmp_path, **options)
    trainer(tmp_path, fused=False, **options)


def test_a_delta_that_trl_ignores_is_dropped_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="delta"):
        t = trainer(tmp_path, loss_type="sapo", delta=2.0)
    assert t.loss_spec().delta is None


def test_a_head_that_is_no_plain_product_is_refused(tmp_path):
    model, tokenizer = tiny.build(seed=0, width=32, layers=1, heads=2)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="head is a Sequential.*fused=False"):
        trainer(tmp_path, model=(model, tokenizer))


def parity(rollout):
    """A scorer by rule: a line of the completion is good where it holds an even digit."""
    steps = []
    for text in rollout.text:
        found = split_steps(text, ";")
        rewards = [float(any(c in "02468" for c in text[s.start : s.end])) for s in found]
        steps.append([Step(s.start, s.end, r) for s, r in zip(found, rewards, strict=True)])
    return Rewards(outcome=[scored(0.0)] * len(rollout.text), steps=steps)


def test_dense_advantages_are_outcome_plus_process_returns(tmp_path):
    t = trainer(tmp_path, scorer=parity, max_completion_length=12)
    plain = trainer(tmp_path, max_completion_length=12)
    rows = [t.train_dataset[i // 4] for i in range(8)]
    outputs = []
    for one in (t, plain):
        torch.manual_seed(3)
        one.model.train()
        outputs.append(one._generate_and_score_completions([dict(r) for r in rows]))
    dense, scalar = outputs
    assert torch.equal(dense["completion_ids"], scalar["completion_ids"])
    mask = dense["completion_mask"].bool()
    extra = (dense["advantages"] - scalar["advantages"][:, None]) * mask
    assert dense["advantages"].shape == mask.shape
    assert bool((dense["advantages"][~mask] == 0).all()) and extra.abs().max() > 0
    texts = [t.processing_class.decode(i[m], skip_special_tokens=True) for i, m in
             zip(dense["completion_ids"], mask, strict=True)]  # fmt: skip
    shown = list(t._logs["extra"]["step_rewards"])
    assert [len(s) for s in shown] == [len(split_steps(text, ";")) for text in texts]

    group = slice(0, 4)  # the first group by hand: returns of r_t minus the others' mean rate
    rate = [sum(s) / max(1, int(m.sum())) for s, m in zip(shown[group], mask[group], strict=True)]
    for b in range(4):
        n = int(mask[b].sum())
        others = sum(r for i, r in enumerate(rate) if i != b) / 3
        assert float(extra[b, 0]) == pytest.approx(sum(shown[b]) - n * others, abs=1e-4)


def test_a_completion_the_scorer_does_not_know_gets_the_outcome_alone(tmp_path):
    def half(rollout):
        rewards = parity(rollout)
        outcome = [infra("down") if b == 1 else s for b, s in enumerate(rewards.outcome)]
        return Rewards(outcome=outcome, steps=rewards.steps)

    t = trainer(tmp_path, scorer=half)
    t.model.train()
    rows = [dict(t.train_dataset[0]) for _ in range(4)] + [dict(t.train_dataset[1])] * 4
    torch.manual_seed(0)
    output = t._generate_and_score_completions(rows)
    mask = output["completion_mask"][1].bool()
    values = output["advantages"][1][mask]
    assert bool((values == values[0]).all())


def test_whole_groups_are_asked_for(tmp_path):
    t = trainer(tmp_path, scorer=parity)
    t.args.steps_per_generation, t.args.per_device_train_batch_size = 1, 6
    with pytest.raises(ValueError, match="6 completions of one process must be whole groups"):
        t._check_scorer()


def test_it_trains_end_to_end(tmp_path):
    """Twenty steps on dense advantages: the reward that the scorer pays goes up."""
    seen = []

    def watched(rollout):
        rewards = parity(rollout)
        flat = [s.reward for steps in rewards.steps for s in steps]
        seen.append(sum(flat) / max(1, len(flat)))
        return rewards

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = trainer(
            tmp_path,
            scorer=watched,
            per_device_train_batch_size=32,
            num_generations=8,
            max_steps=20,
            learning_rate=1e-2,
            loss_type="dapo",
        )
        t.train()
    assert sum(seen[-5:]) / 5 > sum(seen[:5]) / 5 + 0.1, seen
    logs = [row for row in t.state.log_history if "loss" in row]
    assert len(logs) == 20 and json.dumps(logs)
    assert {"entropy", "clip_ratio/region_mean", "reward"} <= logs[-1].keys()


def halves(inputs, parts):
    """The batch cut into micro-batches as TRL cuts it: rows of every tensor, counts whole."""
    size = len(inputs["advantages"]) // parts
    for i in range(parts):
        rows = slice(i * size, (i + 1) * size)
        yield {k: v[rows] if v.dim() else v for k, v in inputs.items()}


SPLITS = [{"loss_type": kind} for kind in ("grpo", "dr_grpo", "dapo", "sapo")]
SPLITS += [{"loss_type": "cispo", "epsilon_high": 5.0}]


@pytest.mark.parametrize("options", SPLITS, ids=lambda o: o["loss_type"])
def test_eight_micro_batches_of_one_give_the_gradient_of_one_of_eight(tmp_path, options):
    """(Not bnpo, whose mean over a micro-batch's own tokens depends on the cut, as TRL's does.)"""
    t = trainer(tmp_path, gradient_accumulation_steps=8, steps_per_generation=8, **options)
    inputs = batch(dense=True)
    inputs.pop("ref_per_token_logps")
    t.model.train()
    t.model.zero_grad()
    for part in halves(inputs, 8):
        t._compute_loss(t.model, part).backward()
    many = {n: p.grad.clone() for n, p in t.model.named_parameters()}
    t.model.zero_grad()
    t.current_gradient_accumulation_steps = t.args.steps_per_generation = 1
    t._compute_loss(t.model, inputs).backward()
    for name, p in t.model.named_parameters():
        assert (many[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name


def test_reference_log_probs_that_are_missing_are_named(tmp_path):
    t = trainer(tmp_path, beta=0.04)
    inputs = batch()
    inputs.pop("ref_per_token_logps")
    with pytest.raises(ValueError, match="ref_logp must be given where kl_coef = 0.04"):
        t._compute_loss(t.model, inputs)


def test_twenty_dense_steps_lower_the_loss_and_their_table_shows_step_rewards(tmp_path):
    t = trainer(tmp_path, scorer=parity, max_steps=20, log_completions=True, num_iterations=2)
    t.train()
    (first, *_) = sorted((tmp_path / "completions").glob("*.parquet"))
    table = pyarrow.parquet.read_table(first).to_pydict()
    assert len(table["step_rewards"]) == len(table["completion"]) == 8
    for text, steps in zip(table["completion"], table["step_rewards"], strict=True):
        assert len(steps) == len(split_steps(text, ";"))
    logs = [row["loss"] for row in t.state.log_history if "loss" in row]
    pairs = list(zip(logs[::2], logs[1::2], strict=True))  # every second step: the same rollout
    assert len(logs) == 20 and sum(after < before for before, after in pairs) >= 9, pairs


def test_two_ranks_give_the_gradient_of_one(tmp_path, monkeypatch):
    """A rank's gradient is averaged with the others': each divides by its share of the tokens."""
    t = trainer(tmp_path, loss_type="dapo")
    inputs = batch(dense=True)
    inputs.pop("ref_per_token_logps")
    t.model.train()
    t.model.zero_grad()
    t._compute_loss(t.model, inputs).backward()
    one = {n: p.grad.clone() for n, p in t.model.named_parameters()}
    t.model.zero_grad()
    monkeypatch.setattr(type(t.accelerator), "num_processes", property(lambda self: 2))
    for part in halves(inputs, 2):  # what each of two ranks computes; DDP takes the mean
        (t._compute_loss(t.model, part) / 2).backward()
    for name, p in t.model.named_parameters():
        assert (one[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name
