"""Fused RMSNorm and SwiGLU in a transformers model, on this instance alone: on a CPU by kernels of
ours (`cpu_layers`), on a GPU by liger-kernel.

Liger's are Triton kernels for CUDA; a layer then makes one pass over memory where plain torch makes
several. The package also puts its classes into transformers' module, for models built later: that
is undone here, so that a model on a CPU in the same process keeps its own layers. Left out: its
rotary embedding, which can only be replaced for the whole process, and its losses (ops has ours).
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from reasonrl import cpu_layers
from reasonrl.records import InputError

LIGER = ("auto", "off")


def fuse(model: Any, liger: str) -> bool:
    """Whether the model's layers are fused now: `auto` does where the architecture is known and,
    for a model on CUDA, liger-kernel is installed."""
    if liger not in LIGER:
        raise InputError(f"liger: expected one of {', '.join(LIGER)}, got {liger!r}")
    if liger == "auto" and model.device.type == "cpu":
        return cpu_layers.fuse(model)
    if (
        liger == "off"
        or model.device.type != "cuda"
        or not importlib.util.find_spec("liger_kernel")
    ):
        return False
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
