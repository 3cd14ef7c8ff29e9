"""Conversion of codes to bfloat16 in registers, a few instructions for two numbers at a time.

Each thread loads four bytes of a token at once, two pairs in the places where the matrix
instruction reads pairs: nothing moves between threads, but the channels are in another order.
Queries are brought into it by `permute_channels`, results out of it by `restore_channels`.

The results are exact up to an offset or a factor that is the same for all numbers, which is
corrected once per token or per query.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu

from jkv._axes import Array, Ref

# Experimental, and without types that a checker could follow.
plgpu: Any = mosaic_gpu

TILE: Any = plgpu.Layout.WGMMA
SOURCE: Any = plgpu.Layout.WGMMA_8BIT

Kind: TypeAlias = int | str  # of codes: 8 or 4 bits, 4 "centred", or "float"

# How two of four bytes, selected by the last operand of the first instruction, become bfloat16.
_CODES = {
    # Above 2^7 numbers of bfloat16 count by ones: 7 bits as they are, less what the 8th is worth.
    8: (
        ("0x4140", "0x4342"),
        "prmt.b32 s0, w, 0x43, {}; and.b32 s1, s0, 0xff7fff7f; and.b32 s2, s0, 0xff80ff80; "
        "sub.bf16x2 $0, s1, s2;",
    ),
    4: (("0x4140", "0x4342"), "prmt.b32 $0, w, 0x43, {};"),
    "centred": (
        ("0x4140", "0x4342"),
        "prmt.b32 s0, w, 0x43, {}; mov.b32 s1, 0x43084308; sub.bf16x2 $0, s0, s1;",
    ),
    # Sign, and next to it exponent and fraction four places further down.
    "float": (
        ("0x1404", "0x3424"),
        "prmt.b32 s0, w, 0, {}; shr.u32 s1, s0, 4; and.b32 s1, s1, 0x07f007f0; "
        "lop3.b32 $0, s0, 0x80008000, s1, 0xea;",
    ),
}
# What is added to an integer code; float codes come out times 2^-120.
OFFSET = {8: -128.0, 4: 128.0, "centred": -8.0, "float": 0.0}


def permute_channels(x: Array) -> Array:
    """Permute channels, the last axis, to the order in which their codes are multiplied."""
    split = x.reshape(*x.shape[:-1], -1, 4, 2, 2)
    return jnp.swapaxes(split, -3, -2).reshape(x.shape)


def restore_channels(x: Array) -> Array:
    """Undo `permute_channels`."""
    split = x.reshape(*x.shape[:-1], -1, 2, 4, 2)
    return jnp.swapaxes(split, -3, -2).reshape(x.shape)


def to_bf16(codes: Ref, kind: Kind, interpret: bool, in_order: bool = False) -> list[Array]:
    """Convert bytes [R, W] in shared memory to bfloat16 [R, W], one for each code in a byte.

    Args:
        codes: a reference to 64 rows or a multiple.
        kind: 8 or 4 bits, 4 "centred", or "float".
        interpret: whether the kernel is interpreted, on a CPU.
        in_order: keep the order of the columns, in a layout that the matrix instruction does not
            take.
    """
    if interpret:
        parts = _parts(codes[...], kind)
        return [_reference(part if in_order else permute_channels(part), kind) for part in parts]
    target = SOURCE if in_order else TILE
    result = plgpu.ShapeDtypeStruct(codes.shape, jnp.bfloat16, layout=target)
    found = plgpu.load(codes, layout=SOURCE, optimized=False)
    count = 2 if kind in (4, "centred") else 1

    @plgpu.inline_mgpu(arg_types=(SOURCE,), return_type=tuple([result] * count))
    def convert(context: object, x: Ref) -> tuple[Ref, ...]:
        del context
        return tuple(_convert_registers(x, kind, part, target.to_mgpu()) for part in range(count))

    return list(convert(found))


def _convert_registers(x: Ref, kind: Kind, part: int, layout: Ref) -> Ref:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    word = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    select, steps = _CODES[kind]
    four = kind in (4, "centred")
    first = "mov.b32 w, $1;" if kind == "float" else "xor.b32 w, $1, 0x80808080;"
    if four:
        first = ("shr.u32 w, $1, 4; and.b32 w, w, " if part else "and.b32 w, $1, ") + "0x0f0f0f0f;"
    # [64 rows, 16 bytes, half of the rows]: of each word two pairs.
    old = x.registers.reshape(x.shape[0] // 64, x.shape[1] // 16, 2)
    together = layout == x.layout
    new = np.empty((*old.shape, 1) if together else (*old.shape[:2], 2, 2), dtype=object)
    for (i, j, half), register in np.ndenumerate(old):
        bits = mgpu.utils.bitcast(register, word)
        pairs = []
        for selector in select:
            asm = f"{{ .reg .b32 w, s0, s1, s2; {first} {steps.format(selector)} }}"
            made: Any = llvm.inline_asm(word, [bits], asm, "=r,r")
            pairs.append(mgpu.utils.bitcast(made, pair))
        if together:
            new[i, j, half, 0] = mgpu.utils.vector_concat(pairs)
        else:
            new[i, j, :, half] = pairs
    return mgpu.FragmentedArray(
        _registers=new.reshape(layout.registers_shape(x.shape)), _layout=layout, _is_signed=None
    )


def _parts(codes: Array, kind: Kind) -> list[Array]:
    return [codes & jnp.uint8(15), codes >> jnp.uint8(4)] if kind in (4, "centred") else [codes]


def _reference(codes: Array, kind: Kind) -> Array:
    """Compute what `_convert_registers` does, in JAX."""
    if kind != "float":
        return (codes.astype(jnp.float32) + OFFSET[kind]).astype(jnp.bfloat16)
    wide = codes.astype(jnp.uint16)
    bits = (wide & jnp.uint16(128)) << jnp.uint16(8) | (wide & jnp.uint16(127)) << jnp.uint16(4)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)
