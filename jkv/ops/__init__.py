"""Pure array functions, without state: the ground that caches and models stand on."""

from typing import TYPE_CHECKING, NoReturn

from jkv.ops.attention import IMPLEMENTATIONS, attention, attention_with_chunk, explain
from jkv.ops.kv import KV, ContiguousKV, PagedKV
from jkv.ops.masks import AttentionSpec, visible
from jkv.ops.partial import Partial, merge
from jkv.ops.write import write

__all__ = [
    "IMPLEMENTATIONS",
    "KV",
    "AttentionSpec",
    "ContiguousKV",
    "PagedKV",
    "Partial",
    "attention",
    "attention_with_chunk",
    "explain",
    "merge",
    "visible",
    "write",
]

_REPLACED = {
    "after": "jkv.ops.order.depend_on",
    "choice": "jkv.ops.dispatch",
    "encoded": "jkv.ops.codecs",
    "explain_paged": "jkv.ops.explain(q, PagedKV(...), spec)",
    "paged_attention": "jkv.ops.attention(q, PagedKV(...), positions, spec)",
}


if not TYPE_CHECKING:  # to a type checker, a module with this function has every attribute

    def __getattr__(name: str) -> NoReturn:
        hint = f"; it is {_REPLACED[name]} now" if name in _REPLACED else ""
        raise AttributeError(f"module 'jkv.ops' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted(__all__)
