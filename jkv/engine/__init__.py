"""Many requests at once over one pool of pages: `Engine`, its requests, and the pool.

Names resolve on first use (PEP 562): the page pool needs no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see of the lazy names
    from jkv.engine.engine import Engine as Engine
    from jkv.engine.page_pool import PagePool as PagePool
    from jkv.engine.request import Request as Request

_HOME = {
    "Engine": "jkv.engine.engine",
    "PagePool": "jkv.engine.page_pool",
    "Request": "jkv.engine.request",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

if not TYPE_CHECKING:  # there, a misspelt name is an error

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'jkv.engine' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
