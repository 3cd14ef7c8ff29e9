"""A cache as words of JSON and arrays by name, and back: how stores and files have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jkv._description import Words, describe, rebuild
from jkv._pytree import replace
from jkv._text import brief
from jkv.cache.base import Cache
from jkv.cache.block_table import BlockTables, tables_of
from jkv.cache.none import NoCache, TokenHistory
from jkv.cache.paged import Paged
from jkv.cache.protocol import LayerCache
from jkv.cache.shared_state import SharedState
from jkv.errors import JkvError, UnsupportedError
from jkv.ops.pages import TpuPages

# What a description may lead to that no cache has.
ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    JkvError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
# A cache is described in the form of the first version: block tables beside the layers, and the
# history of tokens of `none()` as the only layer of a class of its own.
_CACHE, _RECOMPUTE = "jkv.cache.base:Cache", "jkv.cache.none:Recompute"
_TOKENS = "jkv.cache.none:Tokens"
_MOST_LAYERS = 1 << 12


def describe_cache(cache: Cache, arrays: dict[str, Any], *, own: bool = False) -> Words:
    """Convert a cache to words of JSON; its arrays go to `arrays`.

    Args:
        cache: in the layout that processes of all platforms share, see `portable`.
        arrays: gets its arrays.
        own: whether layers and scores of other modules have a name too.

    Raises:
        UnsupportedError: a kind, a score or a shared state that cannot be stored.
    """
    for state in cache.shared:
        if not isinstance(state, TokenHistory | BlockTables):
            raise UnsupportedError(
                f"the layers of this cache share a {type(state).__name__}, which cannot be stored; "
                "expected block tables or none"
            )
    name, layers = _CACHE, cache.layers
    history = [state for state in cache.shared if isinstance(state, TokenHistory)]
    if history:
        path = "layers.0.tokens"
        tokens = {"tokens": describe(history[0].tokens, path, arrays), "layers": len(layers)}
        words = {"tuple": [{"class": _TOKENS, "fields": tokens}]}
        name = _RECOMPUTE
    else:
        words = describe(layers, "layers", arrays, own=own)
    fields = {
        "layers": words,
        "lengths": describe(cache.lengths, "lengths", arrays),
        "overflowed": describe(cache.overflowed, "overflowed", arrays),
        "tables": describe(tables_of(cache.shared), "tables", arrays),
    }
    return {"class": name, "fields": fields}


def rebuild_cache(
    words: Words, arrays: Mapping[str, Any], known: Iterable[type | Callable[..., Any]] = ()
) -> Cache:
    """Make the cache that `describe_cache` described; its pages as this process lays them out.

    Raises:
        One of `ERRORS`: words and arrays that describe no cache.
    """
    cache = _rebuild(words, arrays, known)
    _check(cache)
    return native(cache)


def _rebuild(
    words: Words, arrays: Mapping[str, Any], known: Iterable[type | Callable[..., Any]]
) -> Cache:
    name, fields = words["class"], words["fields"]
    if name not in (_CACHE, _RECOMPUTE):
        raise ValueError(f"{brief(name)} is no cache")
    if set(fields) != {"layers", "lengths", "overflowed", "tables"}:
        raise ValueError(f"a cache has other fields than {brief(sorted(fields))}")
    shared: list[SharedState] = []
    tables = rebuild(fields["tables"], arrays)
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
        shared.append(TokenHistory(rebuild(history["fields"]["tokens"], arrays)))
        layers = (NoCache(),) * count
    else:
        layers = rebuild(fields["layers"], arrays, known)
        if not isinstance(layers, tuple):
            raise TypeError("layers are no tuple")
    lengths, overflowed = (rebuild(fields[name], arrays) for name in ("lengths", "overflowed"))
    return Cache(layers, lengths, overflowed, tuple(shared))


def _check(cache: Cache) -> None:
    """Check what every program takes for granted of a cache.

    Raises:
        TypeError, ValueError: it is not so.
    """
    for layer in cache.layers:
        if not isinstance(layer, LayerCache):
            raise TypeError(f"{type(layer).__name__} is no cache of a layer")
    for leaf in jax.tree.leaves(cache):
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{brief(leaf)} where an array is expected")
    batch = cache.lengths.shape
    for array, dtype in ((cache.lengths, np.int32), (cache.overflowed, np.bool_)):
        if array.ndim != 1 or array.shape != batch or array.dtype != dtype:
            raise ValueError(f"{brief(array)} where one number for each row is expected")
    held = np.asarray(cache.lengths)
    if (held < 0).any() or (cache.capacity is not None and (held > cache.capacity).any()):
        raise ValueError(f"rows of {brief(held.tolist())} tokens in {cache.capacity} slots")


def portable(cache: Cache) -> Cache:
    """Return a cache in the layout that processes of all platforms share."""
    tiled = any(isinstance(x, Paged) and isinstance(x.k_pages, TpuPages) for x in cache.layers)
    return _portable(cache) if tiled else cache


@jax.jit
def _portable(cache: Cache) -> Cache:
    layers = tuple(x.portable() if isinstance(x, Paged) else x for x in cache.layers)
    return replace(cache, layers=layers)


def native(cache: Cache) -> Cache:
    """Return a cache whose pages lie as this process lays them out."""
    layers = tuple(x.native() if isinstance(x, Paged) else x for x in cache.layers)
    return replace(cache, layers=layers)
