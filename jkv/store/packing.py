"""Caches as entries, and back: arrays by name, and what they are in words that JSON has.

Imported on first use: it needs JAX. No code is ever read from an entry, see `jkv._description`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from jkv._description import describe, names_in
from jkv._pytree import replace
from jkv._text import brief, plural
from jkv._transfer import transfers
from jkv.cache.base import Cache
from jkv.cache.init import init_cache
from jkv.cache.paged import Paged
from jkv.cache.serialized import ERRORS, describe_cache, portable, rebuild_cache
from jkv.errors import CorruptError, UnsupportedError
from jkv.models.config import Config
from jkv.store.entry import Entry

VERSION = 1
# Buffers are stored in sizes that are multiples of this: few programs, little that is empty.
SLOTS = 64


@transfers
def pack(cache: Any, **meta: Any) -> Entry:
    """Pack one row's cache into an entry, without the slots that it does not use.

    Args:
        cache: of one row, of any kind of this library; it stays as it is.
        meta: what else to keep, as JSON has it.

    Raises:
        TypeError: no cache.
        ValueError: several rows.
        UnsupportedError: pages that another owner manages, or a kind or score of another module.

    Example:
        >>> cache = jkv.init_cache(lm.config, batch=1, slots=8)
        >>> logits, cache = jkv.prefill(lm.model, jnp.array([[5, 6, 7]]), cache)
        >>> entry = jkv.store.pack(cache, note="mine")
        >>> entry.meta["length"], entry.meta["note"]
        (3, 'mine')
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"the store got {type(cache).__name__}; expected a cache, or an Entry")
    if cache.batch != 1:
        raise ValueError(
            f"the store got a cache of {plural(cache.batch, 'row')}; expected one: "
            "cache.take([row])"
        )
    if any(isinstance(layer, Paged) and layer.managed for layer in cache.layers):
        raise UnsupportedError("the pages of an engine are its own; expected a cache of tokens")
    length = int(cache.lengths[0])
    cache = portable(_fitted(cache, length))
    arrays: dict[str, Any] = {}
    words = describe_cache(cache, arrays)
    return Entry(
        arrays=jax.device_get(arrays),
        meta={**meta, "jkv": VERSION, "cache": words, "length": length, "form": "exact"},
    )


def check_kind(kind: Any) -> None:
    """Refuse a kind of cache that another process would not know.

    Raises:
        UnsupportedError: it, or its score, is not of this library.
    """
    describe(kind, "", {})


@transfers
def unpack(entry: Entry) -> Cache:
    """Unpack a cache, the same to the bit; pages as this process lays them out.

    Raises:
        CorruptError: it is none, or one of another version.

    Example:
        >>> cache = jkv.init_cache(lm.config, batch=1, slots=8)
        >>> logits, cache = jkv.prefill(lm.model, jnp.array([[5, 6, 7]]), cache)
        >>> jkv.store.unpack(jkv.store.pack(cache)).lengths.tolist()
        [3]
    """
    if entry.meta.get("jkv") != VERSION:
        raise CorruptError(
            f"an entry of version {brief(entry.meta.get('jkv'))}; expected a cache of {VERSION}"
        )
    try:
        # Buffers of its own: programs write into the cache that they are given.
        cache = rebuild_cache(entry.meta["cache"], _owned(dict(entry.arrays)))
        if cache.lengths.tolist() != [entry.meta.get("length")]:
            raise ValueError(
                f"a row of {cache.lengths.tolist()} tokens, said to have "
                f"{brief(entry.meta.get('length'))}"
            )
        return cache
    except ERRORS as error:
        raise CorruptError(f"an entry that is no cache: {brief(error)}") from error


