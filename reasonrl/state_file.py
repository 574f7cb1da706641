"""Nested state on disk without pickle: tensors in NAME.safetensors, the rest in NAME.json.

Dicts (with keys of any plain kind), lists, tuples, None, bool, int, float, str, bytes, NumPy
arrays and tensors come back exactly as they went in, tuples as tuples, int keys as ints, NaN as
NaN: so an optimizer's state_dict and the random states of torch, NumPy and Python do. Shared
tensors are stored apart; tensors load on the CPU. Try: save_state("optimizer", opt.state_dict()).
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reasonrl.records import InputError


def save_state(path: str | Path, tree: Any) -> None:
    """Write PATH.json and PATH.safetensors; TypeError naming where a value does not fit."""
    tensors: dict[str, Tensor] = {}
    structure = _encode(tree, tensors, "state")
    path = Path(path)
    save_file(tensors, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps(structure, allow_nan=False), encoding="utf-8")


def load_state(path: str | Path) -> Any:
    """The value that `save_state` wrote; InputError where the files are damaged."""
    try:
        structure = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
        tensors = load_file(f"{path}.safetensors")
        return _decode(structure, tensors)
    except OSError as error:
        raise InputError(f"{path}: state cannot be read ({error.strerror or error})") from None
    except (KeyError, IndexError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: damaged state ({type(error).__name__}: {error})") from None
    except (SafetensorError, binascii.Error) as error:
        raise InputError(f"{path}: damaged state ({error})") from None


def rng_state() -> dict[str, Any]:
    """The states of the random generators of Python, NumPy, torch and its devices."""
    state = {"python": random.getstate(), "numpy": numpy.random.get_state()}
    state |= {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the random generators where `rng_state` found them."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _encode(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """JSON of a value; a one-key object {"kind": content} marks everything that JSON has not."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, Tensor):
        tensors[f"t{len(tensors)}"] = _own(value, tensors)
        return {"tensor": f"t{len(tensors) - 1}"}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":
        data = base64.b64encode(numpy.ascontiguousarray(value).tobytes()).decode()
        return {"array": [value.dtype.str, list(value.shape), data]}
    if isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{place}[{i}]") for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        pairs = [
            [_encode(k, tensors, f"{place} key {k!r}"), _encode(v, tensors, f"{place}[{k!r}]")]
            for k, v in value.items()
        ]
        return {"dict": pairs}
    raise TypeError(f"{place}: a {type(value).__name__} cannot be saved")


def _own(tensor: Tensor, others: dict[str, Tensor]) -> Tensor:
    """The tensor on the CPU with memory of its own, as the file format wants it."""
    flat = tensor.detach().cpu().contiguous()
    whole = flat.untyped_storage().nbytes() == flat.numel() * flat.element_size()
    start = flat.data_ptr()
    shared = any(other.data_ptr() == start for other in others.values()) if start else False
    return flat if whole and not shared else flat.clone()


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "tensor":
        return tensors[content]
    if kind == "bytes":
        return base64.b64decode(content, validate=True)
    if kind == "float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if kind == "array":
        dtype, shape, data = content
        if numpy.dtype(dtype).kind not in "biufc":
            raise ValueError(f"array of {dtype!r}")
        raw = base64.b64decode(data, validate=True)
        return numpy.frombuffer(raw, numpy.dtype(dtype)).reshape(shape).copy()
    raise ValueError(f"unknown kind {kind!r}")
