"""jkv: the key/value cache of autoregressive decoders in JAX.

Names resolve on first use (PEP 562), so that `import jkv.store` and `jkv --help` do not wait for
JAX to start.
"""

import importlib
from typing import Any

from jkv._version import __version__

_HOME = {
    "Cache": "jkv.cache",
    "LayerCache": "jkv.cache",
    "Step": "jkv.cache",
    "concat": "jkv.cache",
    "dense": "jkv.cache",
    "evicting": "jkv.cache",
    "fp8": "jkv.cache",
    "from_legacy": "jkv.cache",
    "init_cache": "jkv.cache",
    "near_far": "jkv.cache",
    "none": "jkv.cache",
    "paged": "jkv.cache",
    "parse": "jkv.cache.spec",
    "quantized": "jkv.cache",
    "sparse": "jkv.cache",
    "per_layer": "jkv.cache",
    "pyramid": "jkv.cache",
    "window": "jkv.cache",
    "Config": "jkv.models",
    "Decoder": "jkv.models",
    "LM": "jkv.models",
    "Rope": "jkv.models",
    "load": "jkv.models",
    "shard": "jkv.models",
    "Chat": "jkv.decoding",
    "Result": "jkv.decoding",
    "beam_search": "jkv.decoding",
    "decode_step": "jkv.decoding",
    "generate": "jkv.decoding",
    "prefill": "jkv.decoding",
    "prompt_lookup": "jkv.decoding",
    "rollout": "jkv.decoding",
    "score": "jkv.decoding",
    "stream": "jkv.decoding",
    "plan": "jkv.planning",
    "Engine": "jkv.engine",
    "CacheFullError": "jkv.errors",
    "CheckpointError": "jkv.errors",
    "JkvError": "jkv.errors",
    "NonFiniteError": "jkv.errors",
    "PoolFullError": "jkv.errors",
    "StaleError": "jkv.errors",
    "UnsupportedError": "jkv.errors",
}
_MODULES = {
    "cache": "jkv.cache",
    "decoding": "jkv.decoding",
    "engine": "jkv.engine",
    "errors": "jkv.errors",
    "models": "jkv.models",
    "ops": "jkv.ops",
    "planning": "jkv.planning",
    "sampling": "jkv.decoding.sampling",
    "scores": "jkv.cache.scores",
    "store": "jkv.store",
    "testing": "jkv.testing",
}

__all__ = ["__version__", *_HOME, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'jkv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
