"""Caches: one file per kind of storage, one protocol for all."""

from jkv.cache.base import Cache, concat
from jkv.cache.dense import Dense, dense, from_legacy
from jkv.cache.init import init_cache
from jkv.cache.none import none
from jkv.cache.protocol import LayerCache, Step

__all__ = [
    "Cache",
    "Dense",
    "LayerCache",
    "Step",
    "concat",
    "dense",
    "from_legacy",
    "init_cache",
    "none",
]
