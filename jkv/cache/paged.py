"""Pages that rows share: a pool per layer, and one block table for all layers of a group."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jkv import ops
from jkv._axes import Array
from jkv._checks import check_flag, check_integer
from jkv._pytree import pytree, replace, static
from jkv._text import brief
from jkv.cache.base import Cache
from jkv.cache.block_table import (
    BlockTables,
    PooledLayer,
    check_whole,
    columns,
    pages_of_row,
    tables_of,
)
from jkv.cache.form import COUNT, Form, one_of
from jkv.cache.page_allocation import PageWrites, PoolSpec
from jkv.cache.protocol import (
    CacheKind,
    LayerCache,
    Shape,
    Step,
    as_kind,
    check_heads,
    shard_heads,
    window_of,
)
from jkv.cache.quantized import QuantizedKind, fp8
from jkv.cache.shared_state import SharedState
from jkv.errors import UnsupportedError
from jkv.ops.attention.reference import gather_slots
from jkv.ops.codecs import Affine, Codec, Encoded
from jkv.ops.masks import AttentionSpec
from jkv.ops.order import depend_on
from jkv.ops.pages import (
    Pages,
    TpuPages,
    arrange,
    copy,
    empty,
    from_layout,
    to_layout,
    write_tokens,
)


@pytree
class Paged(PooledLayer):
    """A layer's keys and values in pages; the cache's block table says which row has which.

    Pages have no axis of rows: every operation on rows changes the block table alone. A page in a
    codec's form holds tokens that are encoded one by one, so that each is rounded once, however
    often the page is copied. New tokens see each other before they are rounded.

    Example:
        >>> layer = jkv.paged(4).init(batch=2, slots=8, kv_heads=1, head_dim=4, dtype="float32")
        >>> layer.k_pages.shape  # [P, K, page, H]
        (4, 1, 4, 4)
    """

    k_pages: Any  # [P, K, page, H], or Encoded, or on a TPU TpuPages
    v_pages: Any  # [P, K, page, H], or Encoded, or on a TPU TpuPages
    nonfinite: Array | None  # [P] bool, encoded pages that were given NaN or infinity
    dtype: str = static()
    window: int | None = static(default=None)  # of the model, in this layer
    managed: bool = static(default=False)
    elastic: bool = static(default=True)
    group: int = static(default=0)  # whose table it is

    @property
    def pool(self) -> PoolSpec:
        """What the layers of a group have in common."""
        count, _, page, _ = self.k_pages.shape
        return PoolSpec(page, count, self.window, self.managed, self.elastic)

    @property
    def table_index(self) -> int:
        """Which of the cache's block tables is its group's."""
        return self.group

    def with_table_index(self, index: int) -> Paged:
        """Return the layer as one of a group."""
        return replace(self, group=index)

    @property
    def shares(self) -> type[BlockTables]:
        """The block tables."""
        return BlockTables

    @property
    def capacity(self) -> None:
        """None: the block tables have one."""
        return None

    def invalid_rows(self, shared: tuple[SharedState, ...]) -> Bool[Array, " B"] | None:
        """Return the rows of which a page was given NaN or infinity."""
        if self.nonfinite is None:
            return None
        table = tables_of(shared)[self.group]
        return jnp.any((table >= 0) & self.nonfinite[jnp.maximum(table, 0)], axis=1)

    def partition_spec(self, axis: str) -> Paged:
        """See `LayerCache.partition_spec`.

        Raises:
            UnsupportedError: pages of a TPU, whose scales of all heads lie together.
        """
        if self.rounds and isinstance(self.k_pages, TpuPages):
            raise UnsupportedError(
                "these pages lie as one TPU wants them, the scales of all heads together; give the "
                "sharded model a cache whose layers are layer.portable() of these"
            )
        return shard_heads(self, axis, whole=("nonfinite",))

    @property
    def rounds(self) -> bool:
        """Whether the pages are in a codec's form."""
        return self.nonfinite is not None

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        step: Step,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "B T N H"], Paged]:
        """Attend to the pages, and to the new tokens before they are rounded.

        Raises:
            ValueError: keys of other heads than the cache was made for.
            UnsupportedError: a step without pages: a layer alone has no table.
        """
        writes, one, at = self._writes(step), q.shape[1] == 1, step.positions
        if one or self.window is None:
            # Written first, nothing is ever copied. One token sees no page that leaves its window.
            stored = self.append(k, v, step)
            if one and not self.rounds:
                part = ops.attention(q, stored._kv(writes.table, step.stop), at, spec)
            else:
                # A chunk among itself is one product, and not one for each block of pages.
                past = stored._kv(writes.table, step.start)
                part = ops.attention_with_chunk(q, k, v, at, spec, past)
            return part.out.astype(q.dtype), stored
        past = self._kv(writes.before, step.start)
        out = ops.attention_with_chunk(q, k, v, at, spec, past).out
        # The pages that leave the window with these tokens may be written by others.
        return out.astype(q.dtype), self._append(k, v, writes, depend_on(writes.into, out))

    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], step: Step) -> Paged:
        """Write each new token to the page that the step names for it.

        Raises:
            ValueError: keys of other heads than the cache was made for.
            UnsupportedError: a step without pages.
        """
        writes = self._writes(step)
        return self._append(k, v, writes, writes.into)

    def _writes(self, step: Step) -> PageWrites:
        if not step.pages:
            raise UnsupportedError(
                "a layer of pages has no table of its own: expected a step of the cache that it "
                "belongs to; call the cache's begin, as a model does"
            )
        return step.pages[self.group]

    def _append(self, k: Array, v: Array, writes: PageWrites, into: Array) -> Paged:
        check_heads(self.k_pages.shape, k)
        put = functools.partial(
            write_tokens, at=writes.at, source=writes.source, into=into, copies=not self.managed
        )
        nonfinite = self.nonfinite
        if nonfinite is not None:
            # By single numbers, of which there are few: one for each page that is written.
            fine = jnp.all(jnp.isfinite(k) & jnp.isfinite(v), axis=(2, 3))
            rows = jnp.arange(len(fine), dtype=jnp.int32)[:, None, None]
            new = jnp.any(~fine[rows, jnp.maximum(writes.at, 0)] & (writes.at >= 0), axis=2)
            begun = writes.at[:, :, 0] < 0  # the source's tokens come first
            bad = new | (begun & nonfinite[jnp.maximum(writes.source, 0)])
            at = jnp.where(into < 0, len(nonfinite), into)
            nonfinite = nonfinite.at[at].set(bad, mode="drop")
        return replace(
            self, k_pages=put(self.k_pages, k), v_pages=put(self.v_pages, v), nonfinite=nonfinite
        )

    def _kv(self, table: Int[Array, "B M"], lengths: Int[Array, " B"]) -> ops.PagedKV:
        return ops.PagedKV(self.k_pages, self.v_pages, table, lengths)

    def take(self, rows: Int[Array, " R"]) -> Paged:
        """Return itself: rows are in the block table."""
        del rows
        return self

    def resize(self, slots: int) -> Paged:
        """Return itself: the block table grows, and gives its layers more pages."""
        del slots
        return self

    def crop(self, held: Int[Array, " B"], lengths: Int[Array, " B"]) -> Paged:
        """Return itself: the block table gives up pages."""
        del held, lengths
        return self

    def concat(self, others: Sequence[Paged]) -> Paged:
        """Concatenate along the axis of pages."""
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), self, *others)

    def to_legacy(self, lengths: Int[Array, " B"]) -> NoReturn:
        """Refuse: a layer of pages has no table of its own.

        Raises:
            UnsupportedError: always.
        """
        del lengths
        raise UnsupportedError(
            "a layer of pages has no table of its own; call to_legacy of the cache"
        )

    def to_legacy_shared(
        self, lengths: Int[Array, " B"], shared: tuple[SharedState, ...]
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Return keys and values of the rows of the block table, in order.

        Raises:
            UnsupportedError: a page has left a window.
        """
        table = tables_of(shared)[self.group]
        check_whole(self.pool, table, lengths)
        keys, values = (
            gather_slots(x, table).astype(self.dtype) for x in (self.k_pages, self.v_pages)
        )
        return keys, values

    def requantise(self, to: CacheKind, lengths: Int[Array, " B"]) -> Paged:
        """Convert all pages to another codec's form; exact ones stay as they are.

        Raises:
            TypeError: no kind of pages that rounds.
            ValueError: pages of another size.
        """
        del lengths
        if not self.rounds:
            return self
        if not isinstance(to, PagedKind) or to.keys is None or to.values is None:
            raise TypeError(
                f"requantise got {brief(to)} for pages; expected a kind of pages that rounds, such "
                "as jkv.paged(bits=4)"
            )
        count, heads, page, dim = self.k_pages.shape
        if to.page != page:
            raise ValueError(
                f"requantise got pages of {to.page} tokens for pages of {page}; expected the same"
            )
        each = jnp.broadcast_to(jnp.arange(page, dtype=jnp.int32)[None], (count, page))

        made = empty((to.keys, to.values), count, heads, page, dim, self.dtype)

        def again(old: Pages, codec: Codec, new: Pages) -> Pages:
            plain = codec.empty(count, heads, page, dim, self.dtype)
            held = from_layout(old)
            decoded = held.decode() if isinstance(held, Encoded) else held
            return to_layout(new, plain.write_blocks(jnp.swapaxes(decoded, 1, 2), each))

        return replace(
            self,
            k_pages=again(self.k_pages, to.keys, made[0]),
            v_pages=again(self.v_pages, to.values, made[1]),
        )

    def portable(self) -> Paged:
        """Return the same pages in a form that all platforms and meshes have."""
        return replace(self, k_pages=from_layout(self.k_pages), v_pages=from_layout(self.v_pages))

    def native(self) -> Paged:
        """Return the same pages in the layout that `init` gives pages in this process."""
        keys, values = arrange(self.k_pages, self.v_pages)
        return replace(self, k_pages=keys, v_pages=values)


@dataclasses.dataclass(frozen=True)
class PagedKind(CacheKind):
    """See `paged`."""

    page: int = 16
    pages: int | None = None
    keys: Codec | None = None  # None for the model's dtype
    values: Codec | None = None
    managed: bool = False
    window: int | None = None  # of the layer, once bound to it

    def bind(self, config: Shape, layer: int) -> PagedKind:
        """Return the kind for one layer: pages outside of its own window are freed."""
        return dataclasses.replace(self, window=window_of(config, layer))

    def init(self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> Paged:
        """Make an empty layer: free pages of zeros."""
        width = columns(self.page, slots)
        needed = batch * pages_of_row(PoolSpec(self.page, 0, self.window), width)
        count = needed if self.pages is None else self.pages
        if self.window is not None and not self.managed:
            count = min(count, needed)  # more are never used

        codecs = (self.keys, self.values)
        k_pages, v_pages = empty(codecs, count, kv_heads, self.page, head_dim, dtype)
        return Paged(
            k_pages=k_pages,
            v_pages=v_pages,
            nonfinite=None if self.keys is None else jnp.zeros((count,), bool),
            dtype=jnp.dtype(dtype).name,
            window=self.window,
            managed=self.managed,
            elastic=self.pages is None and not self.managed,
        )


def paged(
    page: int = 16,
    bits: int | None = None,
    *,
    pages: int | None = None,
    codec: CacheKind | Codec | str | None = None,
    managed: bool = False,
) -> PagedKind:
    """Keep every token, in pages that rows share and copy on write.

    Source: Kwon et al. 2023, arXiv:2309.06180. A row allocates a page when its next token needs
    one. Forks share pages, and a row gets a copy of a shared page when it writes to it. Cropping
    or dropping rows frees pages; layers with a window of the model's own free those that have left
    it.

    A row for which no page is free takes none of its tokens and raises its flag, like a full one.
    With ``pages=None`` there are always enough for the rows that the cache was made for; after
    `fork`, which makes more rows and no pages, `resize` makes enough for all again.

    Args:
        page: tokens of a page.
        bits: 8, 4 or 2, to round keys and values; in the model's dtype by default.
        pages: in each layer; by default as many as all rows need when they are full.
        codec: another form of the tokens, such as `jkv.fp8()`: a kind that rounds them one by one
            and keeps none exact, or a codec of `jkv.ops.codecs`.
        managed: allocate and free no pages. The caller supplies block tables, the only entry of
            ``cache.shared``: `jkv.cache.BlockTables` with ``[B, M]`` for each group of layers that
            see as far, -1 for no page. Every page that a pass writes to must be listed and
            exclusively owned. Tables, lengths and flags may be of other rows in each pass, and of
            any number of them.

    Raises:
        TypeError: a codec that is none.
        ValueError: numbers below 1, bits that there is no codec for, both bits and a codec, or one
            that encodes several tokens together.

    Example:
        >>> cache = jkv.init_cache(lm.config, jkv.paged(16), batch=1, slots=32)
        >>> forked = cache.fork(4)  # four rows, which share pages until they write to them
        >>> forked.batch
        4
    """
    page = check_integer("page", page, 1, of="paged")
    pages = None if pages is None else check_integer("pages", pages, 1, of="paged")
    managed = check_flag("managed", managed, of="paged")
    if bits is not None and codec is not None:
        raise ValueError(
            f"paged got bits={brief(bits)} and codec={brief(codec)}; expected one of them"
        )
    if bits is not None:
        # One step per token where that is fine enough: the kernel for GPUs has no more.
        codec = Affine(bits=bits, axis="token", group=None if bits >= 4 else 64)
    keys, values = _codecs(codec)
    return PagedKind(page, pages, keys, values, managed)


def _codecs(given: CacheKind | Codec | str | None) -> tuple[Codec | None, Codec | None]:
    """Return the codecs of keys and of values."""
    if given is None:
        return None, None
    codec = as_kind(given)
    if isinstance(codec, QuantizedKind):
        kind = codec
    else:
        if isinstance(codec, type) or not isinstance(codec, Codec):
            raise TypeError(
                f"paged got codec={brief(codec)}; expected a kind that rounds, such as jkv.fp8(), "
                "or a codec"
            )
        kind = QuantizedKind(keys=codec, values=codec)
    if kind.recent or kind.keys.block_size > 1 or kind.values.block_size > 1:
        together = max(kind.keys.block_size, kind.values.block_size)
        raise ValueError(
            f"paged got codec={brief(codec)}, which encodes {together} tokens together and keeps "
            f"{kind.recent} exact; expected one for single tokens, of all of them. Use "
            "paged(bits=4), or jkv.quantized(bits=4, key_axis='token', residual=0)"
        )
    return kind.keys, kind.values


@functools.partial(jax.jit, static_argnames="group", donate_argnums=0)
def copy_pages(
    cache: Cache, source: Int[Array, " N"], into: Int[Array, " N"], group: int = 0
) -> Cache:
    """Copy pages ``source[n]`` to ``into[n]`` in all layers of a group; the cache is donated.

    For callers that manage the pages: block tables stay as they are.

    Args:
        cache: whose pages.
        source: their numbers, -1 for none, of which any are read before any are written.
        into: numbers of the copies, distinct.
        group: of layers.

    Example:
        >>> kind = jkv.paged(4, pages=8, managed=True)
        >>> cache = jkv.init_cache(lm.config, kind, batch=1, slots=16)
        >>> cache = jkv.cache.copy_pages(cache, np.array([0, 1]), np.array([6, 7]))
    """

    def copied(layer: LayerCache) -> LayerCache:
        if not isinstance(layer, Paged) or layer.group != group:
            return layer
        return copy(layer, source, into)

    return replace(cache, layers=tuple(map(copied, cache.layers)))


def _in_pages(codec: str | None = None, **more: Any) -> CacheKind:
    bits = {"int8": 8, "int4": 4, "int2": 2}.get(codec or "")
    return paged(bits=bits, codec=fp8() if codec == "fp8" else None, **more)


FORMS = {
    "paged": Form(
        _in_pages,
        "every token, in pages of N that rows share and copy on write; rounded, if wanted",
        examples=("", ":16,int8"),
        arguments={
            "page": COUNT,
            "codec": one_of(int8="int8", int4="int4", int2="int2", fp8="fp8"),
            "pages": COUNT,
        },
        bare=2,
    ),
}
