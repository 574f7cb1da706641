"""Heads that others have published, read as our `PRM`: what a folder's config says decides.

    prm.json                         ours
    ...ForTokenClassification        two logits (or one) at the separator         (TRL, many others)
    Qwen2ForProcessRewardModel       two layers with a ReLU, two logits at `<extra_0>`
    ...ForSequenceClassification     one number at the last token of every step   (scalar heads)
    ...ForCausalLM with `pair`       the logits of two tokens at the separator    (Math-Shepherd)

A token pair is a head of two rows of the language model's own, so it too is a linear layer. None
of these has a trajectory score; the total is then the mean of the steps. Left out: LoRA-only
folders (merge them first), models that need code of their own.
    prm = load("folder", separator="<extra_0>")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from reasonrl import attention, checkpoint, models, pretrained
from reasonrl.models import Policy
from reasonrl.prm import PRM, Reading, layers
from reasonrl.records import InputError

SCORE = ("score.", "classifier.", "v_head.", "value_head.")  # what the head's tensors are called


def load(
    folder: str | Path,
    *,
    separator: str | None = None,  # the token behind every step; None: `<extra_0>` where it exists
    pair: tuple[str, str] | None = None,  # (wrong, right) tokens of a causal model
    delimiter: str = "\n",
    dtype: str = "auto",
    device: str = "cpu",
) -> PRM:
    """A process reward model of ours or of a published kind; InputError says what is missing."""
    path = Path(folder)
    if not path.is_dir():
        raise InputError(
            f"prm {folder}: no such folder; give the --out folder of `reasonrl prm train`, or a"
            " published model's"
        )
    if (path / models.PRM_FILE).is_file() or checkpoint.checkpoints(path):
        return PRM.load(path, dtype=dtype, device=device)
    with pretrained.reading(f"prm {folder}"):
        config = pretrained.part(AutoConfig, path)
        tokenizer = pretrained.part(AutoTokenizer, path)
    architecture = (config.architectures or ["none"])[0]
    if architecture.endswith("ForCausalLM"):
        if pair is None:
            raise InputError(
                f"prm {folder}: a causal language model scores steps by two of its tokens; name"
                " them (--pair WRONG RIGHT), or train a head with `reasonrl prm train`"
            )
        model, heads = _from_pair(path, tokenizer, pair)
        kind = "softmax"
    else:
        with pretrained.reading(f"prm {folder}"):
            model, heads = pretrained.model(AutoModel, path), _heads(path)
        kind = _kind(architecture, heads, folder)
    model.set_attn_implementation(attention.NAME)
    target = models.placed(device)
    body = Policy(model.to(target), tokenizer, models.compute_dtype(dtype, target))
    mark = None if kind == "value" and separator is None else _mark(tokenizer, separator, folder)
    reading = Reading(kind=kind, separator=mark, end=None, delimiter=delimiter)
    return PRM(body, layers(heads, "").to(target), None, reading)


def _kind(
    architecture: str, heads: dict[str, Tensor], folder: Any
) -> Literal["sigmoid", "softmax", "value"]:
    last = max((name for name in heads if name.endswith("weight")), default=None)
    if last is None:
        raise InputError(
            f"prm {folder}: expected a head ({', '.join(SCORE)}...), {architecture} has none"
        )
    width = heads[last].shape[0]
    if width not in (1, 2):
        raise InputError(f"prm {folder}: expected a head of 1 or 2 outputs, got {width}")
    if width == 2:
        return "softmax"
    return "value" if architecture.endswith("ForSequenceClassification") else "sigmoid"


def _heads(path: Path) -> dict[str, Tensor]:
    """The head's tensors, their names without the prefix."""
    found: dict[str, Tensor] = {}
    try:
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    for prefix in SCORE:
                        if name.startswith(prefix):
                            found[name.removeprefix(prefix)] = tensors.get_tensor(name).float()
    except SafetensorError as error:
        raise InputError(f"{path}: {error}") from error
    return found


def _from_pair(path: Path, tokenizer: Any, pair: tuple[str, str]) -> tuple[Any, dict[str, Tensor]]:
    """The body of a causal model, and the head's rows of two tokens."""
    ids = [_token(tokenizer, token, path) for token in pair]
    with pretrained.reading(f"prm {path}"):
        model = pretrained.model(AutoModelForCausalLM, path)
    head: Any = model.get_output_embeddings()
    heads = {"weight": head.weight.detach()[ids].clone()}
    if head.bias is not None:
        heads["bias"] = head.bias.detach()[ids].clone()
    return model.get_decoder(), heads


def _mark(tokenizer: Any, separator: str | None, folder: Any) -> int:
    if separator is not None:
        return _token(tokenizer, separator, folder)
    if "<extra_0>" in tokenizer.get_vocab():
        return tokenizer.get_vocab()["<extra_0>"]
    raise InputError(f"prm {folder}: name the token behind every step (--separator TOKEN)")


def _token(tokenizer: Any, token: str, folder: Any) -> int:
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        shown = json.dumps(token, ensure_ascii=False)
        raise InputError(f"prm {folder}: expected one token, {shown} is {len(ids)}")
    return ids[0]
