"""The rival's side of the step benchmark: stock TRL GRPOTrainer, its own loop, its own defaults.

Its steps are timed by a callback of its own Trainer; phases by wrapping its methods. The end of
sequence is suppressed, so that every completion has the full length, as on our side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.step_ours import (
    RATE,
    Ours,
    Parity,
    Settings,
    gate_batch,
    now,
    parity,
    prompt_texts,
    vectors,
)
from reasonrl import smollm2, tiny


def parity_reward(completions: list[str], **_: Any) -> list[float]:
    return parity(len(completions))


class Rival(TrainerCallback):
    """TRL's trainer; `train` runs it and hands control over after each of its steps."""

    def __init__(self, settings: Settings, dtype: str, folder: str):
        self.settings = settings
        model, tokenizer = _load(settings.model)
        texts = prompt_texts(tokenizer, settings)
        rows = settings.prompts * settings.group
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=settings.device == "cpu",
            bf16=dtype == "bf16",
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=1,
            num_generations=settings.group,
            max_completion_length=settings.tokens,
            max_steps=settings.repeats + 1,
            generation_kwargs={"min_new_tokens": settings.tokens},
            gradient_checkpointing=settings.checkpointing,
            loss_type="grpo",
            beta=0.0,
            temperature=1.0,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            shuffle_dataset=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=parity_reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=tokenizer,
            callbacks=[self],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.before = vectors(self.trainer.model)
        self.steps: list[dict[str, float]] = []
        self.tokens = self.prompt_tokens = 0  # of the last step
        self.spent = {"rollout": 0.0, "prepare": 0.0}
        self._timed("_generate_single_turn", "rollout", self._count)
        self._timed("_generate_and_score_completions", "prepare", lambda *_: None)

    def _timed(self, method: str, phase: str, after: Callable) -> None:
        original = getattr(self.trainer, method)

        def timed(*args, **kwargs):
            began = now(self.settings.device)
            out = original(*args, **kwargs)
            self.spent[phase] += now(self.settings.device) - began
            after(args, out)
            return out

        setattr(self.trainer, method, timed)

    def _count(self, args: tuple, out: tuple) -> None:
        self.prompt_tokens = sum(map(len, args[0]))
        self.tokens = sum(map(len, out[0]))

    def train(self, after: Callable[[int], bool]) -> None:
        """All steps; `after(number)` runs between them and says whether to go on."""
        self.after = after
        self.trainer.train()

    def on_step_begin(self, args, state, control, **kwargs):
        self.spent = dict.fromkeys(self.spent, 0.0)
        self.began = now(self.settings.device)

    def on_step_end(self, args, state, control, **kwargs):
        total, spent = now(self.settings.device) - self.began, self.spent
        phases = {
            "rollout": spent["rollout"],
            "score": spent["prepare"] - spent["rollout"],
            "update": total - spent["prepare"],
        }
        self.steps.append(phases | {"total": total})
        control.should_training_stop |= not self.after(len(self.steps) - 1)
        return control

    def changed(self) -> bool:
        return not torch.equal(self.before, vectors(self.trainer.model))

    def gradient(self, algo: Parity) -> Tensor:
        """The loss gradient with respect to the head on the gate's batch; changes nothing."""
        trainer = self.trainer
        rollout, advantage = gate_batch(algo)
        sizes = [len(ids) for ids in rollout.completion_ids]
        prompts = [rollout.prompt_ids[g] for g in rollout.group.tolist()]
        prompt_ids, prompt_mask = _padded(prompts, left=True)
        completion_ids, completion_mask = _padded(rollout.completion_ids, left=False)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        inputs = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "advantages": torch.stack([part[0] for part in advantage.split(sizes)]),
            "num_items_in_batch": torch.tensor(sum(sizes)),
        }
        inputs = {name: value.to(trainer.model.device) for name, value in inputs.items()}
        trainer._compute_loss(trainer.model, inputs).backward()
        out = trainer.model.get_output_embeddings().weight.grad.clone()
        trainer.model.zero_grad(set_to_none=True)
        trainer._metrics["train"].clear()
        return out


def agreement(ours: Ours, rival: Rival) -> dict[str, float]:
    """How the two gradients compare on one batch: cosine, and the ratio of their norms."""
    a, b = ours.gradient().double().flatten(), rival.gradient(ours.algo).double().flatten()
    return {
        "cosine": float(a @ b / (a.norm() * b.norm())),
        "norm_ratio": float(a.norm() / b.norm()),
    }


def _load(name: str):
    if name == "tiny":
        return tiny.build()
    folder = str(smollm2.fetch() if name == "smollm2" else name)
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model, AutoTokenizer.from_pretrained(folder)


def _padded(rows: Any, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(width - len(row), None) if left else slice(0, len(row))
        ids[b, at], mask[b, at] = torch.tensor(row), 1
    return ids, mask
