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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jkv._axes import Array
from jkv.ops.codecs import Encoded
from jkv.ops.codecs.affine import PerChannelCodes, PerTokenCodes
from jkv.ops.codecs.floats import Float8Codes
from jkv.ops.pages import TpuPages
from jkv.ops.tile import LANES

LEAST_UNIT = 32  # tokens; of smaller units too many are in a tile
MOST_GROUPS = 8  # of a token's channels


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of an operand, ``[B, K, ...]`` or ``[P, K, ...]``."""

    array: Any
    axis: int  # of slots
    rows: bool = False  # [B, K, S]: the lines of all heads in one tile
    share: Fraction = Fraction(1)  # numbers along the axis for each slot
    whole: tuple[bool, ...] = ()  # `TpuPages.scales`: of its lines, which are whole numbers


def lies_last(channels: int) -> bool:
    """Whether the slots are the last axis in a TPU's memory."""
    return channels % LANES != 0


def slots_last(x: Any) -> Leaf:
    """An array [B, K, S, C] as it lies."""
    if lies_last(x.shape[-1]):
        return Leaf(jnp.swapaxes(x, -1, -2), 3)
    return Leaf(x, 2)


def product(a: Array, b: Array, contract: int, precision: Any = None) -> Array:
    """Rows of `a` with rows (contract=1) or columns (contract=0) of `b`, in float32."""
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def thirds(x: Array, count: int) -> list[Array]:
    """Float32 numbers as sums of `count` that bfloat16 holds: three are all of a number's 24 bits.

    Their products with codes, which are whole numbers below 256, are then exact, at the price of
    more rows and not of more passes over the codes. Bits are cut off, not rounded: a compiler may
    leave out a conversion to and fro.
    """
    found = []
    for _ in range(count - 1):
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
        found.append(lax.bitcast_convert_type(bits, jnp.float32))
        x = x - found[-1]
    return [*found, x]


def _used(seen: Array) -> Array:
    """Slots [1, S] that some query sees, as numbers above zero."""
    return jnp.max(seen.astype(jnp.float32), axis=0, keepdims=True)


def _wide(bits: Array) -> Array:
    """Numbers of 16-bit patterns of bfloat16; those that are numbers already."""
    if bits.dtype == jnp.float32:
        return bits
    return lax.bitcast_convert_type(bits.astype(jnp.int32) << 16, jnp.float32)


def _added(parts: Array, rows: int) -> Array:
    """The sum of groups of `rows` rows."""
    total = parts[:rows]
    for i in range(rows, parts.shape[0], rows):
        total = total + parts[i : i + rows]
    return total


