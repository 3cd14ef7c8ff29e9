"""Caches as entries, and back: arrays by name, and what they are in words that JSON has.

Imported on first use: it needs JAX. No code is ever read from an entry: a name in it can only be
that of a frozen dataclass or of a score of this library.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jkv._pytree import replace
from jkv._stored_names import present_name, written_fields, written_name
from jkv._text import brief, plural
from jkv._transfer import transfers
from jkv.cache.base import Cache
from jkv.cache.block_table import BlockTables, tables_of
from jkv.cache.init import init_cache
from jkv.cache.none import NoCache, TokenHistory
from jkv.cache.paged import Paged
from jkv.cache.protocol import LayerCache
from jkv.cache.shared_state import SharedState
from jkv.errors import CorruptError, JkvError, UnsupportedError
from jkv.models.config import Config
from jkv.ops.pages import TpuPages
from jkv.store.entry import Entry

VERSION = 1
# Buffers are stored in sizes that are multiples of this: few programs, little that is empty.
SLOTS = 64
_HOMES = ("jkv.cache.", "jkv.ops.", "jkv.models.config")  # of what caches are made of
# What a description may lead to that no cache has.
_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    JkvError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


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
    cache = _plain(_fitted(cache, length))
    arrays: dict[str, Any] = {}
    words = _cache_words(cache, arrays)
    return Entry(
        arrays=jax.device_get(arrays),
        meta={**meta, "jkv": VERSION, "cache": words, "length": length, "form": "exact"},
    )


def check_kind(kind: Any) -> None:
    """Refuse a kind of cache that another process would not know.

    Raises:
        UnsupportedError: it, or its score, is not of this library.
    """
    _words(kind, "", {})


@transfers
def unpack(entry: Entry) -> Cache:
    """Unpack a cache, the same to the bit; pages as this process lays them out.

    Raises:
        CorruptError: it is none, or one of another version.
    """
    if entry.meta.get("jkv") != VERSION:
        raise CorruptError(
            f"an entry of version {brief(entry.meta.get('jkv'))}; expected a cache of {VERSION}"
        )
    try:
        # Buffers of its own: programs write into the cache that they are given.
        cache = _cache_value(entry.meta["cache"], _owned(dict(entry.arrays)))
        _check_rows(cache, entry.meta.get("length"))
        layers = tuple(x.native() if isinstance(x, Paged) else x for x in cache.layers)
        return replace(cache, layers=layers)
    except _ERRORS as error:
        raise CorruptError(f"an entry that is no cache: {brief(error)}") from error


def _check_rows(cache: Cache, length: object) -> None:
    """Check what every program takes for granted of a cache of one row.

    Raises:
        TypeError, ValueError: it is not so.
    """
    for layer in cache.layers:
        if not isinstance(layer, LayerCache):
            raise TypeError(f"{type(layer).__name__} is no cache of a layer")
    for leaf in jax.tree.leaves(cache):
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{brief(leaf)} where an array is expected")
    for array, dtype in ((cache.lengths, np.int32), (cache.overflowed, np.bool_)):
        if array.shape != (1,) or array.dtype != dtype:
            raise ValueError(f"{brief(array)} where one row is expected")
    held = int(cache.lengths[0])
    if held < 0 or held != length or (cache.capacity is not None and held > cache.capacity):
        raise ValueError(f"a row of {held} tokens, said to have {brief(length)}")


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
    except _ERRORS as error:
        raise CorruptError(f"an entry of no cache that can be converted: {brief(error)}") from error
    # What else there is, such as the tokens, goes with it.
    others = set(entry.arrays) - set(_named(entry.meta["cache"]))
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


def _plain(cache: Cache) -> Cache:
    """Return the cache in the layout that processes of all platforms share."""
    native = any(isinstance(x, Paged) and isinstance(x.k_pages, TpuPages) for x in cache.layers)
    return _portable(cache) if native else cache


@jax.jit
def _portable(cache: Cache) -> Cache:
    layers = tuple(x.portable() if isinstance(x, Paged) else x for x in cache.layers)
    return replace(cache, layers=layers)


@jax.jit
def _owned(arrays: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(jax.numpy.copy, arrays)


# An entry has a cache in the form of the first version: block tables beside the layers, and the
# history of tokens of `none()` as the only layer of a class of its own.
_CACHE, _RECOMPUTE = "jkv.cache.base:Cache", "jkv.cache.none:Recompute"
_TOKENS = "jkv.cache.none:Tokens"
_MOST_LAYERS = 1 << 12


def _cache_words(cache: Cache, arrays: dict[str, Any]) -> dict[str, Any]:
    """Convert a cache to words of JSON; its arrays go to `arrays`."""
    name, layers = _CACHE, cache.layers
    history = [state for state in cache.shared if isinstance(state, TokenHistory)]
    if history:
        path = "layers.0.tokens"
        tokens = {"tokens": _words(history[0].tokens, path, arrays), "layers": len(layers)}
        words = {"tuple": [{"class": _TOKENS, "fields": tokens}]}
        name = _RECOMPUTE
    else:
        words = _words(layers, "layers", arrays)
    fields = {
        "layers": words,
        "lengths": _words(cache.lengths, "lengths", arrays),
        "overflowed": _words(cache.overflowed, "overflowed", arrays),
        "tables": _words(tables_of(cache.shared), "tables", arrays),
    }
    return {"class": name, "fields": fields}


def _cache_value(words: Any, arrays: dict[str, Any]) -> Cache:
    """Make the cache that `_cache_words` described."""
    name, fields = words["class"], words["fields"]
    if name not in (_CACHE, _RECOMPUTE):
        raise ValueError(f"{brief(name)} is no cache")
    if set(fields) != {"layers", "lengths", "overflowed", "tables"}:
        raise ValueError(f"a cache has other fields than {brief(sorted(fields))}")
    shared: list[SharedState] = []
    tables = _value(fields["tables"], arrays)
    if not isinstance(tables, tuple):
        raise TypeError("tables are no tuple")
    if tables:
        shared.append(BlockTables(tables))
    if name == _RECOMPUTE:
        (history,) = fields["layers"]["tuple"]
        count = history["fields"]["layers"]
        if history["class"] != _TOKENS or set(history["fields"]) != {"tokens", "layers"}:
            raise ValueError(f"{brief(history)} is no history of tokens")
        if type(count) is not int or not 0 < count <= _MOST_LAYERS:
            raise ValueError(f"a model of {brief(count)} layers")
        shared.append(TokenHistory(_value(history["fields"]["tokens"], arrays)))
        layers = (NoCache(),) * count
    else:
        layers = _value(fields["layers"], arrays)
        if not isinstance(layers, tuple):
            raise TypeError("layers are no tuple")
    lengths, overflowed = (_value(fields[name], arrays) for name in ("lengths", "overflowed"))
    return Cache(layers, lengths, overflowed, tuple(shared))


def _words(value: Any, path: str, arrays: dict[str, Any]) -> Any:
    """Convert a value to words of JSON; arrays go to `arrays` under their paths."""
    if isinstance(value, jax.Array | np.ndarray):
        arrays[path] = value
        return {"array": path}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return {"tuple": [_words(v, _under(path, i), arrays) for i, v in enumerate(value)]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            written: _words(getattr(value, name), _under(path, written), arrays)
            for name, written in written_fields(type(value))
        }
        return {"class": _name(type(value)), "fields": fields}
    if callable(value):
        return {"function": _name(value)}
    raise UnsupportedError(f"the store cannot keep {value!r:.60} of a cache")


def _under(path: str, name: str | int) -> str:
    return f"{path}.{name}" if path else str(name)


def _name(what: Any) -> str:
    """Return where something of this library is, by the name that entries know it by."""
    module, name = getattr(what, "__module__", ""), getattr(what, "__qualname__", "")
    if not module.startswith("jkv.") or "." in name or "<" in name:
        raise UnsupportedError(
            f"the store cannot keep a cache with {what!r:.80}: expected kinds and scores of jkv, "
            "which another process has too"
        )
    return written_name(what)


def _value(words: Any, arrays: Any) -> Any:
    """Make the value that `_words` described."""
    if not isinstance(words, dict):
        return words
    if words.keys() == {"array"}:
        return arrays[words["array"]]
    if words.keys() == {"tuple"}:
        return tuple(_value(part, arrays) for part in words["tuple"])
    if words.keys() == {"function"}:
        found = _found(words["function"])
        if not callable(found) or not words["function"].startswith("jkv.cache.scores:"):
            raise ValueError(f"{brief(words['function'])} is no score")
        return found
    if words.keys() != {"class", "fields"}:
        raise ValueError(f"{brief(words)} is nothing that a cache is made of")
    cls = _found(words["class"])
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        raise ValueError(f"{brief(words['class'])} is no dataclass")
    fields = dict(written_fields(cls))
    if set(words["fields"]) != set(fields.values()):
        raise ValueError(f"{words['class']} has other fields than {brief(sorted(words['fields']))}")
    return cls(
        **{name: _value(words["fields"][written], arrays) for name, written in fields.items()}
    )


def _named(words: Any) -> Iterator[str]:
    """Yield the names of arrays that `_value` would take."""
    if isinstance(words, dict):
        if "array" in words:
            yield words["array"]
        for part in (*words.get("tuple", ()), *words.get("fields", {}).values()):
            yield from _named(part)


def _found(name: str) -> Any:
    module, _, attribute = present_name(name).partition(":")
    if not module.startswith(_HOMES) or attribute.startswith("_"):
        raise ValueError(f"{brief(name)} is nothing that caches are made of")
    return getattr(importlib.import_module(module), attribute)
