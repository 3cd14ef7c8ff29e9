"""Rounding to a few bits: scales and zero points of groups, and codes packed into bytes."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array as AnyArray
from jaxtyping import Float, Shaped, UInt8

from jkv._axes import Array

MOST = 32767  # the largest zero point
LEAST = 2.0**-120  # the smallest scale: far from numbers that processors flush to zero


def affine(
    x: Float[Array, "..."], axis: int | tuple[int, ...], bits: int, real: AnyArray | None = None
) -> tuple[Array, Array, Array]:
    """Round groups that extend over `axis` to codes, scales and zero points.

    ``x = (code + zero_point) * scale`` to half a scale, for any group: zero points are integers of
    16 bits, so that a group far from zero (keys with a large bias) loses nothing to the distance,
    and zero is exact. A group with NaN or infinity in it has a scale of NaN, and is NaN decoded.

    Args:
        x: any shape.
        axis: of the numbers that share a scale; kept with size 1 in scales and zero points.
        bits: of a code.
        real: where False, padding, which widens no range.

    Returns:
        codes uint8 like `x`, scales bfloat16, zero points int16.
    """
    levels = 2**bits - 1
    x = x.astype(jnp.float32)
    low, high, finite = x, x, jnp.isfinite(x)
    if real is not None:
        low, high = jnp.where(real, x, jnp.inf), jnp.where(real, x, -jnp.inf)
        finite |= ~real
    low = jnp.min(low, axis=axis, keepdims=True)
    high = jnp.max(high, axis=axis, keepdims=True)
    # Minimum and maximum do not show it: XLA's on the CPU ignore NaN.
    finite = jnp.all(finite, axis=axis, keepdims=True)
    # Divided one by one: the difference of two large numbers may be infinite.
    spread = high / levels - low / levels
    far = jnp.maximum(jnp.abs(low), jnp.abs(high)) / MOST
    scale = round_up(jnp.maximum(jnp.maximum(spread, far), LEAST))
    # XLA divides many numbers by one with its reciprocal, and that of the largest scales is a
    # subnormal number, which many processors flush to zero: both are made smaller before.
    divisor = scale.astype(jnp.float32)
    less = jnp.where(divisor > 1, 2.0**-8, 1.0)
    divisor = divisor * less
    zero_point = jnp.round(low * less / divisor)
    # The same sum as in decoding: within half a scale at both ends of the range.
    codes = jnp.clip(jnp.round(x * less / divisor - zero_point), 0, levels)
    # NaN and infinity have no code; the scale of their group is NaN.
    codes = jnp.where(finite, codes, 0).astype(jnp.uint8)
    zero_point = jnp.where(finite, zero_point, 0).astype(jnp.int16)
    return codes, jnp.where(finite, scale, jnp.nan), zero_point


def round_up(x: Float[Array, "..."]) -> Array:
    """Round positive numbers up to bfloat16.

    A scale rounded down would not reach the end of its range.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    above = (bits + jnp.uint32(0xFFFF)) & jnp.uint32(0xFFFF0000)
    above = lax.bitcast_convert_type(above, jnp.float32)
    return jnp.where(jnp.isfinite(x), above, x).astype(jnp.bfloat16)


def width(size: int, bits: int) -> int:
    """Return the bytes that `size` codes take."""
    return -(-size * bits // 8)


def split(x: Shaped[Array, "..."], bits: int, axis: int = -1) -> list[Shaped[Array, "..."]]:
    """Split channels as packed codes are: the first part, the second, and so on, zero padded."""
    per, size = 8 // bits, width(x.shape[axis], bits)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, per * size - x.shape[axis])
    return jnp.split(jnp.pad(x, padding), per, axis=axis)


def pack(codes: UInt8[Array, "... H"], bits: int) -> UInt8[Array, "... P"]:
    """Pack codes into bytes: the lowest bits of all bytes are the first part of the channels."""
    packed, *rest = split(codes, bits)
    for i, part in enumerate(rest, 1):
        packed = packed | (part << jnp.uint8(i * bits))
    return packed


def parts(packed: UInt8[Array, "... P"], bits: int) -> list[UInt8[Array, "... P"]]:
    """Return the parts that `pack` packed: a shift and a mask of all bytes each, no shuffle."""
    unpacked = []
    for i in range(8 // bits):
        part = packed >> jnp.uint8(i * bits) if i else packed
        last = (i + 1) * bits == 8
        unpacked.append(part if last else part & jnp.uint8(2**bits - 1))
    return unpacked


def unpack(packed: UInt8[Array, "... P"], size: int, bits: int) -> UInt8[Array, "... H"]:
    """Unpack `size` codes."""
    return jnp.concatenate(parts(packed, bits), axis=-1)[..., :size]
