"""How a block of keys or values is fetched and takes part in products, in each form of storage.

The matrix instruction multiplies 64 rows with 8 or more columns: a block's tokens are the rows of
the scores, and a value's channels those of the weighted sum, so that the few queries are columns.
Numbers of 16 bits are multiplied where the copy put them. Codes pass through registers, where they
become bfloat16; steps and zero points belong to scores and weights, not to each number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from jkv._axes import Array
from jkv.ops.codecs import Encoded
from jkv.ops.codecs.affine import PerChannelCodes, PerTokenCodes
from jkv.ops.codecs.floats import Float8Codes
from jkv.ops.mosaic_gpu import convert
from jkv.ops.mosaic_gpu.plan import Layout

# Experimental, and without types that a checker could follow.
plgpu: Any = mosaic_gpu

TILE: Any = plgpu.Layout.WGMMA
ROW: Any = TILE.reduce(1)  # one number for each row of a tile
COLUMN: Any = TILE.reduce(0)


class Piece(NamedTuple):
    """Where some slots of a block lie: in a row's buffer, or in a page."""

    lead: Any  # row, or page
    head: Any
    start: Any  # slot
    size: int
    row: int  # of the block


def swizzle(width: int) -> int | None:
    """Bytes over which shared memory is permuted, for tiles `width` bytes wide; None for none."""
    return next((size for size in (128, 64, 32) if width % size == 0), None)


def shared(shape: Sequence[int], dtype: Any, permuted: int | None) -> Any:
    """Shared memory for tiles in the order that matrix instructions read."""
    if permuted is None:
        return plgpu.SMEM(tuple(shape), dtype)
    tile = (8, permuted // jnp.dtype(dtype).itemsize)
    transforms = (plgpu.TilingTransform(tile), plgpu.SwizzleTransform(permuted))
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)


def load(ref: Any, layout: Any) -> Array:
    """A small array from memory, in some layout of registers."""
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref: Any, x: Array) -> None:
    """A small array into memory, whatever part of its lines that is."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:  # JAX 0.11, for which there is no other
        ref[...] = x


def down(x: Array, shape: tuple[int, ...]) -> Array:
    """One number for each row, in all columns."""
    return lax.broadcast_in_dim(x, shape, [0])


def across(x: Array, shape: tuple[int, ...]) -> Array:
    """One number for each column, in all rows."""
    return lax.broadcast_in_dim(x, shape, [1])


def product(shape: tuple[int, int], *factors: tuple[Any, Any]) -> Array:
    """Sum of matrix products, in float32."""

    def total(sums: Any) -> Array:
        for left, right in factors:
            plgpu.wgmma(sums, left, right)
        return sums[...]

    return pl.run_scoped(total, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def summed(layout: Layout, values: Any, weights: Any) -> Array:
    """Weighted sums [height, columns] of values [block, H], weights being [columns, block].

    The instruction's rows are 64 channels: of channels that are no multiple, the last of them
    reach back, and some are summed twice.
    """
    weights = weights.transpose((1, 0))
    if layout.height == layout.dim:
        shape = (layout.dim, layout.columns)
        return product(shape, (values.transpose((1, 0)), weights))
    starts = [min(at, layout.dim - 64) for at in range(0, layout.dim, 64)]
    parts = [values.at[:, pl.ds(at, 64)].transpose((1, 0)) for at in starts]
    return jnp.concatenate([product((64, layout.columns), (p, weights)) for p in parts])


def untwice(layout: Layout, out: Array) -> Array:
    """Results [lines, height, columns] of `summed`, each channel once."""
    whole = layout.dim // 64 * 64
    return jnp.concatenate([out[:, :whole], out[:, layout.height - layout.dim + whole :]], axis=1)


@dataclasses.dataclass(frozen=True)
class Plain:
    """Numbers of 16 bits."""

    dtype: str

    @property
    def name(self) -> str:
        """In tuning.json."""
        return "16 bits"

    @property
    def groups(self) -> int:
        """Of channels whose weights differ."""
        return 1

    @property
    def factor(self) -> Any:
        """What queries or weights have to be, to be multiplied."""
        return jnp.dtype(self.dtype)

    def arrays(self, x: Any) -> list[Array]:
        """What the kernel gets."""
        return [x]

    def prepared(self, q: Array) -> Array:
        """Queries [lines, columns, H] as they are multiplied."""
        return q

    def restored(self, out: Array) -> Array:
        """Results [lines, H, columns] with the channels in order."""
        return out

    def permuted(self, layout: Layout) -> int | None:
        """Of the shared memory; the other factor's has to be the same."""
        return swizzle(layout.dim * 2)

    def stage(self, layout: Layout) -> list[Any]:
        """Shared memory of the blocks in flight."""
        shape = (layout.stages, layout.block, layout.dim)
        return [shared(shape, self.factor, self.permuted(layout))]

    def work(self, layout: Layout, keys: bool) -> list[Any]:
        """Shared memory to convert keys or values in."""
        del layout, keys
        return []

    @property
    def copies(self) -> int:
        """How many bring a block, or each piece of one."""
        return 1

    def fetch(self, layout: Layout, refs: Any, stage: Any, slot: Any, piece: Piece, bar: Any):
        """Begin to copy part of a block."""
        del layout
        at = refs[0].at[piece.lead, piece.head, pl.ds(piece.start, piece.size)]
        plgpu.copy_gmem_to_smem(at, stage[0].at[slot, pl.ds(piece.row, piece.size)], bar)

    def scores(
        self, layout: Layout, stage: Any, slot: Any, work: Any, q: Any, sums: Array
    ) -> Array:
        """Products [block, columns] with queries, of which `sums` are those of the channels."""
        del work, sums
        shape = (layout.block, layout.columns)
        return product(shape, (stage[0].at[slot], q.transpose((1, 0))))

    def weighted_sum(
        self,
        layout: Layout,
        stage: Any,
        slot: Any,
        work: Any,
        weights: Any,
        w: Array,
        seen: Array,
        clean: Any,
    ) -> Callable[[], Array]:
        """Put weights to multiply with into memory; what then gives the sum [height, columns].

        Zero times NaN is NaN: a block in which some slot is seen by nobody is not `clean`, and
        loses what lies there.
        """
        del work
        values = stage[0].at[slot]

        def clear() -> None:
            used = jnp.max(jnp.where(seen, 1.0, 0.0), axis=1) > 0
            x = plgpu.load(values, layout=TILE, optimized=False)
            used = down(used, x.shape)
            values[...] = jnp.where(used, x, jnp.zeros_like(x))
            plgpu.commit_smem()

        if clean is None:
            clear()
        else:
            pl.when(jnp.logical_not(clean))(clear)
        weights.at[0].transpose((1, 0))[...] = w.astype(self.factor)
        return lambda: summed(layout, values, weights.at[0])


