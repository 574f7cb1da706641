"""AdamW behind a limit on the gradient's norm, on the CPU."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from reasonrl.kernels.native import core, threads

EACH = 6  # numbers of a `Learned` of csrc/ops.h


def adamw(
    parameters: Sequence[Sequence[Tensor]],  # weight, gradient, exp_avg, exp_avg_sq; step: fp32
    rate: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    limit: float,
    usable: bool,
) -> float:
    """The gradients' norm; where it is finite, and they are usable, weights and moments after a
    step, in place, all of them contiguous. The gradients stay as they are."""
    given = array("q")
    for tensors in parameters:
        given.extend([*(x.data_ptr() for x in tensors), tensors[0].numel()])
    at, numbers = given.buffer_info()
    return core().adamw(at, numbers // EACH, rate, *betas, eps, decay, limit, usable, threads())
