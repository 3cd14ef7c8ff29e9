"""Sequences' caches that outlive a request: keys, eviction policies, planning by simulation.

Nothing here needs JAX, and names resolve on first use (PEP 562).
"""

import importlib
from typing import Any

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jkv.store' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
