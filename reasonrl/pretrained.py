"""Folders in the Hugging Face layout, read as data: no code of theirs, no pickled weights.

    with pretrained.reading(f"model {folder}"):
        model = pretrained.model(AutoModelForCausalLM, folder)

Whatever is wrong with a file is an InputError in one line. Weights come from safetensors alone: a
pytorch_model.bin beside or instead of them is not looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from reasonrl.progress import phase
from reasonrl.records import InputError

DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """InputError, beginning with `what`, where a file inside is missing or damaged."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not isinstance(error, DAMAGE) and type(error) is not Exception:  # tokenizers' own kind
            raise
        lines = str(error).strip().splitlines() or [repr(error)]
        raise InputError(f"{what}: {lines[0]}") from error


def part(kind: Any, folder: str | Path, **options: Any) -> Any:
    """A config, tokenizer or processor by its auto class."""
    return kind.from_pretrained(folder, trust_remote_code=False, **options)


def model(kind: Any, folder: str | Path, **options: Any) -> Any:
    """A model in fp32 by its auto class."""
    with phase("loading a model"):
        return part(kind, folder, dtype=torch.float32, use_safetensors=True, **options)
