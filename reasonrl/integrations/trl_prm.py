"""A PRM trainer for those whose scripts used TRL's, which 1.16 no longer has.

    PRMTrainer(model, PRMConfig(output_dir="prm"), train_dataset=rows, processing_class=tokenizer)

The data format (`prompt`, `completions`, `labels`), the config's names and the model (token
classification, two classes) are the ones those scripts know: `step_separator` stands behind every
step, its last token carries the step's label, all else is -100. Everything beyond that is
transformers' Trainer. `reasonrl.prm_heads.load(folder, separator=...)` reads the result where the
separator is one token. Left out: the trajectory score (our own `reasonrl prm train` has it).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

from reasonrl.records import InputError
from reasonrl.rows import Refused
from reasonrl.stepwise import trace_of

IGNORED = -100


@dataclass
class PRMConfig(TrainingArguments):
    """transformers' TrainingArguments and how a row becomes tokens."""

    max_length: int | None = field(default=1024, metadata={"help": "tokens of a row, at most"})
    max_prompt_length: int | None = field(
        default=512, metadata={"help": "the prompt's last tokens"}
    )
    max_completion_length: int | None = field(default=None, metadata={"help": "its first tokens"})
    step_separator: str = field(default="\n", metadata={"help": "text behind every step"})
    train_on_last_step_only: bool = field(default=False, metadata={"help": "label the last alone"})
    disable_dropout: bool = field(default=True, metadata={"help": "no dropout in training"})
    dataset_num_proc: int | None = field(
        default=None,
        metadata={"help": "taken from old scripts; rows become tokens in this process"},
    )
    remove_unused_columns: bool | None = False
    learning_rate: float = 1e-5


class PRMTrainer(Trainer):
    """Trainer of a token classifier on stepwise rows; datasets that are tokenised already
    (`input_ids`, `labels`) are taken as they are."""

    def __init__(
        self,
        model: Any = None,
        args: PRMConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **more: Any,
    ):
        if processing_class is None:
            raise ValueError("processing_class: PRMTrainer needs a tokenizer, got None")
        args = args or PRMConfig(output_dir="prm")
        if not isinstance(args, PRMConfig):
            raise ValueError(f"args must be a PRMConfig, got {type(args).__name__}")
        classes = getattr(getattr(model, "config", None), "num_labels", 2)
        if classes != 2:
            raise ValueError(f"model must be a token classifier of 2 classes, got {classes}")
        if peft_config is not None:
            import peft  # optional

            model = peft.get_peft_model(model, peft_config)
        if args.disable_dropout and model is not None:
            for module in model.modules():
                if type(module).__name__ == "Dropout":
                    module.p = 0.0
        collator = more.pop("data_collator", None)
        if collator is None:
            collator = DataCollatorForTokenClassification(processing_class)
        more.setdefault("compute_metrics", accuracy)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=_tokenised(train_dataset, processing_class, args, False),
            eval_dataset=_tokenised(eval_dataset, processing_class, args, True),
            processing_class=processing_class,
            **more,
        )


def tokenize_row(
    row: Mapping[str, Any], tokenizer: Any, args: PRMConfig, is_eval: bool = False
) -> dict[str, list[int]]:
    """{input_ids, labels} of a row; Refused names the field at fault.

    With `train_on_last_step_only` an evaluation row keeps all of its labels.
    """
    trace = trace_of(row, "row", True, args.step_separator)
    if not trace.boolean and not set(trace.labels or ()) <= {0.0, 1.0}:
        raise Refused("field 'labels': a classifier needs true or false for every step")
    mark = tokenizer(args.step_separator, add_special_tokens=False)["input_ids"]
    if not mark:
        raise Refused(f"step_separator: expected some tokens, got none for {args.step_separator!r}")
    last = len(trace.steps) - 1
    ids: list[int] = []
    labels: list[int] = []
    for i, (step, label) in enumerate(zip(trace.steps, trace.labels or (), strict=True)):
        own = [*tokenizer(step, add_special_tokens=False)["input_ids"], *mark]
        silent = args.train_on_last_step_only and not is_eval and i < last
        ids += own
        labels += [IGNORED] * (len(own) - 1) + [IGNORED if silent else int(label)]
    prompt = tokenizer(_plain(trace.prompt, tokenizer), add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        prompt = [tokenizer.bos_token_id, *prompt]
    if args.max_prompt_length is not None:
        prompt = prompt[-args.max_prompt_length :]
    keep = args.max_completion_length
    ids, labels = (ids, labels) if keep is None else (ids[:keep], labels[:keep])
    whole, marks = [*prompt, *ids], [*([IGNORED] * len(prompt)), *labels]
    if args.max_length is not None:
        whole, marks = whole[: args.max_length], marks[: args.max_length]
    return {"input_ids": whole, "labels": marks}


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of labelled steps whose class is right, as {"accuracy": ...}."""
    logits, labels = prediction
    known = labels != IGNORED
    if not known.any():
        return {"accuracy": float("nan")}
    return {"accuracy": float((np.argmax(logits, axis=-1)[known] == labels[known]).mean())}


def _tokenised(dataset: Any, tokenizer: Any, args: PRMConfig, is_eval: bool) -> Any:
    """A dataset (or a dict of them) with tokens in place of text."""
    if dataset is None:
        return None
    if isinstance(dataset, Mapping) and not hasattr(dataset, "features"):
        return {k: _tokenised(v, tokenizer, args, is_eval) for k, v in dataset.items()}
    rows: Sequence[Mapping[str, Any]] = [dataset[i] for i in range(len(dataset))]
    if rows and {"input_ids", "labels"} <= rows[0].keys():
        return dataset
    out, unlabelled = [], 0
    for number, row in enumerate(rows, 1):
        try:
            made = tokenize_row(row, tokenizer, args, is_eval)
        except Refused as error:
            raise InputError(f"dataset: row {number}: {error}") from None
        unlabelled += all(label == IGNORED for label in made["labels"])
        out.append(made)
    if unlabelled:
        warnings.warn(
            f"reasonrl: {unlabelled} of {len(rows)} rows lost every label to the length limits",
            stacklevel=3,
        )
    return out


def _plain(prompt: Any, tokenizer: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
