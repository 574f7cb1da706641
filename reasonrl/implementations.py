"""Which implementation of an op runs: native, triton, cuda, reference.

`impl="auto"` takes native on the CPU; on a GPU cuda, then triton, of those that have the op; and
the reference for float64 or where nothing else can run (said once in the log "reasonrl"). An
implementation asked for by name runs or raises KernelUnavailable. Kernels are imported on first
use. Under torch.compile the op becomes one operator (`compiled`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from reasonrl import checks, compiled, keys
from reasonrl.records import KernelUnavailable

IMPLS = ("auto", "native", "triton", "cuda", "reference")
PARTS = ("vocab_stats", "vocab_grads")  # of linear_logp, where a rank has a part of the vocabulary
TRITON = ("logp", "linear_logp", "policy_loss", "linear_policy_loss", *PARTS)  # kernels/<name>.py
VOCABULARY = ("logp", "linear_logp", "linear_policy_loss", *PARTS)  # on a GPU Triton's alone
LAYERS = ("rms_norm", "add_rms_norm", "swiglu", "rotary")
ON_A_CPU = ("masked_softmax", "slot_attention", *LAYERS)  # a GPU has its own ways:
ON_A_GPU = {
    "add_rms_norm_": "layers", "gate": "layers", "place_and_attend": "slots", "draw": "draw",
    "decoder_layer": "gpu_decoder", "read_prompts": "gpu_decoder",
}  # fmt: skip

log = keys.logger("reasonrl")


class DtypeUnavailable(KernelUnavailable, ValueError):
    """A fast implementation was asked for with float64 tensors."""


def run(op: str, impl: str, *args: Any) -> Any:
    """`op` of the implementation, on arguments in packed form."""
    checks.choice("impl", impl, IMPLS)
    args = tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)
    return _compiled(op, impl, args) if torch.compiler.is_compiling() else eager(op, impl, args)


def eager(op: str, impl: str, args: tuple) -> Any:
    """Call `op` of the implementation; "auto" goes on to the next where one cannot run."""
    tensors = _tensors(args)
    if impl != "auto":
        return _named(op, impl, tensors, args)(*args)
    order = _order(op, tensors)
    for candidate, following in zip(order, order[1:], strict=False):
        try:
            return _function(op, candidate, args)(*args)
        except KernelUnavailable as why:
            _say_once(op, candidate, following, str(why))
    return _function(op, order[-1], args)(*args)


_compiled = compiled.bind(eager)


@cache
def native(op: str) -> Callable[..., Any]:
    """The native op itself, for a caller that has looked at what it passes and calls it so often
    that the way through `run` would be seen."""
    return _function(op, "native", ())


@cache
def triton(op: str) -> Callable[..., Any]:
    """A function of layers or decoding on a GPU itself, likewise."""
    return _found(op, "triton", ON_A_GPU[op])


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """All tensors among the arguments, those of a credit with them."""
    found: list[Tensor] = []
    for x in args:
        inner = (x,) if isinstance(x, Tensor) else vars(x).values() if _is_credit(x) else ()
        found += [value for value in inner if isinstance(value, Tensor)]
    return found


def _is_credit(x: Any) -> bool:
    """A tensor is not asked: not to have something takes it long."""
    return not isinstance(x, Tensor) and hasattr(x, "token_reward")


def _order(op: str, tensors: Sequence[Tensor]) -> list[str]:
    """What may run these tensors, as `_named` has it; the best first."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or any(x.dtype == torch.float64 for x in tensors):
        return ["reference"]
    if device == "cpu":
        return ["native", "reference"]
    gpu = ["triton"] if op in VOCABULARY else ["cuda", "triton"] if op in TRITON else ["cuda"]
    return [*([] if op in ON_A_CPU else gpu), "reference"]


def _named(
    op: str, impl: str, tensors: Sequence[Tensor], args: Sequence[Any]
) -> Callable[..., Any]:
    device = tensors[0].device.type
    if impl != "reference" and any(x.dtype == torch.float64 for x in tensors):
        raise DtypeUnavailable(
            f"impl={impl!r} has no float64: {op} in float64 runs on impl='reference'"
        )
    if (impl == "native" and device != "cpu") or (impl == "cuda" and device != "cuda"):
        raise KernelUnavailable(f"impl={impl!r} cannot run {op} on {device} tensors")
    return _function(op, impl, args)


def _function(op: str, impl: str, args: Sequence[Any]) -> Callable[..., Any]:
    if impl == "triton" and op not in TRITON:
        raise KernelUnavailable(f"impl='triton' has no {op}; it has {', '.join(TRITON)}")
    if impl == "triton" and any(map(_is_credit, args)):
        raise KernelUnavailable(
            f"impl='triton' has no {op} of a credit; credit_advantage(credit) makes a tensor of it"
        )
    file = "linear_logp" if op in PARTS else op
    return _found(op, impl, file if impl == "triton" else impl)


def _found(op: str, impl: str, file: str) -> Callable[..., Any]:
    try:
        name = f"reasonrl.kernels.{file}"
        found = sys.modules.get(name) or importlib.import_module(name)
        reason = found.available()
        call = getattr(found, op, None) if reason is None else None
    except ModuleNotFoundError as missing:
        need = f"no module {missing.name}{_hint(missing.name)}"
        raise KernelUnavailable(f"impl={impl!r} cannot run {op}: {need}") from missing
    if call is None:
        raise KernelUnavailable(f"impl={impl!r} cannot run {op}: {reason or 'it has no such op'}")
    return call


def _hint(module: str | None) -> str:
    return "; pip install triton" if module == "triton" else ""


@cache
def _say_once(op: str, missed: str, taken: str, why: str) -> None:
    log.warning("%s: impl='auto' takes %s instead of %s: %s", op, taken, missed, why)
