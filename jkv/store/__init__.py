"""Sequences' caches that outlive a request: tiers, eviction policies, planning.

Nothing here needs JAX, and names resolve on first use (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see of the lazy names
    from jkv.store.disk import Disk as Disk
    from jkv.store.entry import Entry as Entry
    from jkv.store.handles import Handle as Handle
    from jkv.store.handles import Match as Match
    from jkv.store.memory import Device as Device
    from jkv.store.memory import Memory as Memory
    from jkv.store.packing import pack as pack
    from jkv.store.packing import unpack as unpack
    from jkv.store.policy import ARC as ARC
    from jkv.store.policy import FIFO as FIFO
    from jkv.store.policy import LFU as LFU
    from jkv.store.policy import LRU as LRU
    from jkv.store.policy import SLRU as SLRU
    from jkv.store.policy import CostAware as CostAware
    from jkv.store.policy import Evictor as Evictor
    from jkv.store.policy import Policy as Policy
    from jkv.store.prefetch import Predictor as Predictor
    from jkv.store.remote import Remote as Remote
    from jkv.store.store import Store as Store
    from jkv.store.tier import Tier as Tier

_HOME = {
    "ARC": "jkv.store.policy",
    "CostAware": "jkv.store.policy",
    "Device": "jkv.store.memory",
    "Disk": "jkv.store.disk",
    "Entry": "jkv.store.entry",
    "Evictor": "jkv.store.policy",
    "FIFO": "jkv.store.policy",
    "LFU": "jkv.store.policy",
    "LRU": "jkv.store.policy",
    "Memory": "jkv.store.memory",
    "Handle": "jkv.store.handles",
    "Match": "jkv.store.handles",
    "Predictor": "jkv.store.prefetch",
    "Store": "jkv.store.store",
    "Policy": "jkv.store.policy",
    "Remote": "jkv.store.remote",
    "SLRU": "jkv.store.policy",
    "Tier": "jkv.store.tier",
    "pack": "jkv.store.packing",
    "unpack": "jkv.store.packing",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

if not TYPE_CHECKING:  # there, a misspelt name is an error

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'jkv.store' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
