"""Prefixes of rows in a store: looked up before a generation, and put there after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jkv._axes import Array
from jkv._checks import check_text
from jkv._text import brief, plural
from jkv._transfer import transfers
from jkv.cache.base import Cache
from jkv.cache.concat import concat
from jkv.cache.fingerprint import fingerprint
from jkv.cache.protocol import CacheKind
from jkv.decoding import programs
from jkv.decoding.arguments import DecoderLike
from jkv.errors import CorruptError, UnsupportedError
from jkv.models.config import Config
from jkv.store.entry import Entry, check_store, reject
from jkv.store.schema import seconds_of

if TYPE_CHECKING:
    from jkv.store import Store

TOKENS = "tokens"  # the array of an entry that says what it is the cache of


@dataclasses.dataclass(frozen=True)
class PrefixHit:
    """The prefix of a row that a store has.

    Attributes:
        cache: of one row, None for nothing.
        length: its tokens.
        seconds: that it took to make.
    """

    cache: Cache | None = None
    length: int = 0
    seconds: float = 0.0


NOTHING = PrefixHit()


class PrefixStore:
    """The entries of a store that one model can go on from, with one kind of cache.

    Args:
        store: a `jkv.store.Store`.
        model: a decoder.
        kind: of cache.
        tenant: whose.

    Raises:
        TypeError: no store.
    """

    def __init__(self, store: Store, model: DecoderLike, kind: CacheKind, tenant: str = ""):
        check_store(store, ("open", "open_many", "longest_prefix_many", "put_many", "remove"))
        from jkv.store.packing import check_kind

        check_kind(kind)
        self.store, self.tenant = store, check_text("tenant", tenant)
        self._model, self._config, self.kind = model, model.config, kind
        self.renew()

    def renew(self) -> None:
        """Use the weights that the model has now."""
        self.fingerprint = fingerprint(self._model, self.kind)

    @transfers
    def find(self, keys: Sequence[str | None], rows: Sequence[np.ndarray]) -> list[PrefixHit]:
        """Look up the longest stored prefix of each row, all at once.

        Less than all of it: the last token is left to be computed, whose logits are wanted.

        Args:
            keys: of sequences, which are looked for first; None for any that begins so.
            rows: of tokens, each ``[T]``.
        """
        owner: dict[str, Any] = {"tenant": self.tenant, "fingerprint": self.fingerprint}
        found = [NOTHING] * len(rows)
        keyed = [(i, key) for i, key in enumerate(keys) if key is not None]
        handles = self.store.open_many([key for _, key in keyed], **owner) if keyed else []
        for (i, key), handle in zip(keyed, handles, strict=True):
            if handle is not None:
                with handle:
                    found[i] = self._crop(key, handle.entry, rows[i])
        rest = [i for i, row in enumerate(rows) if found[i].length < len(row) - 1]
        limits = [len(rows[i]) - 1 for i in rest]
        asked = [rows[i] for i in rest]
        matches = self.store.longest_prefix_many(asked, limits=limits, **owner) if rest else []
        for i, match in zip(rest, matches, strict=True):
            if match is not None:
                with match:
                    if match.length > found[i].length:
                        found[i] = self._crop(match.key, match.entry, rows[i])
        return found

    def _crop(self, key: str, entry: Entry, tokens: np.ndarray) -> PrefixHit:
        """Crop an entry to the prefix that it shares with a prompt, if its kind can be cropped."""
        held = self._tokens(key, entry)
        size = min(len(held), len(tokens) - 1)
        differ = np.flatnonzero(held[:size] != tokens[:size])
        common = int(differ[0]) if len(differ) else size
        cache = self._unpack(key, entry) if common else None
        if cache is None:
            return NOTHING
        seconds = (seconds_of(entry.meta) or 0.0) * common / len(held)
        try:
            return PrefixHit(cache if common == len(held) else cache.crop(common), common, seconds)
        except UnsupportedError:  # a kind that has let go of what comes before
            return NOTHING

    def _tokens(self, key: str, entry: Entry) -> np.ndarray:
        """Return the tokens of an entry; one without them is removed, and has none."""
        if TOKENS in entry.arrays:
            held = np.asarray(entry.arrays[TOKENS])
            if held.ndim == 1 and held.dtype == np.int32:
                return held
        self.reject(key)
        return np.zeros(0, np.int32)

    def _unpack(self, key: str, entry: Entry) -> Cache | None:
        """Return the cache of an entry; one that does not fit model and kind is removed."""
        from jkv.store.packing import check_like, restored, unpack

        try:
            seconds_of(entry.meta)
            cache = unpack(entry)
            if cache.lengths.tolist() != [len(entry.arrays[TOKENS])]:
                raise CorruptError("an entry of other tokens than its cache's")
            form = entry.meta.get("form", "exact")
            if form != "exact":  # of a tier that rounds: the kind does not
                cache = restored(cache, self._config, form)
            check_like(cache, self._config, self.kind)
            return cache
        except (CorruptError, KeyError):
            self.reject(key)
            return None

    def reject(self, key: str) -> None:
        """Have the store remove an entry that is not what it says."""
        reject(self.store, key, self.tenant)

    @transfers
    def known(self, key: str) -> tuple[Cache, np.ndarray, dict[str, Any]] | None:
        """Look up a whole sequence: its cache, its tokens and what was kept with them."""
        try:
            with self.store.open(key, tenant=self.tenant, fingerprint=self.fingerprint) as handle:
                entry = handle.entry
        except KeyError:
            return None
        cache = self._unpack(key, entry)
        if cache is None:
            return None
        return cache, self._tokens(key, entry), dict(entry.meta)

    @transfers
    def known_of_others(self, key: str) -> dict[str, Any] | None:
        """Look up what was kept with a sequence by another model or kind; None for nothing.

        An entry of this model and kind, which `known` refused, is none of others.
        """
        own = self.store.open_many([key], tenant=self.tenant, fingerprint=self.fingerprint)[0]
        if own is not None:
            own.release()
            return None
        try:
            with self.store.open(key, tenant=self.tenant) as handle:
                return dict(handle.entry.meta)
        except KeyError:
            return None

    @transfers
    def keep(
        self,
        keys: Sequence[str | None],
        rows: Sequence[np.ndarray],
        caches: Iterable[Cache],
        seconds: Sequence[float],
        **meta: object,
    ) -> None:
        """Store rows, all at once; of an iterator's caches each is let go of before the next.

        Args:
            keys: of sequences; None for one that follows from the tokens.
            rows: of tokens, each ``[T]``, those that the cache holds.
            caches: of one row each.
            seconds: that each took to make.
            meta: what else to keep with them, as JSON has it.
        """
        from jkv.store.packing import pack

        def packed(cache: Cache, cost: float) -> tuple[Entry, bool]:
            return pack(cache, seconds=cost, **meta), cache.forgets

        # `map` keeps no cache while it asks for the next, as `zip` or a loop's variable would.
        done = list(map(packed, caches, seconds))
        entries = []
        for tokens, (entry, _) in zip(rows, done, strict=True):
            held = np.asarray(tokens, np.int32)
            entries.append(Entry({**entry.arrays, TOKENS: held}, entry.meta))
        full = [i for i, tokens in enumerate(rows) if len(tokens)]
        self.store.put_many(
            [keys[i] for i in full],
            [entries[i] for i in full],
            tokens=[rows[i] for i in full],
            seconds=[seconds[i] for i in full],
            tenant=self.tenant,
            fingerprint=self.fingerprint,
            whole=bool(done) and done[0][1],
        )


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """What a store has of the rows of a job, and under which keys they go back."""

    store: PrefixStore
    keys: list[str | None]
    hits: list[PrefixHit]

    def keep(self, rows: Sequence[np.ndarray], cache: Cache, seconds: float) -> None:
        """Put all rows into the store.

        Args:
            rows: tokens that the cache holds, each ``[T]``.
            cache: of all rows.
            seconds: that each took, on top of what its prefix from the store took to make.
        """
        caches = (take_row(cache, i) for i in range(len(rows)))  # copies on the device
        self.store.keep(self.keys, rows, caches, [seconds + hit.seconds for hit in self.hits])


def check_keys(ids: object, batch: int) -> list[str | None]:
    """Return a key per row.

    Raises:
        TypeError: something that is no text.
        ValueError: another number of rows, or one key twice.
    """
    if ids is None:
        return [None] * batch
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise TypeError(f"sequence_ids got {brief(ids)}; expected a list of texts, one per row")
    if not all(isinstance(i, str) for i in ids):
        raise TypeError(f"sequence_ids got {brief(list(ids))}; expected texts")
    if len(ids) != batch or len(set(ids)) != batch:
        raise ValueError(
            f"sequence_ids got {len(ids)} ids, {len(set(ids))} of them different, for "
            f"{plural(batch, 'row')}; expected another one for each"
        )
    return list(ids)


def join_rows(rows: list[Cache | None], config: Config, kind: CacheKind, slots: int) -> Cache:
    """Join rows that were found, and empty ones for None, to one cache of so many slots."""

    def sized(cache: Cache | None) -> Cache:
        if cache is None:
            return programs.init_cache_jit(config, kind, 1, slots, config.dtype)
        if cache.capacity is None or cache.capacity == slots:
            return cache
        return cache.resize(slots) if cache.shared else programs.resize_jit(cache, slots)

    caches = tuple(sized(row) for row in rows)
    if len(caches) == 1:
        return caches[0]
    return concat(caches) if caches[0].shared else _concat_jit(caches)


@jax.jit
def _concat_jit(caches: tuple[Cache, ...]) -> Cache:
    return concat(caches)


@jax.jit
def _take_row_jit(cache: Cache, row: Array) -> Cache:
    return cache.take(row[None])


def take_row(cache: Cache, row: int) -> Cache:
    """Take one row of a cache."""
    if cache.batch == 1:
        return cache
    return cache.take([row]) if cache.shared else _take_row_jit(cache, np.int32(row))
