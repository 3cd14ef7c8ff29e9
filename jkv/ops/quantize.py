"""Rounding to a few bits: steps and zero points of groups, and codes packed into bytes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array as AnyArray
from jaxtyping import Float, UInt8

from jkv._axes import Array

MOST = 32767  # of a zero point


def affine(
    x: Float[Array, "..."], axis: int | tuple[int, ...], bits: int, real: AnyArray | None = None
) -> tuple[Array, Array, Array]:
    """Codes, steps and zero points of groups that extend over `axis`; the group is rounded once.

    ``x = (code + zero) * step`` to half a step, whatever the group: zero points are whole steps of
    16 bits, so that a group far from zero (keys with a large bias) loses nothing to the distance.
    A group with NaN or infinity in it has a step of NaN, and is NaN when decoded.

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
    real = jnp.ones((), bool) if real is None else real
    low = jnp.min(jnp.where(real, x, jnp.inf), axis=axis, keepdims=True)
    high = jnp.max(jnp.where(real, x, -jnp.inf), axis=axis, keepdims=True)
    wide = jnp.maximum(high - low, 0) / levels
    far = jnp.maximum(jnp.abs(low), jnp.abs(high)) / MOST
    step = up(jnp.maximum(wide, far))
    by = step.astype(jnp.float32)
    by = jnp.where(by > 0, by, 1.0)
    finite = jnp.isfinite(low) & jnp.isfinite(high) & jnp.isfinite(by)
    low = jnp.where(finite, low, 0.0)
    zero = jnp.clip(jnp.round(low / by), -MOST - 1, MOST)
    # The same sum that decoding makes: within half a step at both ends of the range.
    codes = jnp.clip(jnp.round(x / by - zero), 0, levels)
    codes = jnp.where(real & finite, codes, 0).astype(jnp.uint8)
    return codes, jnp.where(finite, step, jnp.nan), zero.astype(jnp.int16)


def up(x: Float[Array, "..."]) -> Array:
    """The next bfloat16 that is no smaller: a step rounded down would not reach its range's end."""
    near = x.astype(jnp.bfloat16)
    up = near.astype(jnp.float32) * (1 + 2.0**-7)
    return jnp.where(near.astype(jnp.float32) < x, up.astype(jnp.bfloat16), near)


def lanes(size: int, bits: int) -> tuple[int, int]:
    """How many codes a byte holds, and how many bytes `size` codes take."""
    per = 8 // bits
    return per, -(-size // per)


def pack(codes: UInt8[Array, "... H"], bits: int) -> UInt8[Array, "... P"]:
    """Codes into bytes: the lowest bits are the first part of the channels, and so on.

    Unpacking one part is then a shift and a mask of all bytes, and needs no shuffle.
    """
    per, width = lanes(codes.shape[-1], bits)
    if per == 1:
        return codes
    room = [(0, 0)] * (codes.ndim - 1) + [(0, per * width - codes.shape[-1])]
    parts = jnp.split(jnp.pad(codes, room), per, axis=-1)
    packed = parts[0]
    for i, part in enumerate(parts[1:], 1):
        packed = packed | (part << jnp.uint8(i * bits))
    return packed


def unpack(packed: UInt8[Array, "... P"], bits: int, size: int) -> UInt8[Array, "... H"]:
    """The codes of `pack`, `size` of them."""
    per = 8 // bits
    if per == 1:
        return packed
    mask = jnp.uint8(2**bits - 1)
    parts = [(packed >> jnp.uint8(i * bits)) & mask for i in range(per)]
    return jnp.concatenate(parts, axis=-1)[..., :size]