@dataclasses.dataclass(frozen=True)
class Coded:
    """Codes in bytes with a step for each token, and a zero point where they are integers.

    Values may have several, each for as many channels: their weights differ by groups, which are
    products of their own that they would be anyway, of 64 channels each.
    """

    bits: int
    floating: bool = False
    groups: int = 1  # steps of a token
    interpreted: bool = False

    @property
    def name(self) -> str:
        """In tuning.json."""
        return f"{self.bits} bits"

    @property
    def factor(self) -> Any:
        """What queries or weights have to be, to be multiplied."""
        return jnp.dtype(jnp.bfloat16)

    @property
    def parts(self) -> int:
        """Numbers in a byte; the first of all bytes are the first part of the channels."""
        return 8 // self.bits

    def arrays(self, x: Any) -> list[Array]:
        """What the kernel gets."""
        if self.floating:
            return [x.codes, x.scales]
        return [x.codes, x.scales, x.zero_points]

    def permuted(self, layout: Layout) -> int | None:
        """Of the shared memory that holds queries, weights and what is converted."""
        return swizzle(layout.dim // self.parts * 2)

    def stage(self, layout: Layout) -> list[Any]:
        """Shared memory of the blocks in flight."""
        width = layout.dim // self.parts
        codes = shared((layout.stages, layout.block, width), jnp.uint8, swizzle(width))
        steps = plgpu.SMEM((layout.stages, self.groups, layout.block), jnp.uint16)
        zeros = plgpu.SMEM((layout.stages, self.groups, layout.block), jnp.int16)
        return [codes, steps] if self.floating else [codes, steps, zeros]

    def work(self, layout: Layout, keys: bool) -> list[Any]:
        """Shared memory to convert keys or values in."""
        if keys and not self.interpreted:
            return []
        return [shared((layout.block, layout.dim), self.factor, self.permuted(layout))]

    @property
    def copies(self) -> int:
        """How many bring a block, or each piece of one."""
        return 2 if self.floating else 1 + 2 * self.groups

    def fetch(self, layout: Layout, refs: Any, stage: Any, slot: Any, piece: Piece, bar: Any):
        """Begin to copy part of a block."""
        del layout
        rows, slots = pl.ds(piece.row, piece.size), pl.ds(piece.start, piece.size)
        at = refs[0].at[piece.lead, piece.head, slots]
        plgpu.copy_gmem_to_smem(at, stage[0].at[slot, rows], bar)
        for ref, held in zip(refs[1:], stage[1:], strict=True):
            at = ref.at[piece.lead, piece.head]
            for g in range(self.groups):
                mine = at.at[slots] if self.floating else at.at[g, slots]
                plgpu.copy_gmem_to_smem(mine, held.at[slot, g, rows], bar)

    @property
    def kind(self) -> Any:
        """Of conversion."""
        return "float" if self.floating else self.bits

    def prepared(self, q: Array) -> Array:
        """Queries [lines, columns, H] as they are multiplied."""
        # A power of two, so that products are no smaller than numbers in float32 can be.
        return convert.permuted(q * 2.0**100 if self.floating else q)

    def restored(self, out: Array) -> Array:
        """Results [lines, H, columns] with the channels in order."""
        return jnp.swapaxes(convert.restored(jnp.swapaxes(out, 1, 2)), 1, 2)

    def scales(
        self, stage: Any, slot: Any, factor: float, group: int = 0
    ) -> tuple[Array, Array | None]:
        """Steps, times a factor, and zero points of a block's tokens, in float32."""
        steps = _wide(load(stage[1].at[slot, group], ROW))
        if self.floating:
            return steps * factor, None
        zeros = load(stage[2].at[slot, group], ROW).astype(jnp.float32)
        return steps, zeros - convert.OFFSET[self.kind]

    def _convert(self, layout: Layout, codes: Any, work: Any) -> None:
        width = layout.dim // self.parts
        for i, part in enumerate(convert.numbers(codes, self.kind, self.interpreted)):
            work[0].at[:, pl.ds(i * width, width)][...] = part

    def scores(
        self, layout: Layout, stage: Any, slot: Any, work: Any, q: Any, sums: Array
    ) -> Array:
        """Products [block, columns] with queries, of which `sums` are those of the channels."""
        shape = (layout.block, layout.columns)
        width, codes = layout.dim // self.parts, stage[0].at[slot]
        if self.interpreted:
            # The interpreter's matrix instruction takes nothing from registers.
            self._convert(layout, codes, work)
            out = product(shape, (work[0], q.transpose((1, 0))))
        else:
            factors = []
            for i, part in enumerate(convert.numbers(codes, self.kind, False)):
                own = q if self.parts == 1 else q.at[:, pl.ds(i * width, width)]
                factors.append((part, own.transpose((1, 0))))
            out = product(shape, *factors)
        steps, zeros = self.scales(stage, slot, 2.0**20)
        if zeros is not None:
            out = out + across(sums, shape) * down(zeros, shape)
        return out * down(steps, shape)

    def weighted_sum(
        self,
        layout: Layout,
        stage: Any,
        slot: Any,
        work: Any,
        weights: Any,
        w: Array,
        seen: Array,
        clean: Any,
    ) -> Callable[[], Array]:
        """Put weights to multiply with into memory; what then gives the sum [height, columns].

        Any code is finite, but the step of a slot that nobody sees may not be.
        """
        del clean
        self._convert(layout, stage[0].at[slot], work)
        lows: list[Array] = []
        for group in range(self.groups):
            steps, zeros = self.scales(stage, slot, 2.0**112, group)
            own = jnp.where(seen, w * down(steps, w.shape), 0.0).astype(self.factor)
            weights.at[group].transpose((1, 0))[...] = own
            if zeros is not None:
                # Of the weights as they were rounded: their errors are then those of the numbers
                # meant.
                lows.append(jnp.sum(own.astype(jnp.float32) * down(zeros, w.shape), axis=0))

        def multiply() -> Array:
            if self.groups == 1:
                outs = [summed(layout, work[0], weights.at[0])]
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
class ByUnit:
    """Codes of keys that lie along the slots, steps and zero points of a unit's channels.

    The steps of a unit belong to the queries, which are multiplied anew for each.
    """

    bits: int
    unit: int
    interpreted: bool = False

    @property
    def name(self) -> str:
        """In tuning.json."""
        return f"{self.bits} bits along slots"

    @property
    def factor(self) -> Any:
        """What queries have to be, to be multiplied."""
        return jnp.dtype(jnp.bfloat16)

    @property
    def parts(self) -> int:
        """Numbers in a byte; the first of all bytes are the first part of the channels."""
        return 8 // self.bits

    @property
    def kind(self) -> Any:
        """Of conversion: small numbers, as the steps in the queries are rounded."""
        return 8 if self.bits == 8 else "centred"

    def units(self, layout: Layout) -> int:
        """In a block, or one where a block is less."""
        return max(layout.block // self.unit, 1)

    def arrays(self, x: Any) -> list[Array]:
        """What the kernel gets."""
        return [x.codes, x.scales, x.zero_points]

    def prepared(self, q: Array) -> Array:
        """Queries [lines, columns, H] as they are multiplied."""
        return q

    def permuted(self, layout: Layout) -> int | None:
        """Of the shared memory that holds queries and what is converted."""
        del layout
        return 128

    def stage(self, layout: Layout) -> list[Any]:
        """Shared memory of the blocks in flight."""
        shape = (layout.stages, layout.dim // self.parts, layout.block)
        steps = (layout.stages, self.units(layout) * layout.dim)
        # Whole tiles are copied, and of the slots there are multiples of 64.
        codes = shared(shape, jnp.uint8, 64)
        return [codes, plgpu.SMEM(steps, jnp.uint16), plgpu.SMEM(steps, jnp.int16)]

    def work(self, layout: Layout, keys: bool) -> list[Any]:
        """Shared memory to convert keys in, and of queries times steps."""
        del keys
        codes = shared((layout.dim, layout.block), self.factor, 128)
        asked = (self.units(layout), layout.columns, layout.dim)
        return [codes, shared(asked, self.factor, 128)]

    @property
    def copies(self) -> int:
        """How many bring a block."""
        return 3

    def fetch(self, layout: Layout, refs: Any, stage: Any, slot: Any, piece: Piece, bar: Any):
        """Begin to copy a block."""
        codes = refs[0].at[piece.lead, piece.head, :, pl.ds(piece.start, piece.size)]
        plgpu.copy_gmem_to_smem(codes, stage[0].at[slot], bar)
        size = self.units(layout) * layout.dim
        steps = pl.ds(lax.div(piece.start, jnp.int32(self.unit)) * layout.dim, size)
        for ref, held in zip(refs[1:], stage[1:], strict=True):
            plgpu.copy_gmem_to_smem(ref.at[piece.lead, piece.head, steps], held.at[slot], bar)

    def scores(
        self, layout: Layout, stage: Any, slot: Any, work: Any, q: Any, sums: Array
    ) -> Array:
        """Products [block, columns] with queries."""
        del sums
        rows, tall = layout.dim // self.parts, (layout.dim, layout.columns)
        codes = stage[0].at[slot]
        for i, part in enumerate(convert.numbers(codes, self.kind, self.interpreted, True)):
            work[0].at[pl.ds(i * rows, rows)][...] = part
        asked = load(q.transpose((1, 0)), TILE).astype(jnp.float32)
        lows = []
        for u in range(self.units(layout)):
            here = pl.ds(u * layout.dim, layout.dim)
            scaled = asked * down(_wide(load(stage[1].at[slot, here], ROW)), tall)
            zeros = load(stage[2].at[slot, here], ROW).astype(jnp.float32)
            zeros = zeros - convert.OFFSET[self.kind]
            lows.append(jnp.sum(scaled * down(zeros, tall), axis=0))
            work[1].at[u].transpose((1, 0))[...] = scaled.astype(self.factor)
        plgpu.commit_smem()
        size = layout.block // self.units(layout)
        found = []
        for u, low in enumerate(lows):
            keys = work[0].at[:, pl.ds(u * size, size)].transpose((1, 0))
            shape = (size, layout.columns)
            out = product(shape, (keys, work[1].at[u].transpose((1, 0))))
            found.append(out + across(low, shape))
        return found[0] if len(found) == 1 else jnp.concatenate(found)


def _wide(bits: Array) -> Array:
    """Numbers in bfloat16, given as bits, in float32."""
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << jnp.uint32(16), jnp.float32)


Keys = Plain | Coded | ByUnit
Values = Plain | Coded


def form(x: Any) -> Keys | str:
    """How `x` is stored, or why there is no kernel for it."""
    if not isinstance(x, Encoded):
        name = jnp.dtype(x.dtype).name
        if name not in ("bfloat16", "float16"):
            return f"{name} (the matrix instruction takes bfloat16 and float16)"
        return Plain(name)
    if isinstance(x, Float8Codes):
        return Coded(8, floating=True)
    if isinstance(x, PerTokenCodes | PerChannelCodes) and x.bits not in (8, 4):
        return f"codes of {x.bits} bits (the kernel takes 8 and 4)"
    if isinstance(x, PerTokenCodes):
        return Coded(x.bits, groups=x.scales.shape[-2])
    if isinstance(x, PerChannelCodes):
        if x.block_size not in (64, 128):
            return f"a step for {x.block_size} tokens (the kernel takes 64 and 128)"
        return ByUnit(x.bits, x.block_size)
    return f"numbers stored as {type(x).__name__}"
