"""Codes in registers to bfloat16, a few instructions for two numbers at a time.

Each thread loads four bytes of a token at once, which lie two by two where the matrix instruction
wants pairs: nothing moves between threads, at the price of another order of the channels,
`permuted`, which queries are brought into beforehand and results out of, `restored`.

What comes out is exact, but not what the code means: what all numbers lack, or have too much, is
made up for once per token or per query.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu

from jkv._axes import Array

# Experimental, and without types that a checker could follow.
plgpu: Any = mosaic_gpu

TILE: Any = plgpu.Layout.WGMMA
SOURCE: Any = plgpu.Layout.WGMMA_8BIT

# How two of four bytes, selected by the last operand of the first instruction, become bfloat16.
_CODES = {
    # Above 2^7 numbers of bfloat16 count by ones: 7 bits as they are, less what the 8th is worth.
    8: (
        ("0x4140", "0x4342"),
        "prmt.b32 s0, w, 0x43, {}; and.b32 s1, s0, 0xff7fff7f; and.b32 s2, s0, 0xff80ff80; "
        "sub.bf16x2 $0, s1, s2;",
    ),
    4: (("0x4140", "0x4342"), "prmt.b32 $0, w, 0x43, {};"),
    # Sign, and next to it exponent and fraction four places further down.
    "float": (
        ("0x1404", "0x3424"),
        "prmt.b32 s0, w, 0, {}; shr.u32 s1, s0, 4; and.b32 s1, s1, 0x07f007f0; "
        "lop3.b32 $0, s0, 0x80008000, s1, 0xea;",
    ),
}
# What a code c comes out as: (c + offset) * factor.
OFFSET = {8: -128.0, 4: 128.0, "float": 0.0}
FACTOR = {8: 1.0, 4: 1.0, "float": 2.0**-120}


def permuted(x: Array) -> Array:
    """Channels, the last axis, in the order in which their codes are multiplied."""
    split = x.reshape(*x.shape[:-1], -1, 4, 2, 2)
    return jnp.swapaxes(split, -3, -2).reshape(x.shape)


def restored(x: Array) -> Array:
    """The other way round."""
    split = x.reshape(*x.shape[:-1], -1, 2, 4, 2)
    return jnp.swapaxes(split, -3, -2).reshape(x.shape)


def numbers(codes: Any, kind: Any, interpreted: bool) -> list[Array]:
    """Bytes [tokens, W] in shared memory as bfloat16 [tokens, W], for each code in a byte."""
    if interpreted:
        return [_meaning(permuted(part), kind) for part in _parts(codes[...], kind)]
    shape = codes.shape
    result = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=TILE)
    found = plgpu.load(codes, layout=SOURCE, optimized=False)
    count = 2 if kind == 4 else 1

    @plgpu.inline_mgpu(arg_types=(SOURCE,), return_type=tuple([result] * count))
    def convert(context: Any, x: Any) -> Any:
        del context
        return tuple(_converted(x, kind, part) for part in range(count))

    return list(convert(found))


def _converted(x: Any, kind: Any, part: int) -> Any:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    word = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    select, steps = _CODES[kind]
    first = {
        (8, 0): "xor.b32 w, $1, 0x80808080;",
        (4, 0): "and.b32 w, $1, 0x0f0f0f0f;",
        (4, 1): "shr.u32 w, $1, 4; and.b32 w, w, 0x0f0f0f0f;",
        ("float", 0): "mov.b32 w, $1;",
    }[kind, part]
    # [64 tokens, 16 bytes, half of the tokens]: of each word two pairs, side by side.
    old = x.registers.reshape(x.shape[0] // 64, x.shape[1] // 16, 2)
    new = np.empty((*old.shape[:2], 2, 2), dtype=object)
    for (i, j, half), register in np.ndenumerate(old):
        bits = mgpu.utils.bitcast(register, word)
        for u, selector in enumerate(select):
            asm = f"{{ .reg .b32 w, s0, s1, s2; {first} {steps.format(selector)} }}"
            out = llvm.inline_asm(word, [bits], asm, "=r,r")
            new[i, j, u, half] = mgpu.utils.bitcast(out, pair)
    layout = TILE.to_mgpu()
    return mgpu.FragmentedArray(
        _registers=new.reshape(layout.registers_shape(x.shape)), _layout=layout, _is_signed=None
    )


def _parts(codes: Array, kind: Any) -> list[Array]:
    return [codes & jnp.uint8(15), codes >> jnp.uint8(4)] if kind == 4 else [codes]


def _meaning(codes: Array, kind: Any) -> Array:
    """The same as `_converted` in other words."""
    if kind != "float":
        return (codes.astype(jnp.float32) + OFFSET[kind]).astype(jnp.bfloat16)
    wide = codes.astype(jnp.uint16)
    bits = (wide & jnp.uint16(128)) << jnp.uint16(8) | (wide & jnp.uint16(127)) << jnp.uint16(4)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)
