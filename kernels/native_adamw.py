"""AdamW behind a limit on the gradient's norm, on the CPU."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from reasonrl.kernels.native import core, threads


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
    given: list[int] = []
    for w, g, mean, square, step in parameters:  # a `Learned` of csrc/ops.h each
        given += (w.data_ptr(), g.data_ptr(), mean.data_ptr(), square.data_ptr(), step.data_ptr())
        given.append(w.numel())
    numbers = array("q", given)
    at, how = numbers.buffer_info()[0], (rate, *betas, eps, decay, limit, usable)
    return core().adamw(at, len(parameters), *how, threads())
