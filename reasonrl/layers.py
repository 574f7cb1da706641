"""Fused layers in a transformers model, on this instance alone: on a CPU by kernels of ours
(`cpu_layers`), on a GPU whole ones by ours (`gpu_layers`) and RMSNorm and SwiGLU by liger-kernel.

Liger's are Triton kernels for CUDA; a layer then makes one pass over memory where plain torch makes
several. The package also puts its classes into transformers' module, for models built later: that
is undone here, so that a model on a CPU in the same process keeps its own layers. Left out: its
rotary embedding, which can only be replaced for the whole process, and its losses (ops has ours).
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from reasonrl import cpu_layers, gpu_layers, structure
from reasonrl.records import InputError, KernelUnavailable

LIGER = ("auto", "ours", "off")


def fuse(model: Any, liger: str) -> bool:
    """Whether layers of the model are fused now. `auto` fuses where the architecture is known: on a
    CPU by ours, on a GPU by liger-kernel where it is installed, and whole layers and decoding by
    ours; `ours` is that too, but InputError where a GPU has none of ours."""
    if liger not in LIGER:
        raise InputError(f"liger: expected one of {', '.join(LIGER)}, got {liger!r}")
    if liger == "off":
        return False
    if model.device.type == "cpu":
        return cpu_layers.fuse(model)
    if model.device.type != "cuda":
        return False
    found = importlib.util.find_spec("liger_kernel") is not None and _ligers(model)
    return _whole(model, must=liger == "ours") or found


def fused(model: Any) -> bool:
    """Whether layers of ours are in the model."""
    return (cpu_layers if model.device.type == "cpu" else gpu_layers).fused(model)


def _whole(model: Any, must: bool) -> bool:
    try:
        found = gpu_layers.fuse(model)
    except KernelUnavailable as missing:
        if must:
            raise InputError(f"liger: ours: {missing}") from None
        return False
    if must and not found:
        known = ", ".join(structure.TURNED)
        raise InputError(f"liger: ours knows the layers of {known}, got {model.config.model_type}")
    return found


def _ligers(model: Any) -> bool:
    from liger_kernel.transformers import monkey_patch

    if model.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    module = vars(sys.modules[type(model).__module__])
    before = dict(module)
    try:
        monkey_patch._apply_liger_kernel_to_instance(
            model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False
        )
    finally:
        module.update(before)
    return True
