"""Pure array functions, without state: the ground that caches and models stand on."""

from jkv.ops.attention import attention
from jkv.ops.masks import visible
from jkv.ops.partial import Partial, merge

__all__ = ["Partial", "attention", "merge", "visible"]