def placed(q: Array, parts: int, pack_factor: int) -> Array:
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
class Dense:
    """Numbers as they are, ``[S, H]`` or, where slots lie last, ``[H, S]``."""

    dtype: Any
    last: bool
    pack_factor: int = 1  # tokens of a line
    parts: int = 1  # of a byte

    @property
    def _precision(self) -> Any:
        return lax.Precision.HIGHEST if self.dtype == jnp.float32 else None

    def queries(self, q: Array) -> Array:
        """Queries [B, K, R, H] as `products` takes them."""
        return placed(q, 1, self.pack_factor)

    def products(self, q: Array, leaves: list[Array], seen: Array | None = None) -> Array:
        """[R, S]; `seen` as for `sums`."""
        k = leaves[0]
        if self.pack_factor > 1 and seen is not None:
            k = self._cleaned(k, seen)  # of a line, others' numbers are multiplied with zero
        return _along(product(q, k, 0 if self.last else 1, self._precision), self.pack_factor)

    def sums(self, w: Array, leaves: list[Array], seen: Array | None) -> Array:
        """Sum values with weights [R, S] to [R, F * H]; `seen` is None where every slot is."""
        v = leaves[0] if seen is None else self._cleaned(leaves[0], seen)
        w = _below(w, self.pack_factor).astype(self.dtype)
        return _own(product(w, v, 1 if self.last else 0, self._precision), self.pack_factor, 1)

    def _cleaned(self, x: Array, seen: Array) -> Array:
        """With zero where no query looks: zero times NaN is NaN."""
        used = _used(seen)
        if not self.last:
            used = self._columns(used, x.shape)
        # Selects are of 32 bits on all TPUs.
        return jnp.where(used > 0, x.astype(jnp.float32), 0.0).astype(self.dtype)

    def _columns(self, row: Array, shape: tuple[int, ...]) -> Array:
        """A row of all slots [1, S] as it is for the tokens of each line."""
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
class Scaled:
    """Codes with a step, and perhaps a zero point, for each group of a token's channels."""

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
        """For each group, the queries' own channels, in parts: [B, K, groups * parts * R, H]."""
        parts = thirds(q.astype(jnp.float32), 3) if self.exact else [q]
        rows = [jnp.where(self._channels(g), x, 0) for g in range(self._groups) for x in parts]
        every = jnp.concatenate(rows, axis=2).astype(jnp.bfloat16)
        return placed(every, self.parts, self.pack_factor)

    def _affine(self, leaves: list[Array]) -> tuple[list[Array], list[Array] | None]:
        """Steps and zero points [1, S] of each group."""
        steps, *zeros = (
            [x[g : g + 1] for g in range(self._groups)]
            for x in (_wide(leaves[1]), *(x.astype(jnp.float32) for x in leaves[2:]))
        )
        return steps, zeros[0] if zeros else None

    def products(self, q: Array, leaves: list[Array], seen: Array | None = None) -> Array:
        """[R, S]; codes stand for numbers, whoever sees them."""
        del seen
        found = product(q, self.decode(leaves[0]), 0 if self.last else 1)
        found = _along(found, self.pack_factor)
        steps, zeros = self._affine(leaves)
        rows = q.shape[0] // (self._groups * self.pack_factor)
        alone = rows // (3 if self.exact else 1)
        total: Any = 0.0
        for g in range(self._groups):
            own = slice(g * rows, (g + 1) * rows)
            codes = _added(found[own], alone)
            if zeros is not None:
                whole = jnp.sum(q[own].astype(jnp.float32), axis=1, keepdims=True)
                codes = codes + _added(whole, alone) * zeros[g]
            total = total + codes * steps[g]
        return total

    def sums(self, w: Array, leaves: list[Array], seen: Array | None) -> Array:
        """Sum values with weights [R, S] to [R, F * H]; `seen` is None where every slot is."""
        steps, zeros = self._affine(leaves)
        if seen is not None:
            used = _used(seen) > 0
            steps = [jnp.where(used, x, 0.0) for x in steps]
        scaled = [w * x for x in steps]
        parts = [x for y in scaled for x in thirds(y, 3 if self.exact else 2)]
        rows = _below(jnp.concatenate(parts, axis=0).astype(jnp.bfloat16), self.pack_factor)
        found = product(rows, self.decode(leaves[0]), 1 if self.last else 0)
        found = _own(found, self.pack_factor, self.parts)
        size = found.shape[0] // self._groups
        total: Any = 0.0
        for g in range(self._groups):
            own = _added(found[g * size : (g + 1) * size], w.shape[0])
            if zeros is not None:
                low = jnp.sum(scaled[g] * zeros[g], axis=1, keepdims=True)
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
class PerChannel:
    """Keys as codes with a step and a zero point for each channel of a unit of tokens."""

    bits: int
    dim: int
    unit: int
    exact: bool  # queries in float32

    def queries(self, q: Array) -> Array:
        """In float32."""
        return q.astype(jnp.float32)

    def products(self, q: Array, leaves: list[Array], seen: Array | None = None) -> Array:
        """[R, S]: the units of a tile's lanes are rows of one product, each for its own lanes."""
        del seen
        codes = unpacked(self.bits, 0, leaves[0])
        steps, zeros = _wide(leaves[1]), leaves[2].astype(jnp.float32)
        units, rows = LANES // self.unit, q.shape[0]
        lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        found = []
        for start in range(0, codes.shape[1], LANES):
            parts, whole = [], []
            for u in range(start // self.unit, start // self.unit + units):
                own = slice(u * self.dim, (u + 1) * self.dim)
                scaled = q * steps[:, own]
                whole.append(jnp.sum(scaled * zeros[:, own], axis=1, keepdims=True))
                parts += thirds(scaled, 3 if self.exact else 2)
            lines = jnp.concatenate(parts, axis=0).astype(jnp.bfloat16)
            tile = product(lines, codes[:, start : start + LANES], 0)
            size = tile.shape[0] // units
            total: Any = 0.0
            for u in range(units):
                own = _added(tile[u * size : (u + 1) * size], rows) + whole[u]
                here = (lane >= u * self.unit) & (lane < (u + 1) * self.unit)
                total = total + jnp.where(here, own, 0.0)
            found.append(total)
        return jnp.concatenate(found, axis=1)


def unpacked(bits: int, axis: int, packed: Array) -> Array:
    """Codes in bfloat16, which holds them all; the parts of the bytes one after another."""
    wide = packed.astype(jnp.int32)
    parts = [(wide >> i) & (2**bits - 1) for i in range(0, 8, bits)] if bits < 8 else [wide]
    parts = [part.astype(jnp.float32) for part in parts]
    return jnp.concatenate(parts, axis=axis).astype(jnp.bfloat16)


def float8(codes: Array) -> Array:
    """Numbers of e4m3 bits, in bfloat16: the exponent moved to where float32 has it.

    The least numbers have no leading one: with one, and the exponent after the least, they are
    larger by exactly that one.
    """
    wide = codes.astype(jnp.int32)
    rest = wide & 0x7F
    small = rest < 8
    bits = (rest << 20) + jnp.where(small, 121 << 23, 120 << 23)
    size = lax.bitcast_convert_type(bits, jnp.float32) - jnp.where(small, 2.0**-6, 0.0)
    return jnp.where(wide >= 0x80, -size, size).astype(jnp.bfloat16)


def operand(x: Any, dtype: Any) -> tuple[Any, list[Leaf]]:
    """How an operand is read for queries of a dtype, and its arrays."""
    exact = jnp.dtype(dtype) == jnp.float32
    if isinstance(x, TpuPages):
        return _tiled(x, dtype, exact)
    if isinstance(x, PerChannelCodes):
        share = Fraction(x.dim, x.block_size)
        leaves = [
            Leaf(x.codes, 3),
            Leaf(x.scales, 2, True, share),
            Leaf(x.zero_points, 2, True, share),
        ]
        return PerChannel(x.bits, x.dim, x.block_size, exact), leaves
    if isinstance(x, Float8Codes):
        codes = slots_last(x.codes)
        form = Scaled(float8, codes.axis == 3, x.shape[-1], x.shape[-1], exact)
        return form, [codes, Leaf(x.scales, 2, True)]
    if isinstance(x, PerTokenCodes):
        codes = slots_last(x.codes)
        last = codes.axis == 3
        decode = functools.partial(unpacked, x.bits, 0 if last else 1)
        form = Scaled(decode, last, x.dim, x.group, exact)
        return form, [codes, _per_token(x.scales), _per_token(x.zero_points)]
    leaf = slots_last(x)
    return Dense(jnp.dtype(dtype), leaf.axis == 3), [leaf]


def _tiled(x: TpuPages, dtype: Any, exact: bool) -> tuple[Any, list[Leaf]]:
    lines, form = Leaf(x.lines, 2, share=Fraction(1, x.pack_factor)), x.form
    if isinstance(form, Float8Codes):
        read = Scaled(float8, False, x.dim, x.dim, exact, x.pack_factor)
        return read, [lines, Leaf(x.scales, 2, whole=(False,))]
    if isinstance(form, PerTokenCodes):
        decode = functools.partial(unpacked, form.bits, 1)
        read = Scaled(decode, False, x.dim, form.group, exact, x.pack_factor, 8 // form.bits)
        groups = form.scales.shape[2]
        return read, [lines, Leaf(x.scales, 2, whole=(False,) * groups + (True,) * groups)]
    return Dense(jnp.dtype(dtype), False, x.pack_factor), [lines]


def outline(x: Any, dtype: Any) -> list[Leaf]:
    """The shapes of an operand's arrays."""
    found: list[Leaf] = []

    def arrays(x: Any) -> list[Array]:
        found.extend(operand(x, dtype)[1])
        return [leaf.array for leaf in found]

    shapes = jax.eval_shape(arrays, x)
    return [
        dataclasses.replace(leaf, array=array) for leaf, array in zip(found, shapes, strict=True)
    ]


def _per_token(x: Any) -> Leaf:
    """Steps [B, K, groups, S] as they lie."""
    return Leaf(x[:, :, 0], 2, True) if x.shape[2] == 1 else Leaf(x, 3)


def refusal(name: str, x: Any, dtype: Any) -> str | None:
    """Why an operand cannot be read, if so."""
    if isinstance(x, TpuPages):
        return refusal(name, x.form, dtype)
    if isinstance(x, PerChannelCodes):
        if name == "values":
            return "values with a step for each channel"
        if not LEAST_UNIT <= x.block_size <= LANES:
            return f"{name} in units of {x.block_size} tokens; {LEAST_UNIT} to {LANES}"
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
