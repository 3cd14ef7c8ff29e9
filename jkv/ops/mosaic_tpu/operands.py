"""Keys and values as operands of a TPU kernel: their arrays, layouts, and how a block is read.

A TPU tiles the last two axes by 8 x 128 numbers. XLA stores an array ``[B, K, S, C]`` of fewer than
128 channels with its slots last, so that nothing is padded, while the operands of a kernel are
stored as they are indexed. Such arrays are therefore passed as ``[B, K, C, S]``, the layout that
they already have: no copy. Small pages are `TpuPages`, in which F = `pack_factor` tokens share a
line. The queries then have a row for each token of a line, zero in the lanes of the others, and
the scores of the lines' first tokens come before those of their second. A reader per form answers
what attention asks of a block: products of queries with keys, and weighted sums of values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jkv._axes import Array
from jkv.errors import UnsupportedError
from jkv.ops.codecs import Encoded
from jkv.ops.codecs.affine import PerChannelCodes, PerTokenCodes
from jkv.ops.codecs.floats import Float8Codes
from jkv.ops.kv import Pages
from jkv.ops.pages import TpuPages
from jkv.ops.tile import LANES

MIN_BLOCK = 32  # tokens; of smaller blocks too many are in a tile
MOST_GROUPS = 8  # of a token's channels


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of an operand, ``[B, K, ...]`` or ``[P, K, ...]``, and how it is read."""

    array: Any
    axis: int  # of slots
    rows: bool = False  # [B, K, S]: the lines of all heads in one tile
    share: Fraction = Fraction(1)  # numbers along the axis for each slot
    whole: tuple[bool, ...] = ()  # `TpuPages.scales`: of its lines, which are whole numbers


def has_slots_last(channels: int) -> bool:
    """Return whether the slots are the last axis in the memory of a TPU."""
    return channels % LANES != 0


def slots_last_leaf(x: Array) -> Leaf:
    """Return an array [B, K, S, C] in the layout that it has in memory."""
    if has_slots_last(x.shape[-1]):
        return Leaf(jnp.swapaxes(x, -1, -2), 3)
    return Leaf(x, 2)


def product(a: Array, b: Array, contract: int, precision: lax.Precision | None = None) -> Array:
    """Multiply rows of `a` with rows (contract=1) or columns (contract=0) of `b` in float32."""
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def split_bf16(x: Array, count: int) -> list[Array]:
    """Split float32 numbers into sums of `count` bfloat16 numbers: three have all of their 24 bits.

    Products with codes, integers below 256, are then exact, at the cost of more rows but not of
    more passes over the codes. Bits are cut off, not rounded, since a compiler may remove a
    conversion back and forth.
    """
    parts = []
    for _ in range(count - 1):
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
        parts.append(lax.bitcast_convert_type(bits, jnp.float32))
        x = x - parts[-1]
    return [*parts, x]


def _used(seen: Array) -> Array:
    """Return the slots [1, S] that some query sees, as numbers above zero."""
    return jnp.max(seen.astype(jnp.float32), axis=0, keepdims=True)


def _from_bf16_bits(bits: Array) -> Array:
    """Convert bits of bfloat16 to float32, and leave float32 as it is."""
    if bits.dtype == jnp.float32:
        return bits
    return lax.bitcast_convert_type(bits.astype(jnp.int32) << 16, jnp.float32)


def _add_rows(parts: Array, rows: int) -> Array:
    """Sum groups of `rows` rows."""
    total = parts[:rows]
    for i in range(rows, parts.shape[0], rows):
        total = total + parts[i : i + rows]
    return total


def place_in_lanes(q: Array, parts: int, pack_factor: int) -> Array:
    """Repeat queries [..., R, H] in the lanes of each token of a line, [..., F * R, F * H].

    The parts of packed bytes are lines one after another.
    """
    if pack_factor == 1:
        return q
    apart = q.reshape(*q.shape[:-1], parts, 1, -1)
    rows = [
        jnp.where(jnp.arange(pack_factor, dtype=jnp.int32)[:, None] == t, apart, 0).reshape(
            *q.shape[:-1], -1
        )
        for t in range(pack_factor)
    ]
    return jnp.concatenate(rows, axis=-2)


