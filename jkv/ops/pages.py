"""The layout of pages in memory, and writes of whole pages in place."""

from __future__ import annotations

import math
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv._pytree import pytree, replace, static
from jkv.ops import dispatch
from jkv.ops.codecs import Codec, Encoded
from jkv.ops.codecs.affine import PerTokenCodes
from jkv.ops.codecs.floats import Float8Codes
from jkv.ops.tile import LANES
from jkv.ops.write import distinct, scatter

WORD = 4  # bytes: narrower numbers of a column share one

P = TypeVar("P")
Shapes: TypeAlias = jax.ShapeDtypeStruct | Encoded  # of pages: of an array, or of the leaves


@pytree
class TpuPages:
    """Pages ``[P, K, page, H]`` in a layout for TPUs: whole tiles, and a page is contiguous.

    Where the last axis of an array is no whole tile, XLA interleaves the pages: a page is then one
    number of each of many tiles. Here `pack_factor` tokens share a line, which is thereby full, and
    the scales of all heads of a page are a line.
    """

    lines: Array  # [P, K, page / pack_factor, pack_factor * C]: C numbers or bytes of each token
    scales: Array | None  # [P, L, K * page] bits, head after head; scales, then zero points
    plain: Any = static()  # structure, shapes and dtypes of `form`
    dim: int = static()
    pack_factor: int = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """``(P, K, page, H)``."""
        count, heads, rows, _ = self.lines.shape
        return count, heads, rows * self.pack_factor, self.dim

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the numbers, or of the codes."""
        return self.lines.dtype

    @property
    def form(self) -> Shapes:
        """The shapes of the same pages as an array or encoded."""
        structure, leaves = self.plain
        count = self.lines.shape[0]
        return jax.tree.unflatten(
            structure, [jax.ShapeDtypeStruct((count, *shape), dtype) for shape, dtype in leaves]
        )

    def gather(self, numbers: Int[Array, " N"]) -> Array | Encoded:
        """Gather pages as an array ``[N, K, page, H]`` or encoded."""
        lines, scales = jax.tree.map(lambda leaf: leaf[numbers], (self.lines, self.scales))
        count, heads, page, _ = lines.shape[0], *self.shape[1:]
        codes, *rest = jax.tree.leaves(self.form)
        leaves, at = [lines.reshape(count, heads, page, codes.shape[-1])], 0
        for leaf in rest:
            groups = math.prod(leaf.shape[2:]) // page
            own = scales[:, at : at + groups, : heads * page].reshape(count, groups, heads, page)
            own = jnp.swapaxes(own, 1, 2).reshape(count, *leaf.shape[1:])
            leaves.append(lax.bitcast_convert_type(own, leaf.dtype))
            at += groups
        return jax.tree.unflatten(jax.tree.structure(self.form), leaves)

    def to_layout(self, plain: Array | Encoded) -> TpuPages:
        """Lay out pages, an array or encoded, as these are."""
        codes, *rest = jax.tree.leaves(plain)
        count, heads, page, _ = codes.shape
        lines = codes.reshape(count, heads, *self.lines.shape[2:])
        if self.scales is None:
            return replace(self, lines=lines)
        rows = [leaf.reshape(count, heads, -1, page) for leaf in rest]
        rows = [lax.bitcast_convert_type(jnp.swapaxes(x, 1, 2), jnp.uint16) for x in rows]
        scales = jnp.concatenate(rows, axis=1).reshape(count, -1, heads * page)
        padding = [(0, n - m) for n, m in zip(self.scales.shape[1:], scales.shape[1:], strict=True)]
        return replace(self, lines=lines, scales=jnp.pad(scales, [(0, 0), *padding]))


Pages: TypeAlias = Array | Encoded | TpuPages


def _form(
    codec: Codec | None, count: int, heads: int, page: int, dim: int, dtype: DTypeLike
) -> Shapes:
    """Return the shapes of pages in a codec's form."""
    if codec is None:
        return jax.ShapeDtypeStruct((count, heads, page, dim), dtype)
    return jax.eval_shape(lambda: codec.empty(count, heads, page, dim, dtype))


