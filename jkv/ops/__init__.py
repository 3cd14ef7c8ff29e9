"""Pure array functions, without state: the ground that caches and models stand on."""

from jkv.ops.attention import attention, explain
from jkv.ops.masks import visible
from jkv.ops.order import after
from jkv.ops.paged_attention import explain_paged, paged_attention
from jkv.ops.partial import Partial, merge
from jkv.ops.write import write

__all__ = [
    "Partial",
    "after",
    "attention",
    "explain",
    "explain_paged",
    "merge",
    "paged_attention",
    "visible",
    "write",
]


def __dir__() -> list[str]:
    return sorted(__all__)
