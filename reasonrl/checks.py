"""Shape, dtype, device and value checks at the public border, and the two layouts of token tensors.

Every error names the argument, what was expected and what came: "mask must be (B, T) = (4, 512),
got (4, 511)". Values of integers are looked at on the CPU always, elsewhere only with
REASONRL_CHECK=1 (it costs a synchronisation). Legend: B completions, T tokens, N packed tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

FULL = (torch.float32, torch.float64)
ANY_FLOAT = (*FULL, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MASK = (torch.bool, *INTEGER)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of B completions lie: padded (B, T) or packed (N,), seen as packed."""

    shape: tuple[int, ...]  # (B, T) or (N,)
    cu: Tensor  # (B+1,) int64
    mask: Tensor | None  # (N,) bool

    @property
    def rows(self) -> int:
        return self.cu.numel() - 1

    @property
    def letters(self) -> str:
        return "(B, T)" if len(self.shape) == 2 else "(N,)"

    def token(self, name: str, x: Tensor, dtypes: Sequence[torch.dtype] = FULL) -> Tensor:
        """x in this layout -> (N,) contiguous."""
        tensor(name, x, self.shape, self.letters, dtypes, self.cu.device)
        return x if x.dim() == 1 else x.reshape(-1)

    def spread(self, name: str, x: Tensor) -> Tensor:
        """x per token or per completion (B,) -> (N,)."""
        _is_tensor(name, x)
        if tuple(x.shape) == self.shape:
            return self.token(name, x)
        if tuple(x.shape) != (self.rows,):
            wanted = f"{self.letters} = {_tuple(self.shape)} or (B,) = {_tuple((self.rows,))}"
            raise ValueError(f"{name} must be {wanted}, got {_tuple(x.shape)}")
        tensor(name, x, (self.rows,), "(B,)", FULL, self.cu.device)
        if len(self.shape) == 2:
            return x[:, None].expand(self.shape).reshape(-1)
        return x.repeat_interleave(self.cu.diff(), output_size=self.shape[0])