def empty(
    codecs: tuple[Codec | None, Codec | None],
    count: int,
    heads: int,
    page: int,
    dim: int,
    dtype: DTypeLike,
) -> tuple[Pages, Pages]:
    """Return pages of zeros for keys and for values: `TpuPages` where those suit the platform.

    Args:
        codecs: of keys and of values; None for numbers as they are.
        count: P.
        heads: K.
        page: tokens of a page.
        dim: H.
        dtype: of the numbers.
    """
    keys, values = (_form(codec, count, heads, page, dim, dtype) for codec in codecs)
    if _wants_tpu_layout([keys, values], page):
        factor = _pack_factor([keys, values])
        return _tpu_zeros(keys, factor, dim), _tpu_zeros(values, factor, dim)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (keys, values))


def arrange(keys: Pages, values: Pages) -> tuple[Pages, Pages]:
    """Lay out pages of any process as `empty` does in this one."""
    plain = [from_layout(x) for x in (keys, values)]
    forms = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), x) for x in plain]
    if not _wants_tpu_layout(forms, plain[0].shape[2]):
        return plain[0], plain[1]
    factor, dim = _pack_factor(forms), keys.shape[3]
    k, v = (_tpu_zeros(f, factor, dim).to_layout(x) for f, x in zip(forms, plain, strict=True))
    return k, v


def _wants_tpu_layout(forms: list[Shapes], page: int) -> bool:
    return dispatch.tpu_kernels() and _has_tpu_layout(forms, page)


