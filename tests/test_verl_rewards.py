"""verl's reward manager with step rewards, on the released base class."""

import asyncio
import importlib
import sys
from types import SimpleNamespace

import hosts
import pytest
import torch

from reasonrl import prime_advantage
from reasonrl.integrations import verl as estimators

LENGTHS, WIDTH, PROMPT = (5, 3, 6), 6, 4


@pytest.fixture(scope="module")
def manager(require):
    """Our manager over the released RewardManagerBase."""
    require("verl", None if hosts.version("verl") else f"pip --target {hosts.folder()} verl")
    with pytest.MonkeyPatch.context() as patch:
        hosts.verl_module("verl.experimental.reward_loop.reward_manager.base", patch)
        name = "reasonrl.integrations.verl_rewards"
        patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(name).StepRewardManager
        sys.modules.pop(name)


class Tokenizer:
    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids.tolist()))


class Data:
    """What the manager reads of a DataProto: batch, non_tensor_batch, slices, items."""

    def __init__(self, batch, rows):
        self.batch, self.non_tensor_batch = batch, rows

    def __getitem__(self, at):
        pick = lambda held: {k: v[at] for k, v in held.items()}  # noqa: E731
        if isinstance(at, slice):
            return Data(pick(self.batch), pick(self.non_tensor_batch))
        return SimpleNamespace(batch=pick(self.batch), non_tensor_batch=pick(self.non_tensor_batch))


def data():
    rows = len(LENGTHS)
    attention = torch.ones(rows, PROMPT + WIDTH, dtype=torch.long)
    attention[:, 0] = 0  # prompts are padded on the left
    for row, length in enumerate(LENGTHS):
        attention[row, PROMPT + length :] = 0
    batch = {
        "prompts": torch.zeros(rows, PROMPT, dtype=torch.long),
        "responses": torch.arange(rows * WIDTH).reshape(rows, WIDTH),
        "attention_mask": attention,
    }
    others = {
        "data_source": ["sums"] * rows,
        "reward_model": [{"ground_truth": str(i)} for i in range(rows)],
        "extra_info": [{"split": "train"}, None, {}],
    }
    return Data(batch, others)


def run(made, whole):
    """The batch path: every row by itself, then all together, as `compute_rm_score` does."""

    async def every():
        return [await made.run_single(whole[i : i + 1]) for i in range(len(LENGTHS))]

    made.loop = asyncio.new_event_loop()
    try:
        out = made.loop.run_until_complete(every())
    finally:
        made.loop.close()
    scores = [item["reward_score"] for item in out]
    return out, type(made).assemble_rm_scores(whole, scores)


def steps(data_source, solution_str, ground_truth, extra_info):
    """A step ends at token 2 and at the end; the outcome is the ground truth."""
    size = len(extra_info["response_ids"])
    assert data_source == "sums" and len(solution_str.split()) == size
    return {"score": float(ground_truth), "step_rewards": [0.5, -1.0], "step_ends": [2, size]}


def test_step_rewards_reach_the_estimator_where_they_stand(manager):
    out, scores = run(manager(None, Tokenizer(), steps), data())
    expected = torch.zeros(3, WIDTH)
    for row, length in enumerate(LENGTHS):
        expected[row, 1] += 0.5
        expected[row, length - 1] += row - 1.0
    assert torch.equal(scores, expected) and scores.dtype == torch.float32
    assert [item["reward_extra_info"] for item in out] == [
        {"acc": float(i), "process": -0.5} for i in range(3)
    ]
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    value, _ = estimators.process_estimator("rloo")(
        token_level_rewards=scores, response_mask=mask, index=["a", "a", "a"], config=None
    )
    zero = torch.zeros(3)
    assert torch.equal(value, prime_advantage(expected, zero, zero.long(), mask=mask))


def test_numbers_are_placed_as_the_released_base_places_them(manager):
    async def number(**columns):
        return 0.25 + float(columns["ground_truth"])

    base = manager.__mro__[1]
    _, scores = run(manager(None, Tokenizer(), number), data())
    theirs = base.assemble_rm_scores(data(), [0.25, 1.25, 2.25])
    assert base.__module__.startswith("verl.") and torch.equal(scores, theirs)
    assert torch.equal(manager.assemble_rm_scores(data(), [0.25, 1.25, 2.25]), theirs)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"score": 1.0, "token_rewards": [1.0]}, "token_rewards must have 5 values"),
        ({"score": 1.0, "step_rewards": [1.0, 2.0], "step_ends": [9, 2]}, r"in 1..5 .*got"),
        ({"score": 1.0, "step_rewards": [1.0, 2.0], "step_ends": [2, 2]}, "one token position"),
        ({"score": 1.0, "step_rewards": [1.0]}, "one token position"),
    ],
)
def test_rewards_that_do_not_fit_are_refused(manager, result, message):
    with pytest.raises(ValueError, match=message):
        run(manager(None, Tokenizer(), lambda **_: result), data())


def test_what_is_missing_is_named(manager):
    with pytest.raises(ValueError, match="custom_reward_function"):
        manager(None, Tokenizer(), None)
    with pytest.raises(ValueError, match="verl response 1: 9 rewards for 3 tokens"):
        manager.assemble_rm_scores(data(), [0.0, [1.0] * 9, 0.0])
