"""Caches: one file per kind of storage, one protocol for all."""

from typing import TYPE_CHECKING, NoReturn

from jkv._pytree import pytree, replace, static
from jkv.cache import scores, spec
from jkv.cache.base import Cache
from jkv.cache.block_table import BlockTables
from jkv.cache.concat import concat
from jkv.cache.dense import Dense, dense, from_legacy
from jkv.cache.evicting import evicting
from jkv.cache.evicting_layer import Evicting
from jkv.cache.file import load_cache
from jkv.cache.init import attention_cache, init_cache
from jkv.cache.none import NoCache, none
from jkv.cache.paged import Paged, copy_pages, paged
from jkv.cache.per_layer import per_layer
from jkv.cache.protocol import CacheKind, LayerCache, Step, shard_heads
from jkv.cache.pyramid import pyramid
from jkv.cache.quantized import fp8, near_far, quantized, sparse
from jkv.cache.quantized_layer import QuantizedCache
from jkv.cache.run import Run
from jkv.cache.shared_state import SharedState
from jkv.cache.transformers import from_transformers, to_transformers
from jkv.cache.window import Window, window

__all__ = [
    "BlockTables",
    "Cache",
    "CacheKind",
    "Dense",
    "Evicting",
    "LayerCache",
    "NoCache",
    "Paged",
    "QuantizedCache",
    "Run",
    "SharedState",
    "Step",
    "Window",
    "attention_cache",
    "concat",
    "copy_pages",
    "dense",
    "evicting",
    "fp8",
    "from_legacy",
    "from_transformers",
    "init_cache",
    "load_cache",
    "near_far",
    "none",
    "paged",
    "per_layer",
    "pyramid",
    "pytree",
    "quantized",
    "replace",
    "scores",
    "shard_heads",
    "sparse",
    "spec",
    "static",
    "to_transformers",
    "window",
]

_REPLACED = {"NearFar": "jkv.cache.QuantizedCache"}

if not TYPE_CHECKING:  # there, a misspelt name is an error

    def __getattr__(name: str) -> NoReturn:
        hint = f"; it is {_REPLACED[name]} now" if name in _REPLACED else ""
        raise AttributeError(f"module 'jkv.cache' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted(__all__)