def _pack_factor(forms: list[Shapes]) -> int:
    """Return how many tokens fill whole tiles, of keys and of values."""
    widths = [jax.tree.leaves(form)[0].shape[-1] for form in forms]
    return math.lcm(*(LANES // math.gcd(width, LANES) for width in widths))


def _has_tpu_layout(forms: list[Shapes], page: int) -> bool:
    """Return whether pages can be laid out as `TpuPages`, and are better so."""
    factor = _pack_factor(forms)
    if page % LANES == 0 or page % factor:
        return False
    plain = all(isinstance(form, jax.ShapeDtypeStruct) for form in forms)
    known = all(
        isinstance(form, jax.ShapeDtypeStruct | PerTokenCodes | Float8Codes) for form in forms
    )
    # Smaller pages are too many for a step; the scales of a head are within a tile.
    fits = page >= 8 if plain else page >= 16 and LANES % page == 0
    least = min(jax.tree.leaves(form)[0].dtype.itemsize for form in forms) * (page // factor)
    return known and fits and least >= WORD and not (plain and factor == 1)


def _tpu_zeros(form: Shapes, factor: int, dim: int) -> TpuPages:
    codes, *rest = jax.tree.leaves(form)
    count, heads, page, width = codes.shape
    lines = jnp.zeros((count, heads, page // factor, factor * width), codes.dtype)
    scales = None
    if rest:
        # Of other numbers of lines XLA would interleave those of several pages.
        rows = sum(math.prod(leaf.shape[2:]) // page for leaf in rest)
        rows = max(2 ** math.ceil(math.log2(rows)), 2)
        scales = jnp.zeros((count, rows, -(-heads * page // LANES) * LANES), jnp.uint16)
    leaves = tuple((leaf.shape[1:], leaf.dtype.name) for leaf in (codes, *rest))
    return TpuPages(lines, scales, (jax.tree.structure(form), leaves), dim, factor)


def gather(pages: Pages, numbers: Int[Array, " N"]) -> Array | Encoded:
    """Gather pages as an array or encoded, whatever their layout."""
    if isinstance(pages, TpuPages):
        return pages.gather(numbers)
    return pages.take(numbers) if isinstance(pages, Encoded) else pages[numbers]


def from_layout(pages: Pages) -> Array | Encoded:
    """Return all pages as an array or encoded."""
    if not isinstance(pages, TpuPages):
        return pages
    return pages.gather(jnp.arange(pages.shape[0], dtype=jnp.int32))


def to_layout(pages: Pages, plain: Array | Encoded) -> Pages:
    """Lay out other pages, an array or encoded, as `pages` are."""
    return pages.to_layout(plain) if isinstance(pages, TpuPages) else plain


def write_tokens(
    pages: Pages,
    new: Float[Array, "B T K H"],
    at: Int[Array, "B U page"],
    source: Int[Array, "B U"],
    into: Int[Array, "B U"],
    *,
    copies: bool = True,
) -> Pages:
    """Write new tokens: each page begins as a copy of its source and is written as a whole.

    All sources are read before anything is written, so a page may be the source of several, and be
    written itself.

    Args:
        pages: an array, or encoded by a codec of single tokens, in any layout.
        new: tokens.
        at: which of them goes to each slot of a page, -1 where the source's token stays.
        source: numbers of pages.
        into: numbers of the pages that are written, distinct; -1 writes nothing.
        copies: whether a page may have another as its source.
    """
    if new.shape[1] > 1 or copies or isinstance(pages, Encoded | TpuPages):
        return _write_whole_pages(pages, new, at, source, into)

    def one_by_one(pages: Array, new: Array) -> Array:
        # XLA's CPU compiler would transpose the key of a token again for each slot of its page.
        slot = jnp.argmax(at[:, 0] >= 0, axis=1)
        return scatter(pages, (distinct(into[:, 0], len(pages)), slice(None), slot), new[:, 0])

    def whole(pages: Array, new: Array) -> Pages:
        return _write_whole_pages(pages, new, at, source, into)

    return lax.platform_dependent(pages, new, cpu=one_by_one, default=whole)


def _write_whole_pages(pages: Pages, new: Array, at: Array, source: Array, into: Array) -> Pages:
    page = at.shape[2]
    lines = at.reshape(-1, page)
    numbers = jnp.maximum(source, 0).reshape(-1)
    if new.shape[1] > 1:
        rows = jnp.maximum(at, 0).reshape(at.shape[0], -1)
        tokens = jnp.take_along_axis(new, rows[..., None, None], axis=1)
        tokens = tokens.reshape(-1, page, *new.shape[2:])
    else:
        tokens = new
    old = gather(pages, numbers)
    if isinstance(old, Encoded):
        slots = jnp.where(lines >= 0, jnp.arange(page, dtype=jnp.int32)[None], -1)
        slots = slots if new.shape[1] > 1 else jnp.max(slots, axis=1, keepdims=True)
        written: Array | Encoded = old.write_blocks(tokens, slots)
    else:
        tokens = jnp.swapaxes(tokens, 1, 2).astype(old.dtype)
        written = jnp.where((lines >= 0)[:, None, :, None], tokens, old)
    return write_pages(pages, to_layout(pages, written), into.reshape(-1))


def copy(pages: P, source: Int[Array, " N"], into: Int[Array, " N"]) -> P:
    """Copy pages ``source[n]`` to pages ``into[n]``, all read first; -1 copies nothing.

    Args:
        pages: an array ``[P, ...]``, or a pytree of them.
        source: numbers of pages.
        into: numbers of pages, distinct.
    """
    into = jnp.where(source < 0, -1, into)
    copied = jax.tree.map(lambda leaf: leaf[jnp.maximum(source, 0)], pages)
    return write_pages(pages, copied, into)


def write_pages(pages: P, written: P, into: Int[Array, " N"]) -> P:
    """Write pages of the same layout at places `into` of each array; -1 writes nothing.

    Args:
        pages: an array ``[P, ...]``, or a pytree of them.
        written: the same of N pages.
        into: their numbers, distinct.
    """
    if isinstance(pages, TpuPages):
        return lax.platform_dependent(
            pages, written, into, tpu=_write_by_kernel, default=_write_by_xla
        )
    return _write_by_xla(pages, written, into)


def _write_by_kernel(pages: TpuPages, written: TpuPages, into: Int[Array, " N"]) -> TpuPages:
    """Write pages by a kernel for TPUs."""
    from jkv.ops.mosaic_tpu import write  # Pallas takes a while to import

    def plain(pages: Array, new: Array, at: Array) -> Array:
        return _write_by_xla(pages, new, at)

    def one(leaf: Array, new: Array) -> Array:
        return dispatch.kernel(write.write_pages, plain, (leaf, new, into))

    return jax.tree.map(one, pages, written)


def _write_by_xla(pages: P, written: P, into: Int[Array, " N"]) -> P:
    def one(leaf: Array, new: Array) -> Array:
        return scatter(leaf, distinct(into, len(leaf)), new)

    return jax.tree.map(one, pages, written)
