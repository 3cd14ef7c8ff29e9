"""Rounding to a few bits: steps and zero points of groups, and codes packed into bytes."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array as AnyArray
from jaxtyping import Float, Shaped, UInt8

from jkv._axes import Array

MOST = 32767  # steps from zero that a zero point can be
LEAST = 2.0**-120  # of steps: far from the numbers that processors take for zero


def affine(
    x: Float[Array, "..."], axis: int | tuple[int, ...], bits: int, real: AnyArray | None = None
) -> tuple[Array, Array, Array]:
    """Codes, steps and zero points of groups that extend over `axis`.

    ``x = (code + zero) * step`` to half a step, whatever the group: zero points are whole steps of
    16 bits, so that a group far from zero (keys with a large bias) loses nothing to the distance,
    and zero is exact. A group with NaN or infinity in it has a step of NaN, and is NaN decoded.

    Args:
        x: any shape.
        axis: of the numbers that share a step; kept with size 1 in steps and zero points.
        bits: of a code.
        real: where False, padding, which widens no range.

    Returns:
        codes uint8 like `x`, steps bfloat16, zero points int16.
    """
    levels = 2**bits - 1
    x = x.astype(jnp.float32)
    low, high, finite = x, x, jnp.isfinite(x)
    if real is not None:
        low, high = jnp.where(real, x, jnp.inf), jnp.where(real, x, -jnp.inf)
        finite |= ~real
    low = jnp.min(low, axis=axis, keepdims=True)
    high = jnp.max(high, axis=axis, keepdims=True)
    # The least and the largest do not tell: XLA's on the CPU pass over NaN.
    finite = jnp.all(finite, axis=axis, keepdims=True)
    # Each divided by itself: the range of two large numbers may be infinite.
    wide = high / levels - low / levels
    far = jnp.maximum(jnp.abs(low), jnp.abs(high)) / MOST
    step = round_up(jnp.maximum(jnp.maximum(wide, far), LEAST))
    # XLA divides by the same number many times with its reciprocal, and that of the largest steps
    # is a subnormal number, which many processors take for zero: both are made smaller before.
    by = step.astype(jnp.float32)
    less = jnp.where(by > 1, 2.0**-8, 1.0)
    by = by * less
    zero = jnp.round(low * less / by)
    # The same sum that decoding makes: within half a step at both ends of the range.
    codes = jnp.clip(jnp.round(x * less / by - zero), 0, levels)
    # What is no number has no integer either; its step says so.
    codes = jnp.where(finite, codes, 0).astype(jnp.uint8)
    zero = jnp.where(finite, zero, 0).astype(jnp.int16)
    return codes, jnp.where(finite, step, jnp.nan), zero


def round_up(x: Float[Array, "..."]) -> Array:
    """Positive numbers as the next bfloat16 that is no smaller.

    A step rounded down would not reach its range's end.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    above = (bits + jnp.uint32(0xFFFF)) & jnp.uint32(0xFFFF0000)
    above = lax.bitcast_convert_type(above, jnp.float32)
    return jnp.where(jnp.isfinite(x), above, x).astype(jnp.bfloat16)


def width(size: int, bits: int) -> int:
    """Bytes that `size` codes take."""
    return -(-size * bits // 8)


def split(x: Shaped[Array, "..."], bits: int, axis: int = -1) -> list[Shaped[Array, "..."]]:
    """Channels as packed codes lie: the first part, the second, and so on, filled up with zeros."""
    per, size = 8 // bits, width(x.shape[axis], bits)
    room = [(0, 0)] * x.ndim
    room[axis] = (0, per * size - x.shape[axis])
    return jnp.split(jnp.pad(x, room), per, axis=axis)


def pack(codes: UInt8[Array, "... H"], bits: int) -> UInt8[Array, "... P"]:
    """Codes into bytes: the lowest bits of all bytes are the first part of the channels."""
    packed, *rest = split(codes, bits)
    for i, part in enumerate(rest, 1):
        packed = packed | (part << jnp.uint8(i * bits))
    return packed


def parts(packed: UInt8[Array, "... P"], bits: int) -> list[UInt8[Array, "... P"]]:
    """The parts that `pack` packed: a shift and a mask of all bytes each, and no shuffle."""
    found = []
    for i in range(8 // bits):
        part = packed >> jnp.uint8(i * bits) if i else packed
        last = (i + 1) * bits == 8
        found.append(part if last else part & jnp.uint8(2**bits - 1))
    return found


def unpack(packed: UInt8[Array, "... P"], size: int, bits: int) -> UInt8[Array, "... H"]:
    """The codes of `pack`, `size` of them."""
    return jnp.concatenate(parts(packed, bits), axis=-1)[..., :size]
