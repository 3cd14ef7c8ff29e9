"""Pages as they lie in memory, and whole pages into their places, in place."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv._pytree import pytree, replace, static
from jkv.ops import dispatch
from jkv.ops.codecs import Encoded
from jkv.ops.codecs.affine import PerTokenCodes
from jkv.ops.codecs.floats import Float8Codes
from jkv.ops.tile import LANES
from jkv.ops.write import distinct, scatter

WORD = 4  # bytes: numbers of a column that are narrower share one


@pytree
class Tiled:
    """Pages ``[P, K, page, H]`` in lines that a TPU lays as they are indexed, none of it padding.

    Of arrays whose last axis is no whole tile XLA lays the pages side by side, and a page is then
    one number of each of many tiles. Here tokens are beside each other until a line is full, and
    the scales of all heads of a page are a line.
    """

    lines: Array  # [P, K, page / beside, beside * C]: C numbers, or bytes of codes, of each token
    scales: Array | None  # [P, L, K * page] bits, heads after another; steps, then zero points
    plain: Any = static()  # of a page as an array or encoded: its structure, its leaves' shapes
    dim: int = static()
    beside: int = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """``(P, K, page, H)``."""
        count, heads, rows, _ = self.lines.shape
        return count, heads, rows * self.beside, self.dim

    @property
    def dtype(self) -> Any:
        """Of the numbers, or of the codes."""
        return self.lines.dtype

    @property
    def form(self) -> Any:
        """Shapes of the same pages, as an array or encoded."""
        structure, leaves = self.plain
        count = self.lines.shape[0]
        return jax.tree.unflatten(
            structure, [jax.ShapeDtypeStruct((count, *shape), dtype) for shape, dtype in leaves]
        )

    def take(self, numbers: Int[Array, " N"]) -> Any:
        """Some pages, as an array ``[N, K, page, H]`` or encoded."""
        lines, scales = jax.tree.map(lambda leaf: leaf[numbers], (self.lines, self.scales))
        count, heads, page, _ = lines.shape[0], *self.shape[1:]
        codes, *rest = jax.tree.leaves(self.form)
        found, at = [lines.reshape(count, heads, page, codes.shape[-1])], 0
        for leaf in rest:
            groups = math.prod(leaf.shape[2:]) // page
            own = scales[:, at : at + groups, : heads * page].reshape(count, groups, heads, page)
            own = jnp.swapaxes(own, 1, 2).reshape(count, *leaf.shape[1:])
            found.append(lax.bitcast_convert_type(own, leaf.dtype))
            at += groups
        return jax.tree.unflatten(jax.tree.structure(self.form), found)

    def of(self, plain: Any) -> Tiled:
        """Pages as `take` gives them, laid as these are."""
        codes, *rest = jax.tree.leaves(plain)
        count, heads, page, _ = codes.shape
        lines = codes.reshape(count, heads, *self.lines.shape[2:])
        if self.scales is None:
            return replace(self, lines=lines)
        rows = [leaf.reshape(count, heads, -1, page) for leaf in rest]
        rows = [lax.bitcast_convert_type(jnp.swapaxes(x, 1, 2), jnp.uint16) for x in rows]
        found = jnp.concatenate(rows, axis=1).reshape(count, -1, heads * page)
        room = [(0, n - m) for n, m in zip(self.scales.shape[1:], found.shape[1:], strict=True)]
        return replace(self, lines=lines, scales=jnp.pad(found, [(0, 0), *room]))


def _form(codec: Any, count: int, heads: int, page: int, dim: int, dtype: Any) -> Any:
    """Shapes of pages in a codec's form."""
    if codec is None:
        return jax.ShapeDtypeStruct((count, heads, page, dim), dtype)
    return jax.eval_shape(lambda: codec.empty(count, heads, page, dim, dtype))