def check_like(cache: Cache, config: Config, kind: Any) -> None:
    """Refuse a cache that this model and kind would not make.

    Raises:
        CorruptError: other layers, heads, dtypes or sizes.
    """
    slots = SLOTS if cache.capacity is None else max(cache.capacity, 1)

    def made() -> Cache:
        return init_cache(config, kind, batch=1, slots=slots, dtype=config.dtype)

    expected = jax.eval_shape(made)
    leaves, tree = jax.tree.flatten(cache)
    others, other_tree = jax.tree.flatten(expected)
    try:
        alike = tree == other_tree
    except (TypeError, ValueError):  # an array where a setting is expected: no true or false
        alike = False
    if not alike:
        raise CorruptError("an entry of a cache of other layers, or of another kind, than expected")
    for leaf, other in zip(leaves, others, strict=True):
        if leaf.shape != other.shape or leaf.dtype != other.dtype:
            raise CorruptError(
                f"an entry with an array {leaf.dtype}{list(leaf.shape)}; expected "
                f"{other.dtype}{list(other.shape)}"
            )


@transfers
def converted(entry: Entry, form: str) -> Entry:
    """Convert an entry's exact cache to fewer bits; one that is rounded stays as it is.

    So does one that would take no fewer bytes: below some 230 tokens "int4" takes more.

    Args:
        entry: of a cache.
        form: "int8" or "int4"; "exact" for one that was rounded gives its numbers back, rounded.

    Raises:
        UnsupportedError: another form.
        CorruptError: an entry that is no cache.
    """
    from jkv.cache.dense import Dense

    kind = form_kind(form)
    held = entry.meta.get("form")
    if held == form or "cache" not in entry.meta:
        return entry
    cache = unpack(entry)
    plain = all(isinstance(layer, Dense) for layer in cache.layers)
    if held == "exact" and not plain:
        return entry  # kinds that round or let go by themselves say what is to be kept
    rest = {k: v for k, v in entry.meta.items() if k not in ("jkv", "cache", "length", "form")}
    try:
        packed = pack(_in_kind(cache, kind), **rest)
    except ERRORS as error:
        raise CorruptError(f"an entry of no cache that can be converted: {brief(error)}") from error
    # What else there is, such as the tokens, goes with it.
    others = set(entry.arrays) - set(names_in(entry.meta["cache"], "array"))
    arrays = {**packed.arrays, **{name: entry.arrays[name] for name in others}}
    result = Entry(arrays, {**packed.meta, "form": form})
    return result if form == "exact" or result.nbytes < entry.nbytes else entry


def form_kind(form: object) -> Any:
    """Return the kind of the caches that entries of a form hold, where exact ones are dense.

    Raises:
        UnsupportedError: no form.
    """
    from jkv.cache import dense, quantized

    kinds = {"int8": quantized(bits=8), "int4": quantized(bits=4), "exact": dense()}
    if not isinstance(form, str) or form not in kinds:
        raise UnsupportedError(f"converted got {brief(form)}; expected one of {sorted(kinds)}")
    return kinds[form]


def restored(cache: Cache, config: Config, form: object) -> Cache:
    """Give the exact cache, of rounded numbers, of one that a tier has rounded.

    Raises:
        CorruptError: no cache of this form that this model's could have become.
    """
    try:
        check_like(cache, config, form_kind(form))
        return _in_kind(cache, form_kind("exact"))
    except UnsupportedError as error:
        raise CorruptError(f"an entry in another form than it says: {error}") from error


def _in_kind(cache: Cache, kind: Any) -> Cache:
    slots = max(SLOTS, -(-int(cache.lengths[0]) // SLOTS) * SLOTS)
    return _converted(kind, slots, cache)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _converted(kind: Any, slots: int, cache: Cache) -> Cache:
    return cache.convert(kind, slots=slots)


def _fitted(cache: Cache, length: int) -> Cache:
    """Resize a cache to buffers that are just long enough."""
    if cache.capacity is None:
        return cache
    slots = max(SLOTS, -(-length // SLOTS) * SLOTS)
    if slots >= cache.capacity:
        return cache
    # The pages of a pool are sorted out on the host.
    return cache.resize(slots) if cache.shared else _resized(cache, slots)


@functools.partial(jax.jit, static_argnums=1)
def _resized(cache: Cache, slots: int) -> Cache:
    # Under jit a cache does not know its lengths, and would rather not be made shorter.
    layers = tuple(layer.resize(slots) for layer in cache.layers)
    return replace(cache, layers=layers)


@jax.jit
def _owned(arrays: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(jax.numpy.copy, arrays)
