"""TRL's GRPOTrainer with dense advantages from a scorer: python examples/trl_grpo.py"""

import tempfile

from datasets import Dataset
from transformers import TrainerCallback

from reasonrl import tiny
from reasonrl.integrations.trl import GRPOConfig, GRPOTrainer
from reasonrl.records import Rewards, Step, scored


def digits(rollout):
    """A scorer: every character is a step, a digit is worth 1 (use PRMScorer("runs/prm"))."""
    steps = [[Step(i, i + 1, float(c.isdigit())) for i, c in enumerate(t)] for t in rollout.text]
    return Rewards(outcome=[scored(0.0)] * len(steps), steps=steps)


class Show(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            print(f"step {state.global_step} loss {logs['loss']:.5f}")


model, tokenizer = tiny.build(seed=0, width=64, layers=1, heads=4)
tokenizer.padding_side = "left"
rows = Dataset.from_list([{"prompt": f"{i} + {i} = "} for i in range(64)])
with tempfile.TemporaryDirectory() as folder:
    settings = GRPOConfig(
        folder, per_device_train_batch_size=16, num_generations=8, max_completion_length=12,
        num_iterations=2, max_steps=12, logging_steps=1, learning_rate=3e-3, use_cpu=True,
        bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=settings,
        train_dataset=rows, processing_class=tokenizer, callbacks=[Show()], scorer=digits,
    ).train()  # fmt: skip