def _along(rows: Array, pack_factor: int) -> Array:
    """Bring rows for each token of a line, [F * R, L], side by side: [R, F * L]."""
    size = rows.shape[0] // pack_factor
    return jnp.concatenate([rows[t * size : (t + 1) * size] for t in range(pack_factor)], axis=1)


def _below(x: Array, pack_factor: int) -> Array:
    """Undo `_along`."""
    size = x.shape[1] // pack_factor
    return jnp.concatenate([x[:, t * size : (t + 1) * size] for t in range(pack_factor)], axis=0)


def _own(sums: Array, pack_factor: int, parts: int) -> Array:
    """Select from sums [F * R, C] those of each token in its own lanes, [R, C]."""
    size, width = sums.shape[0] // pack_factor, sums.shape[1] // parts
    lane = lax.rem(lax.broadcasted_iota(jnp.int32, (1, sums.shape[1]), 1), width)
    total = sums[:size]
    for t in range(1, pack_factor):
        here = lane >= t * (width // pack_factor)
        total = jnp.where(here, sums[t * size : (t + 1) * size], total)
    return total


@dataclasses.dataclass(frozen=True)
class DenseReader:
    """Reads keys or values as they are, ``[S, H]`` or, with slots last, ``[H, S]``."""

    dtype: Any
    last: bool
    pack_factor: int = 1  # tokens of a line
    parts: int = 1  # of a byte

    @property
    def _precision(self) -> lax.Precision | None:
        return lax.Precision.HIGHEST if self.dtype == jnp.float32 else None

    def queries(self, q: Array) -> Array:
        """Return queries [B, K, R, H] as `products` takes them."""
        return place_in_lanes(q, 1, self.pack_factor)

    def products(self, q: Array, leaves: list[Array], seen: Array | None = None) -> Array:
        """Multiply queries with keys to [R, S]; `seen` as for `sums`."""
        k = leaves[0]
        if self.pack_factor > 1 and seen is not None:
            k = self._zero_unused(k, seen)  # zeros meet the numbers of a line's other tokens
        return _along(product(q, k, 0 if self.last else 1, self._precision), self.pack_factor)

    def sums(self, w: Array, leaves: list[Array], seen: Array | None) -> Array:
        """Sum values with weights [R, S] to [R, F * H]; `seen` is None where every slot is."""
        v = leaves[0] if seen is None else self._zero_unused(leaves[0], seen)
        w = _below(w, self.pack_factor).astype(self.dtype)
        return _own(product(w, v, 1 if self.last else 0, self._precision), self.pack_factor, 1)

    def _zero_unused(self, x: Array, seen: Array) -> Array:
        """Replace what no query sees by zero: zero times NaN is NaN."""
        used = _used(seen)
        if not self.last:
            used = self._columns(used, x.shape)
        # Selects are of 32 bits on all TPUs.
        return jnp.where(used > 0, x.astype(jnp.float32), 0.0).astype(self.dtype)

    def _columns(self, row: Array, shape: tuple[int, ...]) -> Array:
        """Arrange a row of all slots [1, S] by the tokens of each line."""
        (lines, width), found = shape, jnp.zeros((), row.dtype)
        lane = lax.broadcasted_iota(jnp.int32, (1, width), 1)
        for t in range(self.pack_factor):
            own = jnp.broadcast_to(row[:, t * lines : (t + 1) * lines], (8, lines))
            own = jnp.transpose(own)[:, :1]
            found = (
                own if t == 0 else jnp.where(lane >= t * (width // self.pack_factor), own, found)
            )
        return found


@dataclasses.dataclass(frozen=True)
class PerTokenReader:
    """Reads codes with a scale, and perhaps a zero point, per group of a token's channels."""

    decode: Callable[[Array], Array]  # bytes [P, S] or [S, P] to whole numbers or floats
    last: bool  # slots
    dim: int
    group: int
    exact: bool  # queries in float32
    pack_factor: int = 1  # tokens of a line
    parts: int = 1  # of a byte

    @property
    def _groups(self) -> int:
        return -(-self.dim // self.group)

    def _channels(self, g: int, pack_factor: int = 1) -> Array:
        """Return which lanes [1, F * H] hold channels of a group."""
        lane = lax.broadcasted_iota(jnp.int32, (1, pack_factor * self.dim), 1)
        if pack_factor > 1:
            each = self.dim // self.parts
            lane = lax.div(lane, each * pack_factor) * each + lax.rem(lane, each)
        return (lane >= g * self.group) & (lane < (g + 1) * self.group)

    def queries(self, q: Array) -> Array:
        """Return the queries' channels of each group, in parts: [B, K, groups * parts * R, H]."""
        parts = split_bf16(q.astype(jnp.float32), 3) if self.exact else [q]
        rows = [jnp.where(self._channels(g), x, 0) for g in range(self._groups) for x in parts]
        every = jnp.concatenate(rows, axis=2).astype(jnp.bfloat16)
        return place_in_lanes(every, self.parts, self.pack_factor)

    def _affine(self, leaves: list[Array]) -> tuple[list[Array], list[Array] | None]:
        """Scales and zero points [1, S] of each group."""
        scales, *zero_points = (
            [x[g : g + 1] for g in range(self._groups)]
            for x in (_from_bf16_bits(leaves[1]), *(x.astype(jnp.float32) for x in leaves[2:]))
        )
        return scales, zero_points[0] if zero_points else None

    def products(self, q: Array, leaves: list[Array], seen: Array | None = None) -> Array:
        """Multiply queries with keys to [R, S]; codes of unseen slots are finite."""
        del seen
        found = product(q, self.decode(leaves[0]), 0 if self.last else 1)
        found = _along(found, self.pack_factor)
        scales, zero_points = self._affine(leaves)
        rows = q.shape[0] // (self._groups * self.pack_factor)
        alone = rows // (3 if self.exact else 1)
        total: Any = 0.0
        for g in range(self._groups):
            own = slice(g * rows, (g + 1) * rows)
            codes = _add_rows(found[own], alone)
            if zero_points is not None:
                whole = jnp.sum(q[own].astype(jnp.float32), axis=1, keepdims=True)
                codes = codes + _add_rows(whole, alone) * zero_points[g]
            total = total + codes * scales[g]
        return total

    def sums(self, w: Array, leaves: list[Array], seen: Array | None) -> Array:
        """Sum values with weights [R, S] to [R, F * H]; `seen` is None where every slot is."""
        scales, zero_points = self._affine(leaves)
        if seen is not None:
            used = _used(seen) > 0
            scales = [jnp.where(used, x, 0.0) for x in scales]
        scaled = [w * x for x in scales]
        parts = [x for y in scaled for x in split_bf16(y, 3 if self.exact else 2)]
        rows = _below(jnp.concatenate(parts, axis=0).astype(jnp.bfloat16), self.pack_factor)
        found = product(rows, self.decode(leaves[0]), 1 if self.last else 0)
        found = _own(found, self.pack_factor, self.parts)
        size = found.shape[0] // self._groups
        total: Any = 0.0
        for g in range(self._groups):
            own = _add_rows(found[g * size : (g + 1) * size], w.shape[0])
            if zero_points is not None:
                low = jnp.sum(scaled[g] * zero_points[g], axis=1, keepdims=True)
                own = own + (low if self.pack_factor == 1 else jnp.where(self._first, low, 0.0))
            if self._groups > 1:
                own = jnp.where(self._channels(g, self.pack_factor), own, 0.0)
            total = total + own
        return total

    @property
    def _first(self) -> Array:
        """Lanes [1, F * H] of a line's first token."""
        each = self.dim // self.parts
        lane = lax.broadcasted_iota(jnp.int32, (1, self.pack_factor * self.dim), 1)
        return lax.rem(lane, each * self.pack_factor) < each


@dataclasses.dataclass(frozen=True)
class PerChannelReader:
    """Reads keys as codes with a scale and a zero point per channel of a block of tokens."""

    bits: int
    dim: int
    block_size: int
    exact: bool  # queries in float32

    def queries(self, q: Array) -> Array:
        """Return queries in float32."""
        return q.astype(jnp.float32)

    def products(self, q: Array, leaves: list[Array], seen: Array | None = None) -> Array:
        """Multiply with keys to [R, S]: blocks of a tile are rows of one product."""
        del seen
        codes = unpack(self.bits, 0, leaves[0])
        scales, zero_points = _from_bf16_bits(leaves[1]), leaves[2].astype(jnp.float32)
        blocks, rows = LANES // self.block_size, q.shape[0]
        lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        found = []
        for start in range(0, codes.shape[1], LANES):
            parts, whole = [], []
            for u in range(start // self.block_size, start // self.block_size + blocks):
                own = slice(u * self.dim, (u + 1) * self.dim)
                scaled = q * scales[:, own]
                whole.append(jnp.sum(scaled * zero_points[:, own], axis=1, keepdims=True))
                parts += split_bf16(scaled, 3 if self.exact else 2)
            lines = jnp.concatenate(parts, axis=0).astype(jnp.bfloat16)
            tile = product(lines, codes[:, start : start + LANES], 0)
            size = tile.shape[0] // blocks
            total: Any = 0.0
            for u in range(blocks):
                own = _add_rows(tile[u * size : (u + 1) * size], rows) + whole[u]
                here = (lane >= u * self.block_size) & (lane < (u + 1) * self.block_size)
                total = total + jnp.where(here, own, 0.0)
            found.append(total)
        return jnp.concatenate(found, axis=1)


KeysReader: TypeAlias = DenseReader | PerTokenReader | PerChannelReader
ValuesReader: TypeAlias = DenseReader | PerTokenReader


def unpack(bits: int, axis: int, packed: Array) -> Array:
    """Unpack codes to bfloat16, the parts of the bytes one after another."""
    wide = packed.astype(jnp.int32)
    parts = [(wide >> i) & (2**bits - 1) for i in range(0, 8, bits)] if bits < 8 else [wide]
    parts = [part.astype(jnp.float32) for part in parts]
    return jnp.concatenate(parts, axis=axis).astype(jnp.bfloat16)


def from_float8(codes: Array) -> Array:
    """Convert e4m3 bits to bfloat16, by shifting the exponent to its place in float32.

    Subnormal numbers have no leading one: read with one, and the next exponent, they are larger by
    exactly that one.
    """
    wide = codes.astype(jnp.int32)
    rest = wide & 0x7F
    small = rest < 8
    bits = (rest << 20) + jnp.where(small, 121 << 23, 120 << 23)
    size = lax.bitcast_convert_type(bits, jnp.float32) - jnp.where(small, 2.0**-6, 0.0)
    return jnp.where(wide >= 0x80, -size, size).astype(jnp.bfloat16)


def reader_of(x: Pages, dtype: DTypeLike) -> tuple[KeysReader, list[Leaf]]:
    """Return the reader of keys or values for queries of a dtype, and their arrays."""
    exact = jnp.dtype(dtype) == jnp.float32
    if isinstance(x, TpuPages):
        return _tpu_pages_reader(x, dtype, exact)
    if isinstance(x, PerChannelCodes):
        share = Fraction(x.dim, x.block_size)
        leaves = [
            Leaf(x.codes, 3),
            Leaf(x.scales, 2, True, share),
            Leaf(x.zero_points, 2, True, share),
        ]
        return PerChannelReader(x.bits, x.dim, x.block_size, exact), leaves
    if isinstance(x, Float8Codes):
        codes = slots_last_leaf(x.codes)
        form = PerTokenReader(from_float8, codes.axis == 3, x.shape[-1], x.shape[-1], exact)
        return form, [codes, Leaf(x.scales, 2, True)]
    if isinstance(x, PerTokenCodes):
        codes = slots_last_leaf(x.codes)
        last = codes.axis == 3
        decode = functools.partial(unpack, x.bits, 0 if last else 1)
        form = PerTokenReader(decode, last, x.dim, x.group, exact)
        return form, [codes, _per_token(x.scales), _per_token(x.zero_points)]
    if isinstance(x, Encoded):
        raise UnsupportedError(f"no kernel for TPUs reads {type(x).__name__}")
    leaf = slots_last_leaf(x)
    return DenseReader(jnp.dtype(dtype), leaf.axis == 3), [leaf]


def values_reader_of(x: Pages, dtype: DTypeLike) -> tuple[ValuesReader, list[Leaf]]:
    """Return the reader of values, see `reader_of`.

    Raises:
        UnsupportedError: values with a scale per channel.
    """
    reader, leaves = reader_of(x, dtype)
    if isinstance(reader, PerChannelReader):
        raise UnsupportedError("no kernel for TPUs reads values with a scale per channel")
    return reader, leaves


def _tpu_pages_reader(
    x: TpuPages, dtype: DTypeLike, exact: bool
) -> tuple[ValuesReader, list[Leaf]]:
    lines, form = Leaf(x.lines, 2, share=Fraction(1, x.pack_factor)), x.form
    if isinstance(form, Float8Codes):
        read = PerTokenReader(from_float8, False, x.dim, x.dim, exact, x.pack_factor)
        return read, [lines, Leaf(x.scales, 2, whole=(False,))]
    if isinstance(form, PerTokenCodes):
        decode = functools.partial(unpack, form.bits, 1)
        read = PerTokenReader(
            decode, False, x.dim, form.group, exact, x.pack_factor, 8 // form.bits
        )
        groups = form.scales.shape[2]
        return read, [lines, Leaf(x.scales, 2, whole=(False,) * groups + (True,) * groups)]
    return DenseReader(jnp.dtype(dtype), False, x.pack_factor), [lines]


def leaf_shapes(x: Pages, dtype: DTypeLike) -> list[Leaf]:
    """Return an operand's leaves with shapes in place of arrays."""
    found: list[Leaf] = []

    def arrays(x: Pages) -> list[Array]:
        found.extend(reader_of(x, dtype)[1])
        return [leaf.array for leaf in found]

    shapes = jax.eval_shape(arrays, x)
    return [
        dataclasses.replace(leaf, array=array) for leaf, array in zip(found, shapes, strict=True)
    ]


def _per_token(x: Array) -> Leaf:
    """Return scales [B, K, groups, S] in the layout that they have in memory."""
    return Leaf(x[:, :, 0], 2, True) if x.shape[2] == 1 else Leaf(x, 3)


def refusal(name: str, x: Pages | jax.ShapeDtypeStruct, dtype: DTypeLike) -> str | None:
    """Return why an operand cannot be read, or None."""
    if isinstance(x, TpuPages):
        return refusal(name, x.form, dtype)
    if isinstance(x, PerChannelCodes):
        if name == "values":
            return "values with a scale per channel"
        if not MIN_BLOCK <= x.block_size <= LANES:
            return f"{name} in blocks of {x.block_size} tokens; {MIN_BLOCK} to {LANES}"
        return None
    if isinstance(x, PerTokenCodes):
        if x.dim * x.bits % 8:
            return f"{name} of {x.dim} channels in {x.bits} bits: no whole tiles"
        if x.scales.shape[2] > MOST_GROUPS:
            return f"{name} in {x.scales.shape[2]} groups of channels; up to {MOST_GROUPS}"
        return None
    if isinstance(x, Float8Codes):
        return None
    if isinstance(x, Encoded):
        return f"{name} in the form of {type(x).__name__}"
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{name} in {x.dtype}"
    if x.dtype != dtype:
        return f"{name} in {x.dtype} for queries in {dtype}"
    return None
