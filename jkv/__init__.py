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
    "from_legacy": "jkv.cache",
    "init_cache": "jkv.cache",
    "none": "jkv.cache",
    "Config": "jkv.models",
    "Decoder": "jkv.models",
    "LM": "jkv.models",
    "Rope": "jkv.models",
    "load": "jkv.models",
    "Chat": "jkv.generate",
    "Result": "jkv.generate",
    "decode_step": "jkv.generate",
    "generate": "jkv.generate",
    "prefill": "jkv.generate",
    "rollout": "jkv.generate",
    "stream": "jkv.generate",
    "CacheFullError": "jkv.errors",
    "CheckpointError": "jkv.errors",
    "JkvError": "jkv.errors",
    "UnsupportedError": "jkv.errors",
}
_PACKAGES = ("cache", "errors", "models", "ops", "sampling")

__all__ = ["__version__", *_HOME, *_PACKAGES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value  # but `jkv.generate` is a function, and a package of that name
        return value
    if name in _PACKAGES:
        return importlib.import_module(f"jkv.{name}")
    raise AttributeError(f"module 'jkv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
