"""Keys and values as operands of the kernels: how a block is fetched and multiplied.

The matrix instruction multiplies 64 rows with 8 or more columns: the rows of the scores are a
block's tokens and those of the weighted sum are channels, so that the few queries are columns.
Numbers of 16 bits are multiplied in the shared memory that they were copied to. Codes are converted
to bfloat16 in registers; scales and zero points are applied to scores and weights, not to each
number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.typing import DTypeLike

from jkv._axes import Array, Index, Ref
from jkv.ops.codecs import Encoded
from jkv.ops.codecs.affine import PerChannelCodes, PerTokenCodes
from jkv.ops.codecs.base import from_bf16_bits
from jkv.ops.codecs.floats import Float8Codes
from jkv.ops.kv import Pages
from jkv.ops.mosaic_gpu import convert
from jkv.ops.mosaic_gpu.convert import Kind
from jkv.ops.mosaic_gpu.tiling import Layout
from jkv.ops.pages import TpuPages

# Experimental, and without types that a checker could follow.
plgpu: Any = mosaic_gpu

Refs: TypeAlias = Sequence[Ref]

TILE: Any = plgpu.Layout.WGMMA
ROW: Any = TILE.reduce(1)  # one number for each row of a tile
COLUMN: Any = TILE.reduce(0)


class Piece(NamedTuple):
    """Some slots of a block: where they are in a row's buffer, or in a page."""

    lead: Index  # row, or page
    head: Index
    start: Index  # slot
    size: int
    row: int  # of the block


def swizzle(width: int) -> int | None:
    """Return over how many bytes shared memory is permuted for tiles of `width` bytes, or None."""
    return next((size for size in (128, 64, 32) if width % size == 0), None)


def shared(shape: Sequence[int], dtype: DTypeLike, swizzle_bytes: int | None) -> Ref:
    """Return shared memory for tiles in the order that matrix instructions read."""
    if swizzle_bytes is None:
        return plgpu.SMEM(tuple(shape), dtype)
    tile = (8, swizzle_bytes // jnp.dtype(dtype).itemsize)
    transforms = (plgpu.TilingTransform(tile), plgpu.SwizzleTransform(swizzle_bytes))
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)


def load(ref: Ref, layout: Ref) -> Array:
    """Load a small array from memory into a layout of registers."""
    return plgpu.load(ref, layout=layout, optimized=False)


def down(x: Array, shape: tuple[int, ...]) -> Array:
    """Broadcast one number for each row to all columns."""
    return lax.broadcast_in_dim(x, shape, [0])


def across(x: Array, shape: tuple[int, ...]) -> Array:
    """Broadcast one number for each column to all rows."""
    return lax.broadcast_in_dim(x, shape, [1])