def layout(
    name: str,
    shape: Sequence[int],  # of the token tensor called `name`
    device: torch.device,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Layout:
    shape = tuple(shape)
    if len(shape) not in (1, 2):
        raise ValueError(f"{name} must be padded (B, T) or packed (N,), got {_tuple(shape)}")
    if len(shape) == 2:
        if cu_seqlens is not None:
            raise ValueError(
                f"cu_seqlens goes with packed (N,) tensors, got {name} of {_tuple(shape)}"
            )
        cu = torch.arange(shape[0] + 1, device=device) * shape[1]
    elif cu_seqlens is None:
        cu = torch.tensor([0, shape[0]], device=device)
    else:
        cu = offsets("cu_seqlens", cu_seqlens, shape[0], device)
    made = Layout(shape, cu, None)
    if mask is None:
        return made
    kept = made.token("mask", mask, MASK)
    return Layout(shape, cu, kept if kept.dtype == torch.bool else kept != 0)


def offsets(name: str, cu: Tensor, n: int, device: torch.device, total: str = "N") -> Tensor:
    """Offsets (B+1,) as int64: from 0 to n without falling."""
    _is_tensor(name, cu)
    if cu.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {_dtype(cu.dtype)}")
    if cu.dim() != 1 or cu.numel() < 1:
        raise ValueError(f"{name} must be (B+1,), got {_tuple(cu.shape)}")
    _on(name, cu, device)
    cu = cu.long().contiguous()
    if values_checked(cu):
        edges = cu.tolist()
        if edges[0] != 0 or edges[-1] != n:
            raise ValueError(
                f"{name} must run from 0 to {total} = {n}, got {edges[0]} to {edges[-1]}"
            )
        if edges != sorted(edges):
            pairs = enumerate(zip(edges, edges[1:], strict=False))
            at, (here, then) = next(pair for pair in pairs if pair[1][0] > pair[1][1])
            raise ValueError(f"{name} must not fall, got {here} then {then} at {at}")
    return cu


def tensor(
    name: str,
    x: Tensor,
    shape: Sequence[int],
    letters: str,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    _is_tensor(name, x)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be {letters} = {_tuple(shape)}, got {_tuple(x.shape)}")
    dtype(name, x, dtypes)
    _on(name, x, device)


def dtype(name: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    _is_tensor(name, x)
    if x.dtype not in dtypes:
        known = {FULL: "float32 or float64", ANY_FLOAT: "floating point", INTEGER: "integer"}
        known |= {MASK: "bool or integer", (*MASK, *FULL): "bool, integer, float32 or float64"}
        wanted = known.get(tuple(dtypes), " or ".join(_dtype(d) for d in dtypes))
        raise ValueError(f"{name} must be {wanted}, got {_dtype(x.dtype)}")


def integers(name: str, x: Tensor, low: int, high: int) -> Tensor:
    """x as int64; where values are looked at, all of them lie in [low, high)."""
    if values_checked(x) and x.numel():
        least, most = (int(value) for value in x.aminmax())
        if least < low or most >= high:
            raise ValueError(
                f"{name} must lie in [{low}, {high}), got {least if least < low else most}"
            )
    return x.long()


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def positive(name: str, value: float) -> float:
    if not _real(value) or not value > 0:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return float(value)


def number(name: str, value: float) -> float:
    if not _real(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def nonnegative(name: str, value: float) -> float:
    if not _real(value) or not value >= 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return float(value)


def finite(name: str, x: Tensor, where: Tensor | None = None) -> None:
    if torch.compiler.is_compiling():
        return
    # NaN and inf survive any addition, so a finite sum settles it in one pass; another one may be
    # that of values that do not count
    if math.isfinite(float(x.detach().sum())):
        return
    bad = ~torch.isfinite(x) if where is None else ~torch.isfinite(x) & where
    if bool(bad.any()):
        at = int(bad.reshape(-1).nonzero()[0, 0])
        raise ValueError(
            f"{name} must be finite where it is scored, got {float(x.reshape(-1)[at])} at {at}"
        )


def divisor(value: float | Tensor | None) -> float | Tensor | None:
    """The caller's `denominator`: a number or a 0-d tensor above 0."""
    if not isinstance(value, Tensor):
        return None if value is None else positive("denominator", value)
    given = cast(Tensor, value)  # torch's own isinstance hook hides this from type checkers
    if given.dim() != 0:
        raise ValueError(f"denominator must be a number or 0-d, got {_tuple(given.shape)}")
    return positive("denominator", given.item()) if values_checked(given) else given


def loss_inputs(
    lay: Layout,
    old_logp: Tensor | None,
    advantage: Any,  # a tensor, or a credit (reasonrl.credit) in its place
    spec: Any,
    ref_logp: Tensor | None,
    is_weight: Tensor | None,
    denominator: float | Tensor | None,
    dtype: torch.dtype = torch.float32,  # of a credit's numbers
) -> dict[str, Any]:
    if spec.kl_coef and ref_logp is None:
        raise ValueError(f"ref_logp must be given where kl_coef = {spec.kl_coef}, got None")
    if spec.reduce == "fixed" and spec.max_length is None and denominator is None:
        raise ValueError(
            "max_length or denominator must be given where reduce = 'fixed', got neither"
        )
    if is_credit(advantage):
        worth = advantage.packed(lay, dtype)
    else:
        worth = _plain(lay.spread("advantage", advantage))
    return {
        "old": None if old_logp is None else _plain(lay.token("old_logp", old_logp)),
        "advantage": worth,
        "ref": None if ref_logp is None else _plain(lay.token("ref_logp", ref_logp)),
        "weight": None if is_weight is None else _plain(lay.spread("is_weight", is_weight)),
        "divisor": divisor(denominator),
    }


def is_credit(x: object) -> bool:
    """One of `reasonrl.credit`; a tensor is not asked: not to have something takes it long."""
    return not isinstance(x, Tensor) and hasattr(x, "packed")


def _plain(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dtype("weight", weight, ANY_FLOAT)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be (V, D) = (V, {hidden.shape[-1]}), got {tuple(weight.shape)}"
        )
    tensor("weight", weight, weight.shape, "(V, D)", ANY_FLOAT, hidden.device)
    if bias is not None:
        tensor("bias", bias, weight.shape[:1], "(V,)", ANY_FLOAT, hidden.device)


def groups(name: str, reward: Tensor, group: Tensor, scored: Tensor | None) -> Tensor:
    dtype(name, reward, FULL)
    if reward.dim() != 1:
        raise ValueError(f"{name} must be (B,), got {tuple(reward.shape)}")
    tensor("group", group, reward.shape, "(B,)", INTEGER, reward.device)
    if scored is not None:
        tensor("scored", scored, reward.shape, "(B,)", (torch.bool,), reward.device)
    finite(name, reward, scored)
    return group.long()


def scale(temperature: float, softcap: float | None) -> tuple[float, float | None]:
    cap = None if softcap is None else positive("softcap", softcap)
    return positive("temperature", temperature), cap


def discount(gamma: float) -> float:
    if not nonnegative("gamma", gamma) <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma!r}")
    return float(gamma)


def values_checked(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get("REASONRL_CHECK") == "1"


def _real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")


def _on(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")


def _tuple(shape: Sequence[int]) -> str:
    return str(tuple(shape))


def _dtype(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
