"""Attention over the cache on Hopper GPUs: split over programs by what is filled, one launch and a
small one that merges; each page is copied from where it lies. See `jkv.ops.mosaic_gpu`.
"""

from __future__ import annotations

from typing import Any

from jkv._axes import Array, Shaped
from jkv.ops.kv import KV, PagedKV
from jkv.ops.masks import AttentionSpec
from jkv.ops.mosaic_gpu import call
from jkv.ops.pages import TpuPages
from jkv.ops.partial import Partial


def attention(
    q: Array, kv: KV, positions: Array, spec: AttentionSpec, interpret: Any = False
) -> Partial:
    """See `jkv.ops.attention`; `interpret` is that of `plgpu.kernel`."""
    return call.attend(q, kv, positions, spec, interpret=interpret)


def unsupported(q: Shaped, kv: KV, positions: Shaped | None, spec: AttentionSpec) -> str | None:
    """Return why there is no kernel for these operands, or None."""
    del positions, spec
    if isinstance(kv, PagedKV) and any(isinstance(x, TpuPages) for x in (kv.k, kv.v)):
        return "pages that lie as a TPU wants them"
    return call.refusal(q, kv)
