"""Our loss in transformers' Trainer: python examples/hf_trainer.py

`num_items_in_batch` is no use here (it counts labels): the tokens of the step are counted by hand,
and with more than one micro-batch a step they must be those of all of them.
"""

import tempfile

import common
from transformers import Trainer, TrainingArguments


class PolicyTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = common.loss(model, inputs)
        return (loss, {}) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        super().log(logs, *args, **kwargs)
        if "loss" in logs:
            print(f"step {self.state.global_step} loss {logs['loss']:.5f}")


model = common.model()
batch = common.batch(model)
rows = [{name: value[i] for name, value in batch.items()} for i in range(common.GROUP)]
with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        folder, per_device_train_batch_size=common.GROUP, max_steps=common.STEPS, logging_steps=1,
        learning_rate=common.RATE, lr_scheduler_type="constant", remove_unused_columns=False,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    PolicyTrainer(model, settings, train_dataset=rows).train()
