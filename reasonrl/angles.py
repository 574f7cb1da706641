"""Angles of a rotary embedding that positions alone decide, kept from step to step."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

FIXED = ("default", "linear", "llama3", "yarn")
_made: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by their module


def fixed(rotary: Any) -> bool:
    return getattr(rotary, "rope_type", None) in FIXED


def table(rotary: Any, like: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin (P, d), in the dtype of `like` (..., D), of so many positions or more; made anew
    where what they come from is another."""
    way = getattr(rotary.forward, "__func__", rotary.forward)
    of = like.dtype, getattr(rotary, "attention_scaling", 1.0), way
    kept, frequency = _made.get(rotary), rotary.inv_freq
    if kept and kept[0] == of and len(kept[2][0]) >= positions and torch.equal(kept[1], frequency):
        return kept[2]
    at = torch.arange(max(1, positions), device=like.device)[None]
    with torch.no_grad():
        cos, sin = (x[0].contiguous() for x in rotary(like.flatten(0, -2)[:1, None], at))
    _made[rotary] = of, frequency.clone(), (cos, sin)
    return cos, sin