def empty(
    codecs: tuple[Any, Any], count: int, heads: int, page: int, dim: int, dtype: Any
) -> tuple[Any, Any]:
    """Pages of zeros for keys and for values; `Tiled` where a TPU is compiled for and wants that.

    Args:
        codecs: of both; None for numbers as they are.
        count: P.
        heads: K.
        page: tokens of a page.
        dim: H.
        dtype: of the numbers.
    """
    sizes = (count, heads, page, dim, dtype)
    forms = [_form(codec, *sizes) for codec in codecs]
    if not _wanted(forms, page):
        return tuple(  # pyright: ignore[reportReturnType]
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), form) for form in forms
        )
    beside = _beside(forms)
    return tuple(_tiles(form, beside, dim) for form in forms)  # pyright: ignore[reportReturnType]


def arranged(keys: Any, values: Any) -> tuple[Any, Any]:
    """Pages of any process, as `empty` lays them here."""
    plain = [untiled(x) for x in (keys, values)]
    forms = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), x) for x in plain]
    if _wanted(forms, plain[0].shape[2]):
        beside = _beside(forms)
        tiles = [_tiles(form, beside, keys.shape[3]) for form in forms]
        plain = [tile.of(x) for tile, x in zip(tiles, plain, strict=True)]
    return plain[0], plain[1]


def _wanted(forms: list[Any], page: int) -> bool:
    return "tpu" in dispatch.platforms() and _fits(forms, page)


