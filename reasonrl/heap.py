"""What a CPU process gives back while it learns.

Going backward, activations are freed in pieces between which gradients settle: glibc keeps the
pieces, and the process holds both at once. Given back where a third and two thirds of the layers
are done, a step of SmolLM2-135M peaks 0.25 GiB lower, for a few hundredths of its time.
"""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor, nn

WORTH = 1 << 25  # parameters from which there is enough to give back
AT = (2 / 3, 1 / 3)  # of the layers, counted from the first


def trim() -> bool:
    """Free memory inside the heap goes back to the system; False where the C library has no way."""
    try:
        release = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return False
    release(0)
    return True


def trim_in_backward(model: Any) -> int:
    """From now on in every backward of this model on a CPU; at how many places."""
    layers = getattr(model.get_decoder(), "layers", None)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if model.device.type != "cpu" or not isinstance(layers, nn.ModuleList) or size < WORTH:
        return 0
    places = sorted({int(part * len(layers)) for part in AT})
    learning = [[p for p in layers[at].parameters() if p.requires_grad] for at in places]
    if not all(learning) or not trim():
        return 0
    for parameters in learning:
        parameters[0].register_post_accumulate_grad_hook(_hook)
    return len(places)


def _hook(_: Tensor) -> None:
    trim()
