"""slime's hooks: credit computed where groups are whole, our loss under slime's own reducer."""

from types import SimpleNamespace

import pytest
import torch

from reasonrl import LossSpec, logp, policy_loss, prime_advantage
from reasonrl.integrations import slime

SIZES, PROMPTS, VOCAB = (5, 3, 7, 1), (4, 4, 2, 2), 23
MASKS = [torch.ones(n) for n in SIZES]
MASKS[2][3:5] = 0  # tool tokens


class Sample(SimpleNamespace):
    def get_reward_value(self, args):
        return self.reward if not args.reward_key else self.reward[args.reward_key]


def arguments(**changes):
    values = {
        "reward_key": "score",
        "rollout_temperature": 0.8,
        "use_rollout_logprobs": False,
        "advantage_estimator": "grpo",
        "calculate_per_token_loss": False,
        "eps_clip": 0.2,
        "eps_clip_high": 0.28,
        "eps_clip_c": None,
        "use_kl_loss": False,
        "kl_loss_coef": 0.0,
        "kl_loss_type": "low_var_kl",
        "entropy_coef": 0.0,
        "use_tis": False,
        "use_opsm": False,
        "get_mismatch_metrics": False,
        "tensor_model_parallel_size": 1,
        "context_parallel_size": 1,
    }
    return SimpleNamespace(**(values | changes))


def samples(scored=True):
    generator = torch.Generator().manual_seed(2)
    out = []
    for i, size in enumerate(SIZES):
        token = torch.randn(size, generator=generator).tolist()
        reward = {"score": float(i % 2), "token_rewards": token}
        out.append(
            Sample(
                group_index=7 + i // 2,
                response_length=size,
                reward=reward if scored else {"score": 1.0},
                loss_mask=None if i == 0 else MASKS[i].int().tolist(),
                train_metadata={"kept": i},
            )
        )
    return out


def test_the_advantage_of_whole_groups_reaches_every_rank():
    rows = samples()
    raw, outcome = slime.reward(arguments(), rows)
    assert raw == outcome == [0.0, 1.0, 0.0, 1.0]
    token = torch.cat([torch.tensor(s.reward["token_rewards"]) for s in rows])
    expected = prime_advantage(
        token,
        torch.tensor(outcome),
        torch.tensor([0, 0, 1, 1]),
        mask=torch.cat(MASKS) != 0,
        cu_seqlens=torch.tensor([0, *SIZES]).cumsum(0),
    ).split(SIZES)
    for mine in ((0, 2), (1, 3)):  # slime deals samples out without regard to groups
        data = {
            "metadata": [rows[i].train_metadata for i in mine],
            "loss_masks": [MASKS[i] for i in mine],
        }
        assert slime.advantage(arguments(), data) is None
        for i, got, back in zip(mine, data["advantages"], data["returns"], strict=True):
            torch.testing.assert_close(got, expected[i], rtol=0, atol=0)
            torch.testing.assert_close(back, expected[i], rtol=0, atol=0)
    assert rows[3].train_metadata["kept"] == 3


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(n, generator=generator)  # noqa: E731
    total = [p + n for p, n in zip(PROMPTS, SIZES, strict=True)]
    ids = [torch.randint(0, VOCAB, (n,), generator=generator) for n in total]
    logits = torch.randn(1, sum(total) + 3, VOCAB, generator=generator)  # padded at the end
    old = [-3 + 0.3 * draw(n) for n in SIZES]
    data = {
        "unconcat_tokens": ids,
        "total_lengths": total,
        "response_lengths": list(SIZES),
        "loss_masks": MASKS,
        "advantages": [draw(n) for n in SIZES],
        "log_probs": old,
        "rollout_log_probs": [o + 0.1 * draw(len(o)) for o in old],
        "ref_log_probs": [o + 0.2 * draw(len(o)) for o in old],
    }
    return data, logits


def reducer(per_token):
    """slime's: the sum over samples of masked means, or of all tokens."""

    def sum_of_sample_mean(x):
        parts = zip(x.split(SIZES), MASKS, strict=True)
        return sum((v * m).sum() / (1 if per_token else m.sum().clamp(min=1)) for v, m in parts)

    return sum_of_sample_mean