def product(shape: tuple[int, int], *factors: tuple[Ref, Ref]) -> Array:
    """Sum matrix products in float32."""

    def total(sums: Ref) -> Array:
        for left, right in factors:
            plgpu.wgmma(sums, left, right)
        return sums[...]

    return pl.run_scoped(total, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def weighted_sums(layout: Layout, values: Ref, weights: Ref) -> Array:
    """Sum values [block, H] with weights [columns, block] to [height, columns].

    The rows of the instruction are 64 channels: where channels are no multiple, the last rows
    overlap those before, and some channels are summed twice.
    """
    weights = weights.transpose((1, 0))
    if layout.height == layout.dim:
        shape = (layout.dim, layout.columns)
        return product(shape, (values.transpose((1, 0)), weights))
    starts = [min(at, layout.dim - 64) for at in range(0, layout.dim, 64)]
    parts = [values.at[:, pl.ds(at, 64)].transpose((1, 0)) for at in starts]
    return jnp.concatenate([product((64, layout.columns), (p, weights)) for p in parts])


def unique_channels(layout: Layout, out: Array) -> Array:
    """Drop the channels of results [lines, height, columns] that were summed twice."""
    whole = layout.dim // 64 * 64
    return jnp.concatenate([out[:, :whole], out[:, layout.height - layout.dim + whole :]], axis=1)


@dataclasses.dataclass(frozen=True)
class DenseOperand:
    """Keys or values of 16 bits, multiplied as they are."""

    dtype: str

    @property
    def name(self) -> str:
        """The name of this form in tuning.json."""
        return "16 bits"

    @property
    def groups(self) -> int:
        """Groups of channels whose weights differ."""
        return 1

    @property
    def factor_dtype(self) -> np.dtype:
        """The dtype of the queries or weights that are multiplied with it."""
        return jnp.dtype(self.dtype)

    def prepare_queries(self, q: Array) -> Array:
        """Return queries [lines, columns, H] in the order in which they are multiplied."""
        return q

    def restore_channels(self, out: Array) -> Array:
        """Return results [lines, H, columns] with the channels in order."""
        return out

    def memory_swizzle(self, layout: Layout) -> int | None:
        """Return the swizzle of the shared memory, the same as that of the other factor."""
        return swizzle(layout.dim * 2)

    def stage(self, layout: Layout) -> list[Ref]:
        """Return the shared memory of the blocks in flight."""
        shape = (layout.stages, layout.block, layout.dim)
        return [shared(shape, self.factor_dtype, self.memory_swizzle(layout))]

    def work(self, layout: Layout, keys: bool) -> list[Ref]:
        """Return the shared memory in which keys or values are converted."""
        del layout, keys
        return []

    @property
    def copies(self) -> int:
        """Copies that fetch a block, or each piece of one."""
        return 1

    def fetch(
        self,
        layout: Layout,
        refs: Refs,
        stage: Refs,
        slot: Index,
        piece: Piece,
        bar: Ref,
    ) -> None:
        """Start to copy part of a block."""
        del layout
        at = refs[0].at[piece.lead, piece.head, pl.ds(piece.start, piece.size)]
        plgpu.copy_gmem_to_smem(at, stage[0].at[slot, pl.ds(piece.row, piece.size)], bar)

    def scores(
        self,
        layout: Layout,
        stage: Refs,
        slot: Index,
        work: Refs,
        q: Ref,
        sums: Array,
    ) -> Array:
        """Multiply with queries, whose sums over channels are `sums`, to [block, columns]."""
        del work, sums
        shape = (layout.block, layout.columns)
        return product(shape, (stage[0].at[slot], q.transpose((1, 0))))

    def weighted_sum(
        self,
        layout: Layout,
        stage: Refs,
        slot: Index,
        work: Refs,
        weights: Ref,
        w: Array,
        seen: Array,
        all_visible: Array | None,
    ) -> Callable[[], Array]:
        """Store weights to shared memory, and return what computes the sum [height, columns].

        Zero times NaN is NaN: unless all slots of the block are visible, the values of those that
        no query sees are replaced by zeros.
        """
        del work
        values = stage[0].at[slot]

        def clear() -> None:
            used = jnp.max(jnp.where(seen, 1.0, 0.0), axis=1) > 0
            x = plgpu.load(values, layout=TILE, optimized=False)
            used = down(used, x.shape)
            values[...] = jnp.where(used, x, jnp.zeros_like(x))
            plgpu.commit_smem()

        if all_visible is None:
            clear()
        else:
            pl.when(jnp.logical_not(all_visible))(clear)
        weights.at[0].transpose((1, 0))[...] = w.astype(self.factor_dtype)
        return lambda: weighted_sums(layout, values, weights.at[0])


@dataclasses.dataclass(frozen=True)
class PerTokenOperand:
    """Codes in bytes with a scale for each token, and a zero point where they are integers.

    Values may have several scales, one per group of channels, whose weights then differ. Each group
    is a product of its own, which 64 channels would be anyway.
    """

    bits: int
    floating: bool = False
    groups: int = 1  # scales of a token
    interpret: bool = False

    @property
    def name(self) -> str:
        """The name of this form in tuning.json."""
        return f"{self.bits} bits"

    @property
    def factor_dtype(self) -> np.dtype:
        """The dtype of the queries or weights that are multiplied with it."""
        return jnp.dtype(jnp.bfloat16)

    @property
    def parts(self) -> int:
        """Codes in a byte; the first ones of all bytes are the first part of the channels."""
        return 8 // self.bits

    def memory_swizzle(self, layout: Layout) -> int | None:
        """Return the swizzle of the shared memory of queries, weights and converted numbers."""
        return swizzle(layout.dim // self.parts * 2)

    def stage(self, layout: Layout) -> list[Ref]:
        """Return the shared memory of the blocks in flight."""
        width = layout.dim // self.parts
        codes = shared((layout.stages, layout.block, width), jnp.uint8, swizzle(width))
        scales = plgpu.SMEM((layout.stages, self.groups, layout.block), jnp.uint16)
        zero_points = plgpu.SMEM((layout.stages, self.groups, layout.block), jnp.int16)
        return [codes, scales] if self.floating else [codes, scales, zero_points]

    def work(self, layout: Layout, keys: bool) -> list[Ref]:
        """Return the shared memory in which keys or values are converted."""
        if keys and not self.interpret:
            return []
        return [shared((layout.block, layout.dim), self.factor_dtype, self.memory_swizzle(layout))]

    @property
    def copies(self) -> int:
        """Copies that fetch a block, or each piece of one."""
        return 2 if self.floating else 1 + 2 * self.groups

    def fetch(
        self,
        layout: Layout,
        refs: Refs,
        stage: Refs,
        slot: Index,
        piece: Piece,
        bar: Ref,
    ) -> None:
        """Start to copy part of a block."""
        del layout
        rows, slots = pl.ds(piece.row, piece.size), pl.ds(piece.start, piece.size)
        at = refs[0].at[piece.lead, piece.head, slots]
        plgpu.copy_gmem_to_smem(at, stage[0].at[slot, rows], bar)
        for ref, target in zip(refs[1:], stage[1:], strict=True):
            at = ref.at[piece.lead, piece.head]
            for g in range(self.groups):
                mine = at.at[slots] if self.floating else at.at[g, slots]
                plgpu.copy_gmem_to_smem(mine, target.at[slot, g, rows], bar)

    @property
    def kind(self) -> Kind:
        """The conversion to bfloat16, see `convert.to_bf16`."""
        return "float" if self.floating else self.bits

    def prepare_queries(self, q: Array) -> Array:
        """Return queries [lines, columns, H] in the order in which they are multiplied."""
        # Times a power of two: products of float codes would be below the range of float32.
        return convert.permute_channels(q * 2.0**100 if self.floating else q)

    def restore_channels(self, out: Array) -> Array:
        """Return results [lines, H, columns] with the channels in order."""
        return jnp.swapaxes(convert.restore_channels(jnp.swapaxes(out, 1, 2)), 1, 2)

    def scales(
        self, stage: Refs, slot: Index, factor: float, group: int = 0
    ) -> tuple[Array, Array | None]:
        """Return scales, times a factor, and zero points of a block's tokens, in float32."""
        scales = from_bf16_bits(load(stage[1].at[slot, group], ROW))
        if self.floating:
            return scales * factor, None
        zero_points = load(stage[2].at[slot, group], ROW).astype(jnp.float32)
        return scales, zero_points - convert.OFFSET[self.kind]

    def _convert(self, layout: Layout, codes: Ref, work: Refs) -> None:
        width = layout.dim // self.parts
        for i, part in enumerate(convert.to_bf16(codes, self.kind, self.interpret)):
            work[0].at[:, pl.ds(i * width, width)][...] = part

    def scores(
        self,
        layout: Layout,
        stage: Refs,
        slot: Index,
        work: Refs,
        q: Ref,
        sums: Array,
    ) -> Array:
        """Multiply with queries, whose sums over channels are `sums`, to [block, columns]."""
        shape = (layout.block, layout.columns)
        width, codes = layout.dim // self.parts, stage[0].at[slot]
        if self.interpret:
            # The interpreter's matrix instruction takes nothing from registers.
            self._convert(layout, codes, work)
            out = product(shape, (work[0], q.transpose((1, 0))))
        else:
            factors = []
            for i, part in enumerate(convert.to_bf16(codes, self.kind, False)):
                own = q if self.parts == 1 else q.at[:, pl.ds(i * width, width)]
                factors.append((part, own.transpose((1, 0))))
            out = product(shape, *factors)
        scales, zero_points = self.scales(stage, slot, 2.0**20)
        if zero_points is not None:
            out = out + across(sums, shape) * down(zero_points, shape)
        return out * down(scales, shape)

    def weighted_sum(
        self,
        layout: Layout,
        stage: Refs,
        slot: Index,
        work: Refs,
        weights: Ref,
        w: Array,
        seen: Array,
        all_visible: Array | None,
    ) -> Callable[[], Array]:
        """Store weights to shared memory, and return what computes the sum [height, columns].

        Any code is finite, but the scale of a slot that no query sees may not be.
        """
        del all_visible
        self._convert(layout, stage[0].at[slot], work)
        lows: list[Array] = []
        for group in range(self.groups):
            scales, zero_points = self.scales(stage, slot, 2.0**112, group)
            own = jnp.where(seen, w * down(scales, w.shape), 0.0).astype(self.factor_dtype)
            weights.at[group].transpose((1, 0))[...] = own
            if zero_points is not None:
                # Of the rounded weights: the rounding errors are then those of the decoded values.
                lows.append(jnp.sum(own.astype(jnp.float32) * down(zero_points, w.shape), axis=0))

        def multiply() -> Array:
            if self.groups == 1:
                outs = [weighted_sums(layout, work[0], weights.at[0])]
            else:
                size = layout.dim // self.groups
                outs = []
                for g in range(self.groups):
                    values = work[0].at[:, pl.ds(g * size, size)].transpose((1, 0))
                    factors = (values, weights.at[g].transpose((1, 0)))
                    outs.append(product((size, layout.columns), factors))
            if self.floating:
                return outs[0] * 2.0**8
            outs = [out + across(low, out.shape) for out, low in zip(outs, lows, strict=True)]
            return outs[0] if len(outs) == 1 else jnp.concatenate(outs)

        return multiply


@dataclasses.dataclass(frozen=True)
class PerChannelOperand:
    """Codes of keys that lie along the slots, scales and zero points of a block's channels.

    The scales of a block are multiplied into the queries, for each block again.
    """

    bits: int
    block_size: int
    interpret: bool = False

    @property
    def name(self) -> str:
        """The name of this form in tuning.json."""
        return f"{self.bits} bits along slots"

    @property
    def factor_dtype(self) -> np.dtype:
        """The dtype of the queries that are multiplied with it."""
        return jnp.dtype(jnp.bfloat16)

    @property
    def parts(self) -> int:
        """Codes in a byte; the first ones of all bytes are the first part of the channels."""
        return 8 // self.bits

    @property
    def kind(self) -> Kind:
        """The conversion to bfloat16, to small numbers: scales in the queries are rounded."""
        return 8 if self.bits == 8 else "centred"

    def blocks(self, layout: Layout) -> int:
        """Return the code blocks in a block of the kernel, or 1 where that is smaller."""
        return max(layout.block // self.block_size, 1)

    def prepare_queries(self, q: Array) -> Array:
        """Return queries [lines, columns, H] in the order in which they are multiplied."""
        return q

    def memory_swizzle(self, layout: Layout) -> int | None:
        """Return the swizzle of the shared memory of queries and converted numbers."""
        del layout
        return 128

    def stage(self, layout: Layout) -> list[Ref]:
        """Return the shared memory of the blocks in flight."""
        shape = (layout.stages, layout.dim // self.parts, layout.block)
        scales = (layout.stages, self.blocks(layout) * layout.dim)
        # Whole tiles are copied, and of the slots there are multiples of 64.
        codes = shared(shape, jnp.uint8, 64)
        return [codes, plgpu.SMEM(scales, jnp.uint16), plgpu.SMEM(scales, jnp.int16)]

    def work(self, layout: Layout, keys: bool) -> list[Ref]:
        """Return the shared memory of converted keys, and of queries times scales."""
        del keys
        codes = shared((layout.dim, layout.block), self.factor_dtype, 128)
        asked = (self.blocks(layout), layout.columns, layout.dim)
        return [codes, shared(asked, self.factor_dtype, 128)]

    @property
    def copies(self) -> int:
        """Copies that fetch a block."""
        return 3

    def fetch(
        self,
        layout: Layout,
        refs: Refs,
        stage: Refs,
        slot: Index,
        piece: Piece,
        bar: Ref,
    ) -> None:
        """Start to copy a block."""
        codes = refs[0].at[piece.lead, piece.head, :, pl.ds(piece.start, piece.size)]
        plgpu.copy_gmem_to_smem(codes, stage[0].at[slot], bar)
        size = self.blocks(layout) * layout.dim
        scales = pl.ds(lax.div(piece.start, jnp.int32(self.block_size)) * layout.dim, size)
        for ref, target in zip(refs[1:], stage[1:], strict=True):
            plgpu.copy_gmem_to_smem(ref.at[piece.lead, piece.head, scales], target.at[slot], bar)

    def scores(
        self,
        layout: Layout,
        stage: Refs,
        slot: Index,
        work: Refs,
        q: Ref,
        sums: Array,
    ) -> Array:
        """Multiply with queries to [block, columns]."""
        del sums
        rows, tall = layout.dim // self.parts, (layout.dim, layout.columns)
        codes = stage[0].at[slot]
        for i, part in enumerate(convert.to_bf16(codes, self.kind, self.interpret, True)):
            work[0].at[pl.ds(i * rows, rows)][...] = part
        asked = load(q.transpose((1, 0)), TILE).astype(jnp.float32)
        lows = []
        for u in range(self.blocks(layout)):
            here = pl.ds(u * layout.dim, layout.dim)
            scaled = asked * down(from_bf16_bits(load(stage[1].at[slot, here], ROW)), tall)
            zero_points = load(stage[2].at[slot, here], ROW).astype(jnp.float32)
            zero_points = zero_points - convert.OFFSET[self.kind]
            lows.append(jnp.sum(scaled * down(zero_points, tall), axis=0))
            work[1].at[u].transpose((1, 0))[...] = scaled.astype(self.factor_dtype)
        plgpu.commit_smem()
        size = layout.block // self.blocks(layout)
        found = []
        for u, low in enumerate(lows):
            keys = work[0].at[:, pl.ds(u * size, size)].transpose((1, 0))
            shape = (size, layout.columns)
            out = product(shape, (keys, work[1].at[u].transpose((1, 0))))
            found.append(out + across(low, shape))
        return found[0] if len(found) == 1 else jnp.concatenate(found)


Keys = DenseOperand | PerTokenOperand | PerChannelOperand
Values = DenseOperand | PerTokenOperand


def operand_of(x: Pages | jax.ShapeDtypeStruct) -> Keys | str:
    """Return the operand for keys or values, or the reason why no kernel takes them."""
    if isinstance(x, TpuPages):
        return "pages in the layout for TPUs"
    if not isinstance(x, Encoded):
        name = jnp.dtype(x.dtype).name
        if name not in ("bfloat16", "float16"):
            return f"{name} (the matrix instruction takes bfloat16 and float16)"
        return DenseOperand(name)
    if isinstance(x, Float8Codes):
        return PerTokenOperand(8, floating=True)
    if isinstance(x, PerTokenCodes | PerChannelCodes) and x.bits not in (8, 4):
        return f"codes of {x.bits} bits (the kernel takes 8 and 4)"
    if isinstance(x, PerTokenCodes):
        return PerTokenOperand(x.bits, groups=x.scales.shape[-2])
    if isinstance(x, PerChannelCodes):
        if x.block_size not in (64, 128):
            return f"a scale for {x.block_size} tokens (the kernel takes 64 and 128)"
        return PerChannelOperand(x.bits, x.block_size)
    return f"numbers stored as {type(x).__name__}"