def _beside(forms: list[Any]) -> int:
    """Tokens that fill a line's tiles, of keys and of values."""
    widths = [jax.tree.leaves(form)[0].shape[-1] for form in forms]
    return math.lcm(*(LANES // math.gcd(width, LANES) for width in widths))


def _fits(forms: list[Any], page: int) -> bool:
    """Whether pages are better laid as tiles, and can be."""
    beside = _beside(forms)
    if page % LANES == 0 or page % beside:
        return False
    plain = all(isinstance(form, jax.ShapeDtypeStruct) for form in forms)
    known = all(
        isinstance(form, jax.ShapeDtypeStruct | PerTokenCodes | Float8Codes) for form in forms
    )
    # Fewer tokens are too many pages for a step; scales of a head lie within a tile.
    fits = page >= 8 if plain else page >= 16 and LANES % page == 0
    least = min(jax.tree.leaves(form)[0].dtype.itemsize for form in forms) * (page // beside)
    return known and fits and least >= WORD and not (plain and beside == 1)


def _tiles(form: Any, beside: int, dim: int) -> Tiled:
    codes, *rest = jax.tree.leaves(form)
    count, heads, page, width = codes.shape
    lines = jnp.zeros((count, heads, page // beside, beside * width), codes.dtype)
    scales = None
    if rest:
        # Of other numbers of lines XLA lays those of several pages together.
        rows = sum(math.prod(leaf.shape[2:]) // page for leaf in rest)
        rows = max(2 ** math.ceil(math.log2(rows)), 2)
        scales = jnp.zeros((count, rows, -(-heads * page // LANES) * LANES), jnp.uint16)
    leaves = tuple((leaf.shape[1:], leaf.dtype.name) for leaf in (codes, *rest))
    return Tiled(lines, scales, (jax.tree.structure(form), leaves), dim, beside)


def taken(pages: Any, numbers: Int[Array, " N"]) -> Any:
    """Some pages, as an array or encoded, however all of them lie."""
    return pages.take(numbers) if isinstance(pages, Encoded | Tiled) else pages[numbers]


def untiled(pages: Any) -> Any:
    """All pages, as an array or encoded."""
    if not isinstance(pages, Tiled):
        return pages
    return pages.take(jnp.arange(pages.shape[0], dtype=jnp.int32))


def laid(pages: Any, plain: Any) -> Any:
    """Other pages, as `taken` gives them, laid as `pages` are."""
    return pages.of(plain) if isinstance(pages, Tiled) else plain


def write_tokens(
    pages: Float[Array, "P K page H"] | Encoded | Tiled,
    new: Float[Array, "B T K H"],
    at: Int[Array, "B U page"],
    source: Int[Array, "B U"],
    into: Int[Array, "B U"],
    *,
    copies: bool = True,
) -> Any:
    """Put new tokens into pages: each page begins as its source, and is written as a whole.

    All sources are read before anything is written, so that a page may be the source of several,
    and be written itself.

    Args:
        pages: what is there, an array or in a codec's form of single tokens, however it lies.
        new: tokens.
        at: which of them goes to each slot of a page, -1 where the source's token stays.
        source: numbers of pages.
        into: numbers of the pages that are written, distinct; -1 writes nothing.
        copies: whether a page may have another as its source.
    """
    if new.shape[1] > 1 or copies or isinstance(pages, Encoded | Tiled):
        return _write_pages(pages, new, at, source, into)

    def one_by_one(pages: Array, new: Array) -> Array:
        # XLA's CPU compiler turns the key of a token anew for each slot of its page.
        slot = jnp.argmax(at[:, 0] >= 0, axis=1)
        return scatter(pages, (distinct(into[:, 0], len(pages)), slice(None), slot), new[:, 0])

    def whole(pages: Array, new: Array) -> Array:
        return _write_pages(pages, new, at, source, into)

    return lax.platform_dependent(pages, new, cpu=one_by_one, default=whole)


def _write_pages(pages: Any, new: Array, at: Array, source: Array, into: Array) -> Any:
    page = at.shape[2]
    lines = at.reshape(-1, page)
    numbers = jnp.maximum(source, 0).reshape(-1)
    if new.shape[1] > 1:
        rows = jnp.maximum(at, 0).reshape(at.shape[0], -1)
        tokens = jnp.take_along_axis(new, rows[..., None, None], axis=1)
        tokens = tokens.reshape(-1, page, *new.shape[2:])
    else:
        tokens = new
    old = taken(pages, numbers)
    if isinstance(old, Encoded):
        slots = jnp.where(lines >= 0, jnp.arange(page, dtype=jnp.int32)[None], -1)
        slots = slots if new.shape[1] > 1 else jnp.max(slots, axis=1, keepdims=True)
        written: Any = old.write_blocks(tokens, slots)
    else:
        tokens = jnp.swapaxes(tokens, 1, 2).astype(old.dtype)
        written = jnp.where((lines >= 0)[:, None, :, None], tokens, old)
    return put(pages, laid(pages, written), into.reshape(-1))


def copy(pages: Any, source: Int[Array, " N"], into: Int[Array, " N"]) -> Any:
    """Pages ``into[n]`` as copies of pages ``source[n]``, all read first; -1 copies nothing.

    Args:
        pages: an array ``[P, ...]``, or a pytree of them.
        source: numbers of pages.
        into: numbers of pages, distinct.
    """
    into = jnp.where(source < 0, -1, into)
    found = jax.tree.map(lambda leaf: leaf[jnp.maximum(source, 0)], pages)
    return put(pages, found, into)


def put(pages: Any, written: Any, into: Int[Array, " N"]) -> Any:
    """Each array of `pages` with pages `into` as in `written`, which lies like them; -1 is none.

    Args:
        pages: an array ``[P, ...]``, or a pytree of them.
        written: the same of N pages.
        into: their numbers, distinct.
    """
    if isinstance(pages, Tiled):
        return lax.platform_dependent(pages, written, into, tpu=_sent, default=_scattered)
    return _scattered(pages, written, into)


def _sent(pages: Tiled, written: Tiled, into: Int[Array, " N"]) -> Tiled:
    """By a kernel for TPUs."""
    from jkv.ops.mosaic_tpu.write import write_pages  # its language takes a while to import

    def plain(pages: Array, new: Array, at: Array) -> Array:
        return _scattered(pages, new, at)

    def one(leaf: Array, new: Array) -> Array:
        return dispatch.kernel(write_pages, plain, (leaf, new, into))

    return jax.tree.map(one, pages, written)


def _scattered(pages: Any, written: Any, into: Int[Array, " N"]) -> Any:
    def one(leaf: Array, new: Array) -> Array:
        return scatter(leaf, distinct(into, len(leaf)), new)

    return jax.tree.map(one, pages, written)