CASES = [
    {},
    {"calculate_per_token_loss": True},
    {"advantage_estimator": "gspo"},
    {"use_rollout_logprobs": True, "eps_clip_c": 3.0},
    {"use_kl_loss": True, "kl_loss_coef": 0.1, "entropy_coef": 0.02},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_loss_is_ours_under_slimes_normalisation(changes):
    args = arguments(**changes)
    data, logits = batch()
    x = logits.clone().requires_grad_()
    loss, log = slime.policy_loss(args, data, x, reducer(args.calculate_per_token_loss))
    loss.backward()

    y = logits.clone().requires_grad_()
    rows, target, end = [], [], 0
    for ids, total, size in zip(data["unconcat_tokens"], data["total_lengths"], SIZES, strict=True):
        end += total
        rows += [y[0, end - size - 1 + t] for t in range(size)]
        target += ids[-size:].tolist()
    new, entropy = logp(torch.stack(rows), torch.tensor(target), temperature=0.8, entropy=True)
    old = data["rollout_log_probs" if args.use_rollout_logprobs else "log_probs"]
    spec = LossSpec(
        ratio="sequence" if args.advantage_estimator == "gspo" else "token",
        reduce="token_mean" if args.calculate_per_token_loss else "seq_mean",
        clip_high=0.28,
        dual_clip=args.eps_clip_c,
        kl_coef=args.kl_loss_coef,
        entropy_coef=args.entropy_coef,
    )
    whole = policy_loss(
        new,
        torch.cat(old),
        torch.cat(data["advantages"]),
        spec,
        mask=torch.cat(MASKS) != 0,
        cu_seqlens=torch.tensor([0, *SIZES]).cumsum(0),
        ref_logp=torch.cat(data["ref_log_probs"]),
        entropy=entropy,
        denominator=1,
    )
    whole.loss.backward()
    assert torch.allclose(loss, whole.loss, rtol=1e-5)
    assert (x.grad - y.grad).norm() <= 1e-5 * y.grad.norm()
    assert set(log) == {"loss", *whole.metrics}


def test_the_clipped_loss_by_hand_through_slimes_reducer():
    data, logits = batch()
    loss, _ = slime.policy_loss(arguments(), data, logits, reducer(False))
    every = (logits[0] / 0.8).log_softmax(-1)
    new, end = [], 0
    for ids, total, size in zip(data["unconcat_tokens"], data["total_lengths"], SIZES, strict=True):
        end += total
        at = torch.arange(end - size - 1, end - 1)
        new.append(every[at, ids[-size:]])
    ratio = (torch.cat(new) - torch.cat(data["log_probs"])).exp()
    advantage = torch.cat(data["advantages"])
    token = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28))
    assert torch.allclose(loss, reducer(False)(token), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_tis": True}, "--use-tis has no counterpart"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size=2: .*whole logits"),
        ({"advantage_estimator": "cispo"}, "cispo"),
        ({"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "abs"}, "kl-loss-type"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    data, logits = batch()
    with pytest.raises(ValueError, match=message):
        slime.policy_loss(arguments(**changes), data, logits, reducer(False))


def test_what_is_missing_is_named():
    data, logits = batch()
    with pytest.raises(ValueError, match="reward with token_rewards, got {'score'"):
        slime.reward(arguments(), samples(scored=False))
    with pytest.raises(ValueError, match="custom-reward-post-process-path"):
        slime.advantage(arguments(), {"loss_masks": MASKS})
    with pytest.raises(ValueError, match="sum_of_sample_mean: expected 4 for ones, got 3"):
        slime.policy_loss(arguments(), data, logits, lambda x: reducer(False)(x) - 1)
    short = {"metadata": [{slime.KEY: [0.0, 1.0]}], "loss_masks": [torch.ones(3)]}
    with pytest.raises(ValueError, match="2 tokens, its loss_mask 3; was .*tokenised again"):
        slime.advantage(arguments(), short)
    del data["ref_log_probs"]
    with pytest.raises(ValueError, match="ref_log_probs is missing"):
        args = arguments(use_kl_loss=True, kl_loss_coef=0.1)
        slime.policy_loss(args, data, logits, reducer(False))
