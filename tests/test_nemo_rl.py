"""NeMo-RL's protocols: the same divisor as the host, micro-batch by micro-batch."""

import pytest
import torch

from reasonrl import LossSpec, group_advantage, policy_loss, prime_advantage
from reasonrl.integrations.nemo_rl import AdvantageEstimator, LossType, PolicyLoss

CFG = {  # the host's own defaults for GRPO, by its names
    "reference_policy_kl_penalty": 0.0,
    "reference_policy_kl_type": "k3",
    "kl_input_clamp_value": 20.0,
    "kl_output_clamp_value": 10.0,
    "ratio_clip_min": 0.2,
    "ratio_clip_max": 0.28,
    "ratio_clip_c": None,
    "use_on_policy_kl_approximation": False,
    "use_importance_sampling_correction": False,
    "truncated_importance_sampling_ratio": None,
    "token_level_loss": True,
}
UNCLAMPED = {"kl_input_clamp_value": None, "kl_output_clamp_value": None}
ROWS, WIDTH = 6, 11


def batch(seed=0):
    """A BatchedDataDict is a dict; every tensor has the full width, prompt included."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(ROWS, WIDTH, generator=generator)  # noqa: E731
    token_mask = (torch.arange(WIDTH) >= 4).float().expand(ROWS, WIDTH).clone()
    for row, size in enumerate([11, 8, 5, 11, 9, 11]):
        token_mask[row, size:] = 0
    prev = -1 + 0.2 * draw()
    data = {
        "input_ids": torch.zeros(ROWS, WIDTH, dtype=torch.long),
        "token_mask": token_mask,
        "sample_mask": torch.tensor([1.0, 1, 1, 0, 1, 1]),  # row 3 was filtered out
        "advantages": draw(),
        "prev_logprobs": prev,
        "generation_logprobs": prev,
        "reference_policy_logprobs": prev + 0.1 * draw(),
    }
    return data, (prev + 0.5 * draw())[:, 1:]


def part(data, rows):
    return {k: v[rows] for k, v in data.items()}


CASES = [
    {},
    {"ratio_clip_c": 3.0},
    {"token_level_loss": False},
    {"token_level_loss": False, "sequence_level_importance_ratios": True},
    {"reference_policy_kl_penalty": 0.05, **UNCLAMPED},
    {"disable_ppo_ratio": True},
    {"force_on_policy_ratio": True},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_sum_over_micro_batches_is_our_loss(changes):
    data, new = batch()
    fn = PolicyLoss(CFG | changes)
    x = new.clone().requires_grad_()
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    seqs, toks = data["sample_mask"].sum(), mask.sum()
    loss = torch.zeros(())
    for rows in (slice(0, 2), slice(2, 6)):  # of different sizes
        share, metrics = fn(part(data, rows), seqs, toks, next_token_logprobs=x[rows])
        loss = loss + share
        assert metrics["loss"] == pytest.approx(float(share))
    loss.backward()

    y = new.clone().requires_grad_()
    spec = LossSpec(
        ratio="sequence" if changes.get("sequence_level_importance_ratios") else "token",
        surrogate="reinforce" if changes.get("disable_ppo_ratio") else "clip",
        reduce="token_mean" if changes.get("token_level_loss", True) else "seq_mean",
        clip_high=0.28,
        dual_clip=changes.get("ratio_clip_c"),
        kl_coef=changes.get("reference_policy_kl_penalty", 0.0),
    )
    whole = policy_loss(
        y,
        None if changes.get("force_on_policy_ratio") else data["prev_logprobs"][:, 1:],
        data["advantages"][:, 1:],
        spec,
        mask=mask != 0,
        ref_logp=data["reference_policy_logprobs"][:, 1:],
        denominator=toks if spec.reduce == "token_mean" else seqs,
    )
    whole.loss.backward()
    assert torch.allclose(loss, whole.loss, rtol=1e-5, atol=1e-7)
    assert (x.grad - y.grad).norm() <= 1e-5 * y.grad.norm()
    assert bool((x.grad[3] == 0).all()) and bool((x.grad[:, :3] == 0).all())


def test_the_clipped_token_loss_by_hand():
    data, new = batch()
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    ratio = (new - data["prev_logprobs"][:, 1:]).exp()
    advantage = data["advantages"][:, 1:]
    token = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28))
    loss, _ = PolicyLoss(CFG)(data, torch.tensor(5.0), torch.tensor(99.0), next_token_logprobs=new)
    assert torch.allclose(loss, (token * mask).sum() / 99.0)


def test_the_attributes_say_which_divisor_is_used():
    assert PolicyLoss(CFG).loss_type is LossType.TOKEN_LEVEL
    assert PolicyLoss(CFG | {"token_level_loss": False}).loss_type is LossType.SEQUENCE_LEVEL
    assert PolicyLoss(CFG).input_type.value == "logprob"


def test_process_credit_and_outcomes_by_group():
    data, _ = batch()
    mask = data["token_mask"]
    prompts = torch.tensor([[5, 6], [5, 6], [7, 8], [5, 6], [7, 8], [7, 8]])  # (B, P) is allowed
    group = torch.tensor([0, 0, 1, 0, 1, 1])
    rewards = torch.tensor([1.0, 0, 1, 1, 0, 0])
    token = torch.randn(ROWS, WIDTH) * mask
    valid = torch.tensor([1.0, 1, 1, 0, 1, 1])
    expected = prime_advantage(token, rewards, group, mask=mask != 0, scored=valid.bool())
    made = AdvantageEstimator("process")
    for extra in ({"token_rewards": token}, {"repeated_batch": {"token_rewards": token}}):
        got = made.compute_advantage(prompts, rewards, mask, valid_mask=valid, **extra)
        assert torch.equal(got, expected) and expected.abs().sum() > 0
    for kind in ("grpo", "rloo"):
        got = AdvantageEstimator(kind).compute_advantage(group, rewards, mask)
        assert torch.equal(got, group_advantage(rewards, group, kind=kind)[:, None] * mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_importance_sampling_correction": True}, "use_importance_sampling_correction=True"),
        ({"use_cispo": True}, "use_cispo"),
        ({"reference_policy_kl_penalty": 0.1}, "kl_input_clamp_value=20.0"),
    ],
)
def test_options_without_a_counterpart_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(CFG | changes)


def test_what_is_missing_is_named():
    data, new = batch()
    counts = torch.tensor(5.0), torch.tensor(30.0)
    with pytest.raises(ValueError, match="expected next_token_logprobs .*got logits"):
        PolicyLoss(CFG)(data, *counts, logits=new)
    del data["reference_policy_logprobs"]
    with pytest.raises(ValueError, match="reference_policy_logprobs is missing"):
        fn = PolicyLoss(CFG | UNCLAMPED | {"reference_policy_kl_penalty": 0.1})
        fn(data, *counts, next_token_logprobs=new)
    with pytest.raises(ValueError, match="needs token_rewards"):
        AdvantageEstimator().compute_advantage(torch.zeros(6), torch.zeros(6), data["token_mask"])
    with pytest.raises(ValueError, match="kind must be one of"):
        AdvantageEstimator("gae")
