"""The affine codec: codes of a few bits, a scale and a zero point for each group of numbers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jkv._axes import Array, Index
from jkv._pytree import pytree, replace, static
from jkv._text import brief
from jkv.ops import quantize
from jkv.ops.codecs import base
from jkv.ops.codecs.base import PRODUCT, Encoded, check_slots, from_bf16_bits, to_bf16_bits
from jkv.ops.write import write, write_last, write_runs

# Bytes of codes that are worth a loop: XLA on the CPU unrolls shorter ones into single numbers, at
# three times the time. Tokens with less are summed several in a row, up to so many.
ROW, MOST = 48, 16
FEW = 16  # queries up to which products of plain codes are cheaper than decoding


@pytree
class PerChannelCodes(Encoded):
    """Codes of a few bits, a scale and a zero point per channel of each block, see `Affine`.

    A scale that all tokens of a block share is multiplied into the query, or into the sum: what
    remains are products of plain codes. Codes lie with the tokens of a channel side by side, so
    that each part of the bytes is unpacked in long loops whatever the number of channels, and no
    last axis is shorter than the 128 numbers to which a TPU pads it.
    """

    codes: Array  # [B, K, P, S] uint8, packed
    scales: Array  # [B, K, S / block_size * H] bits of bfloat16, block after block
    zero_points: Array  # [B, K, S / block_size * H] int16, in units of the scale
    dim: int = static()
    bits: int = static()

    @property
    def block_size(self) -> int:
        """Consecutive tokens that are encoded together."""
        return self.codes.shape[-1] * self.dim // self.scales.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once flattened."""
        *lead, _, slots = self.codes.shape
        return (*lead, slots, self.dim)

    def write_blocks(
        self, new: Float[Array, "B R K H"], at: Int[Array, "B U"], run: int = 1
    ) -> PerChannelCodes:
        """Encode whole blocks, once; see `Encoded`."""
        batch, count, heads, dim = new.shape
        blocks = new.reshape(batch, count // self.block_size, self.block_size, heads, dim)
        codes, scales, zero_points = quantize.affine(blocks, 2, self.bits)
        # [B, U, block_size, K, P] to [B, U, K, P, block_size]
        packed = jnp.moveaxis(quantize.pack(codes, self.bits), 2, -1)
        each = jnp.arange(run, dtype=at.dtype)[None, None]
        at = (at[:, :, None] * run + each).reshape(batch, -1)
        return replace(
            self,
            codes=write_runs(self.codes, packed, at),
            scales=write_runs(self.scales, to_bf16_bits(scales[:, :, 0]), at),
            zero_points=write_runs(self.zero_points, zero_points[:, :, 0], at),
        )

    def map_slots(self, change: Callable[[Array, int], Array]) -> PerChannelCodes:
        """Apply `change` to each leaf, given its axis of slots or blocks."""
        axis = self.codes.ndim - 2
        shape = (*self.scales.shape[:-1], -1, self.dim)
        scales, zero_points = (
            change(x.reshape(shape), axis) for x in (self.scales, self.zero_points)
        )
        return replace(
            self,
            codes=change(self.codes, axis + 1),
            scales=scales.reshape(*scales.shape[:-2], -1),
            zero_points=zero_points.reshape(*zero_points.shape[:-2], -1),
        )

    def flatten_heads(self) -> PerChannelCodes:
        """Make rows and heads one axis."""
        return base.flatten_heads(self)

    def slice_slots(self, start: Index, size: int) -> PerChannelCodes:
        """Slice slots `start` to ``start + size``, both whole blocks; once flattened.

        Scales are sliced as they lie: XLA would make an axis of blocks the last one for the whole
        cache, and back for the next update, because the products of a block want it so.
        """
        cut = functools.partial(lax.dynamic_slice_in_dim, axis=1)
        each = self.dim * (size // self.block_size)
        at = start // self.block_size * self.dim
        return replace(
            self,
            codes=lax.dynamic_slice_in_dim(self.codes, start, size, 2),
            scales=cut(self.scales, at, each),
            zero_points=cut(self.zero_points, at, each),
        )

    def _affine(self) -> tuple[Array, Array]:
        """Return scales and zero points of the channels of each block, [..., U, H]."""
        shape = (*self.scales.shape[:-1], -1, self.dim)
        zero_points = self.zero_points.astype(jnp.float32)
        return from_bf16_bits(self.scales).reshape(shape), zero_points.reshape(shape)

    def decode(self) -> Float[Array, "*lines S H"]:
        """Decode all tokens to float32."""
        packed = jnp.swapaxes(self.codes, -1, -2)
        codes = quantize.unpack(packed, self.dim, self.bits).astype(jnp.float32)
        scales, zero_points = (jnp.repeat(x, self.block_size, axis=-2) for x in self._affine())
        return (codes + zero_points) * scales

    def scores(self, q: Float[Array, "Z R H"], start: Index, size: int) -> Float[Array, "Z R size"]:
        """Multiply queries with keys; see `Encoded`."""
        sliced = self.slice_slots(start, size)
        if q.shape[1] > FEW:
            return jnp.einsum("zrh,zsh->zrs", q, sliced.decode(), **PRODUCT)
        if q.shape[1] > 1:
            return sliced._decoded_products(q)
        scales, zero_points = (x[:, :, None] for x in sliced._affine())
        scaled = q[:, None] * scales  # [Z, U, R, H]
        out = jnp.sum(scaled * zero_points, axis=-1, keepdims=True)
        parts = zip(sliced._blocks(), quantize.split(scaled, self.bits), strict=True)
        for part, factor in parts:
            out += jnp.einsum("zurp,zput->zurt", factor, part, **PRODUCT)
        return jnp.swapaxes(out, 1, 2).reshape(*q.shape[:2], size)

    def _decoded_products(self, q: Array) -> Array:
        """Multiply several queries with keys of which each channel is decoded once, in place."""
        scales, zero_points = (
            quantize.split(jnp.swapaxes(x, 1, 2)[..., None], self.bits, axis=1)  # [Z, P, U, 1]
            for x in self._affine()
        )
        parts = zip(
            self._blocks(), scales, zero_points, quantize.split(q, self.bits, axis=2), strict=True
        )
        out: Any = 0.0
        for codes, scale, zero_point, factor in parts:
            keys = ((codes + zero_point) * scale).reshape(*codes.shape[:2], -1)
            out += jnp.einsum("zrp,zps->zrs", factor, keys, **PRODUCT)
        return out

    def _blocks(self) -> list[Array]:
        """Return the parts of the codes, [Z, P, U, block_size]."""
        shape = (*self.codes.shape[:2], -1, self.block_size)
        return [
            part.reshape(shape).astype(jnp.float32)
            for part in quantize.parts(self.codes, self.bits)
        ]

    def weighted_sum(
        self, w: Float[Array, "Z R size"], start: Index, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Sum values with weights; see `Encoded`."""
        z, r, size = w.shape
        sliced = self.slice_slots(start, size)
        if r > FEW:
            values = jnp.where(used[..., None], sliced.decode(), 0.0)
            return jnp.einsum("zrs,zsh->zrh", w, values, **PRODUCT)
        some = jnp.any(used.reshape(z, -1, self.block_size), axis=-1)[..., None]
        scales, zero_points = sliced._affine()
        scales, zero_points = jnp.where(some, scales, 0.0)[:, :, None], zero_points[:, :, None]
        w = jnp.swapaxes(w.reshape(z, r, -1, self.block_size), 1, 2)  # [Z, U, R, block_size]
        sums = [jnp.einsum("zurt,zput->zurp", w, part, **PRODUCT) for part in sliced._blocks()]
        out = jnp.concatenate(sums, axis=-1)[..., : self.dim]
        whole = jnp.sum(w, axis=-1, keepdims=True)
        return jnp.sum((out + whole * zero_points) * scales, axis=1)


@pytree
class PerTokenCodes(Encoded):
    """Codes of a few bits, a scale and a zero point per group of a token's channels, see `Affine`.

    The scales of a token are multiplied into its score, or into its weight. They lie along the
    slots: groups are few, and a TPU pads a last axis to 128 numbers.
    """

    codes: Array  # [B, K, S, P] uint8, packed
    scales: Array  # [B, K, groups, S] bits of bfloat16
    zero_points: Array  # [B, K, groups, S] int16, in units of the scale
    dim: int = static()
    bits: int = static()
    group: int = static()  # channels
    rows: Array | None = None  # once flattened: the codes again, several tokens per row

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once flattened."""
        return (*self.codes.shape[:-1], self.dim)

    def write_blocks(
        self, new: Float[Array, "B R K H"], at: Int[Array, "B U"], run: int = 1
    ) -> PerTokenCodes:
        """Encode tokens, once; see `Encoded`."""
        groups = self.scales.shape[-2]
        size = groups * self.group
        split = jnp.pad(new, ((0, 0), (0, 0), (0, 0), (0, size - self.dim)))
        split = split.reshape(*new.shape[:3], groups, self.group)
        real = jnp.arange(size, dtype=jnp.int32).reshape(1, 1, 1, groups, self.group) < self.dim
        codes, scales, zero_points = quantize.affine(split, -1, self.bits, real)
        codes = codes.reshape(*new.shape[:3], size)[..., : self.dim]
        return replace(
            self,
            codes=write(self.codes, quantize.pack(codes, self.bits), at, run),
            scales=write_last(self.scales, to_bf16_bits(scales[..., 0]), at, run),
            zero_points=write_last(self.zero_points, zero_points[..., 0], at, run),
        )

    def map_slots(self, change: Callable[[Array, int], Array]) -> PerTokenCodes:
        """Apply `change` to each leaf, given its axis of slots or blocks."""
        axis = self.codes.ndim - 2
        return replace(
            self,
            codes=change(self.codes, axis),
            scales=change(self.scales, axis + 1),
            zero_points=change(self.zero_points, axis + 1),
            rows=None if self.rows is None else change(self.rows, axis),
        )

    def flatten_heads(self) -> PerTokenCodes:
        """Make rows and heads one axis, and lay out the codes as `weighted_sum` reads them."""
        flat = base.flatten_heads(self)
        lines, tokens, width = flat.codes.shape
        row = 1
        while row * width < ROW and row < MOST and tokens % (2 * row) == 0:
            row *= 2
        rows = flat.codes.reshape(lines, tokens // row, row * width)
        return replace(flat, rows=rows)

    def slice_slots(self, start: Index, size: int) -> PerTokenCodes:
        """Slice slots `start` to ``start + size``."""
        return base.slice_slots(self, start, size)

    def decode(self) -> Float[Array, "*lines S H"]:
        """Decode all tokens to float32."""
        codes = quantize.unpack(self.codes, self.dim, self.bits).astype(jnp.float32)
        scales, zero_points = (
            jnp.repeat(jnp.swapaxes(x, -1, -2), self.group, axis=-1)[..., : self.dim]
            for x in (from_bf16_bits(self.scales), self.zero_points.astype(jnp.float32))
        )
        return (codes + zero_points) * scales

    def scores(self, q: Float[Array, "Z R H"], start: Index, size: int) -> Float[Array, "Z R size"]:
        """Multiply queries with keys; see `Encoded`."""
        sliced = self.slice_slots(start, size)
        z, r, h = q.shape
        if r > FEW:
            return jnp.einsum("zrh,zsh->zrs", q, sliced.decode(), **PRODUCT)
        scales, zero_points = (
            jnp.swapaxes(x, 1, 2)[:, None]  # [Z, 1, S, groups]
            for x in (from_bf16_bits(sliced.scales), sliced.zero_points.astype(jnp.float32))
        )
        groups = scales.shape[-1]
        out = sliced._by_group(q) if groups > 1 else sliced._products(q)[..., None]
        padding = ((0, 0), (0, 0), (0, groups * self.group - h))
        sums = jnp.pad(q, padding).reshape(z, r, 1, groups, self.group).sum(axis=-1)
        return jnp.sum((out + sums * zero_points) * scales, axis=-1)

    def _products(self, q: Array) -> Array:
        """Multiply codes with q, [Z, R, S]."""
        total: Any = 0.0
        if self.bits == 8 or q.shape[1] > 1:
            pairs = zip(
                quantize.split(q, self.bits), quantize.parts(self.codes, self.bits), strict=True
            )
            for factor, part in pairs:
                total += jnp.einsum("zrp,zsp->zrs", factor, part.astype(jnp.float32), **PRODUCT)
            return total
        # The parts of a byte are summed while they are unpacked, which leaves half or a quarter as
        # many numbers to write; those then as a product with ones, the sum that XLA is best at.
        for part, factor in self._parts(q):
            total += part * factor
        return jnp.einsum("zrsp,p->zrs", total, jnp.ones(total.shape[-1]), **PRODUCT)

    def _by_group(self, q: Array) -> Array:
        """Multiply the codes of each group with q, [Z, R, S, groups]."""
        total: Any = 0.0
        for i, (part, factor) in enumerate(self._parts(q)):
            member = jnp.asarray(self._member(i), jnp.float32)
            total += jnp.einsum("zrsp,pg->zrsg", part * factor, member, **PRODUCT)
        return total

    def _parts(self, q: Array) -> list[tuple[Array, Array]]:
        """Return parts of the codes, [Z, 1, S, P], and the channels of q that meet them."""
        codes = quantize.parts(self.codes, self.bits)
        return [
            (part[:, None].astype(jnp.float32), factor[:, :, None])
            for part, factor in zip(codes, quantize.split(q, self.bits), strict=True)
        ]

    def _member(self, i: int) -> np.ndarray:
        """Return which channels of part i are in which group, [P, groups]."""
        width = self.codes.shape[-1]
        group = (i * width + np.arange(width)) // self.group
        return group[:, None] == np.arange(self.scales.shape[-2])

    def weighted_sum(
        self, w: Float[Array, "Z R size"], start: Index, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Sum values with weights; see `Encoded`."""
        sliced = self.slice_slots(start, w.shape[2])
        if w.shape[1] > FEW:
            values = jnp.where(used[..., None], sliced.decode(), 0.0)
            return jnp.einsum("zrs,zsh->zrh", w, values, **PRODUCT)
        scales = jnp.where(used[:, None], from_bf16_bits(sliced.scales), 0.0)
        scaled = w[..., None] * jnp.swapaxes(scales, 1, 2)[:, None]  # [Z, R, S, groups]
        zero_points = jnp.swapaxes(sliced.zero_points, 1, 2).astype(jnp.float32)
        low = jnp.sum(scaled * zero_points[:, None], axis=2)
        return sliced._sums(scaled) + jnp.repeat(low, self.group, axis=-1)[..., : self.dim]

    def _sums(self, w: Array) -> Array:
        """Sum codes with weights w [Z, R, S, groups] to [Z, R, H]."""
        if self.rows is None:
            raise ValueError(
                "weighted_sum got an encoded array as it is stored; expected .flatten_heads() of it"
            )
        z, r, _, groups = w.shape
        width = self.codes.shape[-1]
        row = self.rows.shape[-1] // width
        w = w.reshape(z, r, -1, row, groups)
        sums = []
        for i, part in enumerate(quantize.parts(self.rows, self.bits)):
            member = self._member(i)
            first, last = np.flatnonzero(member.any(axis=0))[[0, -1]] if member.any() else (0, 0)
            if row == 1 and first == last:
                some, part = w[..., 0, first], part.astype(jnp.float32)
                sums.append(jnp.einsum("zrs,zsp->zrp", some, part, **PRODUCT))
                continue
            # Each token of a row, and each group of a token, has its own weight: a line of the
            # product for each, of which only its own bytes count.
            own = np.kron(np.eye(row, dtype=bool), member[:, first : last + 1].T)
            some = w[..., first : last + 1].reshape(z, r, -1, len(own))
            out = jnp.einsum("zrsc,zsp->zrcp", some, part.astype(jnp.float32), **PRODUCT)
            out = jnp.sum(jnp.where(own, out, 0.0), axis=2)
            sums.append(jnp.sum(out.reshape(z, r, row, width), axis=2))
        return jnp.concatenate(sums, axis=-1)[..., : self.dim]


@dataclasses.dataclass(frozen=True)
class Affine:
    """Codes of 8, 4 or 2 bits with a scale and a zero point for each group of numbers.

    Attributes:
        bits: of a code.
        axis: "token": a group is `group` channels of one token, all of them where None; "channel":
            it is one channel of `group` consecutive tokens (KIVI, Liu et al. 2024,
            arXiv:2402.02750), which keeps large channels of keys away from small ones.
        group: numbers that share a scale; of tokens a power of two from 2 to 128.

    Raises:
        ValueError: other bits, axes or groups.

    Example:
        >>> codes = jkv.ops.codecs.Affine(bits=4, axis="token").empty(1, 2, 64, 8, "float32")
        >>> codes.shape, codes.decode().shape
        ((1, 2, 64, 8), (1, 2, 64, 8))
    """

    bits: int = 8
    axis: Literal["token", "channel"] = "token"
    group: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that no form has."""
        if isinstance(self.bits, bool) or self.bits not in (8, 4, 2):
            raise ValueError(f"got bits={brief(self.bits)}; expected 8, 4 or 2")
        if self.axis not in ("token", "channel"):
            raise ValueError(f"got axis={brief(self.axis)}; expected 'token' or 'channel'")
        group = self.group
        if group is None and self.axis == "token":
            return
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise ValueError(f"got group={brief(group)}; expected an integer of at least 1")
        if self.axis == "channel" and (group > 128 or group & (group - 1) or group < 2):
            raise ValueError(
                f"got group={group} tokens that share a scale; expected a power of two, 2 to 128"
            )

    @property
    def block_size(self) -> int:
        """Consecutive tokens that are encoded together."""
        return self.group if self.axis == "channel" and self.group else 1

    def empty(
        self, batch: int, heads: int, slots: int, dim: int, dtype: DTypeLike
    ) -> PerTokenCodes | PerChannelCodes:
        """Return zeros for `slots` tokens per row.

        Raises:
            ValueError: slots that are no whole blocks.
        """
        del dtype
        check_slots(slots, self.block_size)
        size = quantize.width(dim, self.bits)
        if self.axis == "channel":
            scales = (batch, heads, slots // self.block_size * dim)
            return PerChannelCodes(
                codes=jnp.zeros((batch, heads, size, slots), jnp.uint8),
                scales=jnp.zeros(scales, jnp.uint16),
                zero_points=jnp.zeros(scales, jnp.int16),
                dim=dim,
                bits=self.bits,
            )
        group = min(self.group or dim, dim)
        groups = (batch, heads, -(-dim // group), slots)
        return PerTokenCodes(
            codes=jnp.zeros((batch, heads, slots, size), jnp.uint8),
            scales=jnp.zeros(groups, jnp.uint16),
            zero_points=jnp.zeros(groups, jnp.int16),
            dim=dim,
            bits=self.bits,
            group=group,
        )
