"""The kernels of a GPU's layers and decoding as they are shipped, for `builds`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FP32 = "*fp32"
INTS = "width rows size half heads all_heads out_heads key_heads turned tokens blocks vocab"


def shipped(dtype: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict]]:
    """(name, kernel, argument types, compile-time values, options), with every flag on."""
    from reasonrl.kernels import draw, layers, packed, slots, turn

    own = f"*{dtype}"
    types = dict.fromkeys(INTS.split(), "i32") | {"eps": "fp32", "scaling": "fp32"}
    types |= {"heat": "fp32", "cold": "fp32", "role_ptr": "*i8", "length_ptr": "*i64"}
    types |= {"uniform_ptr": "*fp64", "token_ptr": "*i64"}
    residual = "x sum weight scale beside out part cos sin lse above most logp q_norm k_norm"
    types |= {f"{name}_ptr": FP32 for name in residual.split()}
    halves = "delta y grad narrow again both qkv keys values more q k v q_more k_more v_more u"
    types |= {f"{name}_ptr": own for name in halves.split()}
    inner = types | {"out_ptr": own}
    four, eight = {"num_warps": layers.WARPS}, {"num_warps": 8}
    row = {"BLOCK": 1024}
    yield "layers.norm", layers.norm_kernel, types, {"ADDED": True, "KEPT": True, **row}, four
    many = {"num_warps": 4 * layers.WARPS}
    for width, how in ((1024, four), (4096, many)):
        flags = {"LEARNT": True, "BLOCK": width}
        yield f"layers.norm_grad.{width}", layers.norm_grad_kernel, types, flags, how
    yield "layers.gate", layers.gate_kernel, inner, row, four
    yield "layers.gate_grad", layers.gate_grad_kernel, inner, row, four
    for half in (32, 64, 128) if dtype != "fp32" else ():  # a cache is of a half type
        how = slots.shape_of(half)
        shape = {"GROUP": 7, "QUERIES": 16, "HALF": half, "BLOCK": how.pop("BLOCK")}
        for parts, kind in ((1, inner), (4, types)):
            flags = {"NORMED": True, "PARTS": parts, **shape}
            yield f"slots.attend.{2 * half}.{parts}", slots.slot_kernel, kind, flags, how
    flags = {"PARTS": 4, "SIZE": 128}
    yield "slots.join", slots.join_kernel, inner | {"part_ptr": FP32}, flags, {"num_warps": 1}
    flags = {"WARM": True, "BLOCK": draw.BLOCK}
    yield "draw.block", draw.block_kernel, types, flags, eight
    yield "draw.pick", draw.pick_kernel, types, {**flags, "MANY": 64}, eight
    shape = {"HEADS": 16, "HALF": 32}
    yield "turn.turn", turn.turn_kernel, inner, {"NORMED": True, **shape}, four
    flags = {"LEARNT": True, "HEADS": 16, "SIZE": 128}
    given = types | {"grad_ptr": own}
    yield "turn.head_norm_grad", turn.head_norm_grad_kernel, given, flags, eight
    yield "packed.merge", packed.merge_kernel, inner, {"HEADS": 16, "SIZE": 64}, four
    yield "packed.back", packed.back_kernel, inner, shape, four
