"""Codes of a few bits, with a step and a zero point for each group of numbers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from jkv._axes import Array
from jkv._pytree import pytree, replace, static
from jkv._text import brief
from jkv.ops import quantize
from jkv.ops.encoded.base import PRODUCT, Stored, check_slots, halves, wide
from jkv.ops.write import write, write_last, write_runs

# Bytes of codes that are worth a loop: XLA on the CPU unrolls shorter ones into single numbers, at
# three times the time. Tokens with less are summed several in a row, up to so many.
ROW, MOST = 48, 16
FEW = 16  # queries up to which products of plain codes are cheaper than decoding


@pytree
class ByChannel(Stored):
    """Codes of a few bits, a step and a zero point per channel of each unit, see `Affine`.

    A step that all tokens of a unit share belongs to the query, or to the sum: what is left are
    products of plain codes. They lie with the tokens of a channel side by side, so that each part
    of the bytes is unpacked in long loops whatever the number of channels, and so that no last
    axis is shorter than the 128 numbers that a TPU fills it up to.
    """

    codes: Array  # [B, K, P, S] uint8, packed
    steps: Array  # [B, K, S / unit * H] bits of bfloat16, all channels of a unit after another
    zeros: Array  # [B, K, S / unit * H] int16, in steps
    dim: int = static()
    bits: int = static()

    @property
    def unit(self) -> int:
        """Consecutive tokens that are encoded together."""
        return self.codes.shape[-1] * self.dim // self.steps.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once merged."""
        *lead, _, slots = self.codes.shape
        return (*lead, slots, self.dim)

    def put(self, new: Float[Array, "B R K H"], at: Int[Array, "B U"], run: int = 1) -> ByChannel:
        """Encode whole units, once."""
        batch, count, heads, dim = new.shape
        units = new.reshape(batch, count // self.unit, self.unit, heads, dim)
        codes, steps, zeros = quantize.affine(units, 2, self.bits)
        # [B, U, unit, K, P] to [B, U, K, P, unit]
        packed = jnp.moveaxis(quantize.pack(codes, self.bits), 2, -1)
        each = jnp.arange(run, dtype=at.dtype)[None, None]
        at = (at[:, :, None] * run + each).reshape(batch, -1)
        return replace(
            self,
            codes=write_runs(self.codes, packed, at),
            steps=write_runs(self.steps, halves(steps[:, :, 0]), at),
            zeros=write_runs(self.zeros, zeros[:, :, 0], at),
        )

    def over_slots(self, change: Callable[[Array, int], Array]) -> ByChannel:
        """The same with each leaf changed, given its axis of slots."""
        axis = self.codes.ndim - 2
        units = (*self.steps.shape[:-1], -1, self.dim)
        steps, zeros = (change(x.reshape(units), axis) for x in (self.steps, self.zeros))
        return replace(
            self,
            codes=change(self.codes, axis + 1),
            steps=steps.reshape(*steps.shape[:-2], -1),
            zeros=zeros.reshape(*zeros.shape[:-2], -1),
        )

    def block(self, start: Any, size: int) -> ByChannel:
        """Slots `start` to ``start + size`` of a merged form, both whole units.

        The steps as they lie: of an axis of units XLA would make the last one for all of the cache,
        and back for the next update, because a block's products want it so.
        """
        cut = functools.partial(lax.dynamic_slice_in_dim, axis=1)
        each = self.dim * (size // self.unit)
        at = start // self.unit * self.dim
        return replace(
            self,
            codes=lax.dynamic_slice_in_dim(self.codes, start, size, 2),
            steps=cut(self.steps, at, each),
            zeros=cut(self.zeros, at, each),
        )

    def _affine(self) -> tuple[Array, Array]:
        """Steps and zero points of the channels of each unit, [..., U, H]."""
        units = (*self.steps.shape[:-1], -1, self.dim)
        return wide(self.steps).reshape(units), self.zeros.astype(jnp.float32).reshape(units)

    def decode(self) -> Float[Array, "*lines S H"]:
        """All of it in float32."""
        packed = jnp.swapaxes(self.codes, -1, -2)
        codes = quantize.unpack(packed, self.dim, self.bits).astype(jnp.float32)
        steps, zeros = (jnp.repeat(x, self.unit, axis=-2) for x in self._affine())
        return (codes + zeros) * steps

    def scores(self, q: Float[Array, "Z R H"], start: Any, size: int) -> Float[Array, "Z R size"]:
        """Products with keys; see `Encoded`."""
        block = self.block(start, size)
        if q.shape[1] > FEW:
            return jnp.einsum("zrh,zsh->zrs", q, block.decode(), **PRODUCT)
        if q.shape[1] > 1:
            return block._decoded_products(q)
        steps, zeros = (x[:, :, None] for x in block._affine())
        scaled = q[:, None] * steps  # [Z, U, R, H]
        out = jnp.sum(scaled * zeros, axis=-1, keepdims=True)
        parts = zip(block._units(), quantize.split(scaled, self.bits), strict=True)
        for part, factor in parts:
            out += jnp.einsum("zurp,zput->zurt", factor, part, **PRODUCT)
        return jnp.swapaxes(out, 1, 2).reshape(*q.shape[:2], size)

    def _decoded_products(self, q: Array) -> Array:
        """Products of several queries, for which each channel is decoded once, where it lies."""
        steps, zeros = (
            quantize.split(jnp.swapaxes(x, 1, 2)[..., None], self.bits, axis=1)  # [Z, P, U, 1]
            for x in self._affine()
        )
        parts = zip(self._units(), steps, zeros, quantize.split(q, self.bits, axis=2), strict=True)
        out: Any = 0.0
        for codes, step, zero, factor in parts:
            keys = ((codes + zero) * step).reshape(*codes.shape[:2], -1)
            out += jnp.einsum("zrp,zps->zrs", factor, keys, **PRODUCT)
        return out

    def _units(self) -> list[Array]:
        """The parts of the codes, [Z, P, U, unit]."""
        units = (*self.codes.shape[:2], -1, self.unit)
        return [
            part.reshape(units).astype(jnp.float32)
            for part in quantize.parts(self.codes, self.bits)
        ]

    def weighted(
        self, w: Float[Array, "Z R size"], start: Any, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Weighted sum of values; see `Encoded`."""
        z, r, size = w.shape
        block = self.block(start, size)
        if r > FEW:
            values = jnp.where(used[..., None], block.decode(), 0.0)
            return jnp.einsum("zrs,zsh->zrh", w, values, **PRODUCT)
        some = jnp.any(used.reshape(z, -1, self.unit), axis=-1)[..., None]
        steps, zeros = block._affine()
        steps, zeros = jnp.where(some, steps, 0.0)[:, :, None], zeros[:, :, None]
        w = jnp.swapaxes(w.reshape(z, r, -1, self.unit), 1, 2)  # [Z, U, R, unit]
        sums = [jnp.einsum("zurt,zput->zurp", w, part, **PRODUCT) for part in block._units()]
        out = jnp.concatenate(sums, axis=-1)[..., : self.dim]
        whole = jnp.sum(w, axis=-1, keepdims=True)
        return jnp.sum((out + whole * zeros) * steps, axis=1)


@pytree
class ByToken(Stored):
    """Codes of a few bits, a step and a zero point per group of a token's channels, see `Affine`.

    The steps of a token belong to its score, or to its weight. They lie along the slots: groups are
    few, and a TPU fills a last axis up to 128 numbers.
    """

    codes: Array  # [B, K, S, P] uint8, packed
    steps: Array  # [B, K, groups, S] bits of bfloat16
    zeros: Array  # [B, K, groups, S] int16, in steps
    dim: int = static()
    bits: int = static()
    group: int = static()  # channels
    rows: Array | None = None  # once merged, the codes again with some tokens beside each other

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once merged."""
        return (*self.codes.shape[:-1], self.dim)

    def put(self, new: Float[Array, "B R K H"], at: Int[Array, "B U"], run: int = 1) -> ByToken:
        """Encode tokens, once."""
        groups = self.steps.shape[-2]
        size = groups * self.group
        split = jnp.pad(new, ((0, 0), (0, 0), (0, 0), (0, size - self.dim)))
        split = split.reshape(*new.shape[:3], groups, self.group)
        real = jnp.arange(size, dtype=jnp.int32).reshape(1, 1, 1, groups, self.group) < self.dim
        codes, steps, zeros = quantize.affine(split, -1, self.bits, real)
        codes = codes.reshape(*new.shape[:3], size)[..., : self.dim]
        return replace(
            self,
            codes=write(self.codes, quantize.pack(codes, self.bits), at, run),
            steps=write_last(self.steps, halves(steps[..., 0]), at, run),
            zeros=write_last(self.zeros, zeros[..., 0], at, run),
        )

    def over_slots(self, change: Callable[[Array, int], Array]) -> ByToken:
        """The same with each leaf changed, given its axis of slots."""
        axis = self.codes.ndim - 2
        return replace(
            self,
            codes=change(self.codes, axis),
            steps=change(self.steps, axis + 1),
            zeros=change(self.zeros, axis + 1),
            rows=None if self.rows is None else change(self.rows, axis),
        )

    def merged(self) -> ByToken:
        """Rows and heads as one axis, and the codes as they are summed."""
        flat = super().merged()
        lines, tokens, width = flat.codes.shape
        row = 1
        while row * width < ROW and row < MOST and tokens % (2 * row) == 0:
            row *= 2
        rows = flat.codes.reshape(lines, tokens // row, row * width)
        return replace(flat, rows=rows)

    def decode(self) -> Float[Array, "*lines S H"]:
        """All of it in float32."""
        codes = quantize.unpack(self.codes, self.dim, self.bits).astype(jnp.float32)
        steps, zeros = (
            jnp.repeat(jnp.swapaxes(x, -1, -2), self.group, axis=-1)[..., : self.dim]
            for x in (wide(self.steps), self.zeros.astype(jnp.float32))
        )
        return (codes + zeros) * steps

    def scores(self, q: Float[Array, "Z R H"], start: Any, size: int) -> Float[Array, "Z R size"]:
        """Products with keys; see `Encoded`."""
        block = self.block(start, size)
        z, r, h = q.shape
        if r > FEW:
            return jnp.einsum("zrh,zsh->zrs", q, block.decode(), **PRODUCT)
        steps, zeros = (
            jnp.swapaxes(x, 1, 2)[:, None]  # [Z, 1, S, groups]
            for x in (wide(block.steps), block.zeros.astype(jnp.float32))
        )
        groups = steps.shape[-1]
        out = block._by_group(q) if groups > 1 else block._products(q)[..., None]
        room = ((0, 0), (0, 0), (0, groups * self.group - h))
        whole = jnp.pad(q, room).reshape(z, r, 1, groups, self.group).sum(axis=-1)
        return jnp.sum((out + whole * zeros) * steps, axis=-1)

    def _products(self, q: Array) -> Array:
        """Products of codes with q, [Z, R, S]."""
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
        """Products of the codes of each group with q, [Z, R, S, groups]."""
        total: Any = 0.0
        for i, (part, factor) in enumerate(self._parts(q)):
            member = jnp.asarray(self._member(i), jnp.float32)
            total += jnp.einsum("zrsp,pg->zrsg", part * factor, member, **PRODUCT)
        return total

    def _parts(self, q: Array) -> list[tuple[Array, Array]]:
        """The parts of the codes, [Z, 1, S, P], and those of q that go with them, [Z, R, 1, P]."""
        codes = quantize.parts(self.codes, self.bits)
        return [
            (part[:, None].astype(jnp.float32), factor[:, :, None])
            for part, factor in zip(codes, quantize.split(q, self.bits), strict=True)
        ]

    def _member(self, i: int) -> np.ndarray:
        """Which channels of part i are in which group, [P, groups]."""
        width = self.codes.shape[-1]
        group = (i * width + np.arange(width)) // self.group
        return group[:, None] == np.arange(self.steps.shape[-2])

    def weighted(
        self, w: Float[Array, "Z R size"], start: Any, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Weighted sum of values; see `Encoded`."""
        block = self.block(start, w.shape[2])
        if w.shape[1] > FEW:
            values = jnp.where(used[..., None], block.decode(), 0.0)
            return jnp.einsum("zrs,zsh->zrh", w, values, **PRODUCT)
        steps = jnp.where(used[:, None], wide(block.steps), 0.0)
        scaled = w[..., None] * jnp.swapaxes(steps, 1, 2)[:, None]  # [Z, R, S, groups]
        zeros = jnp.swapaxes(block.zeros, 1, 2).astype(jnp.float32)
        low = jnp.sum(scaled * zeros[:, None], axis=2)
        return block._sums(scaled) + jnp.repeat(low, self.group, axis=-1)[..., : self.dim]

    def _sums(self, w: Array) -> Array:
        """Sums of codes with weights w [Z, R, S, groups], [Z, R, H]."""
        if self.rows is None:
            raise ValueError(
                "weighted got an encoded array as it is kept; expected .merged() of it"
            )
        z, r, _, groups = w.shape
        width = self.codes.shape[-1]
        beside = self.rows.shape[-1] // width
        w = w.reshape(z, r, -1, beside, groups)
        sums = []
        for i, part in enumerate(quantize.parts(self.rows, self.bits)):
            member = self._member(i)
            first, last = np.flatnonzero(member.any(axis=0))[[0, -1]] if member.any() else (0, 0)
            if beside == 1 and first == last:
                some, part = w[..., 0, first], part.astype(jnp.float32)
                sums.append(jnp.einsum("zrs,zsp->zrp", some, part, **PRODUCT))
                continue
            # Tokens that lie beside each other, and groups of a token, have each their own
            # weights: a row of the product for each, of which only its own bytes are meant.
            own = np.kron(np.eye(beside, dtype=bool), member[:, first : last + 1].T)
            some = w[..., first : last + 1].reshape(z, r, -1, len(own))
            out = jnp.einsum("zrsc,zsp->zrcp", some, part.astype(jnp.float32), **PRODUCT)
            out = jnp.sum(jnp.where(own, out, 0.0), axis=2)
            sums.append(jnp.sum(out.reshape(z, r, beside, width), axis=2))
        return jnp.concatenate(sums, axis=-1)[..., : self.dim]


@dataclasses.dataclass(frozen=True)
class Affine:
    """Codes of 8, 4 or 2 bits with a step and a zero point for each group of numbers.

    Attributes:
        bits: of a code.
        axis: "token": a group is `group` channels of one token, all of them where None; "channel":
            it is one channel of `group` consecutive tokens (KIVI, Liu et al. 2024,
            arXiv:2402.02750), which keeps large channels of keys away from small ones.
        group: numbers that share a step; of tokens a power of two from 2 to 128.
    """

    bits: Any = 8  # int
    axis: Any = "token"  # str
    group: Any = None  # int

    def __post_init__(self) -> None:
        """Refuse what there is no form for."""
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
                f"got group={group} tokens that share a step; expected a power of two, 2 to 128"
            )

    @property
    def unit(self) -> int:
        """Consecutive tokens that are encoded together."""
        return self.group if self.axis == "channel" and self.group else 1

    def empty(
        self, batch: int, heads: int, slots: int, dim: int, dtype: Any
    ) -> ByToken | ByChannel:
        """Zeros.

        Raises:
            ValueError: slots that are no whole units.
        """
        del dtype
        check_slots(slots, self.unit)
        size = quantize.width(dim, self.bits)
        if self.axis == "channel":
            steps = (batch, heads, slots // self.unit * dim)
            return ByChannel(
                codes=jnp.zeros((batch, heads, size, slots), jnp.uint8),
                steps=jnp.zeros(steps, jnp.uint16),
                zeros=jnp.zeros(steps, jnp.int16),
                dim=dim,
                bits=self.bits,
            )
        group = min(self.group or dim, dim)
        groups = (batch, heads, -(-dim // group), slots)
        return ByToken(
            codes=jnp.zeros((batch, heads, slots, size), jnp.uint8),
            steps=jnp.zeros(groups, jnp.uint16),
            zeros=jnp.zeros(groups, jnp.int16),
            dim=dim,
            bits=self.bits,
            group=group,
        )
