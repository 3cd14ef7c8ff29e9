"""Attention over the cache on Hopper GPUs: split over programs by what is filled, one launch and a
small one that merges. See `jkv.ops.mosaic_gpu`.
"""

from __future__ import annotations

from typing import Any

from jkv._axes import Array
from jkv.ops.masks import Mask
from jkv.ops.mosaic_gpu import call
from jkv.ops.partial import Partial


def attention(
    q: Array,
    k: Any,
    v: Any,
    *,
    positions: Array,
    slot_positions: Array | None,
    lengths: Array | None,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    chunk: bool = False,
    interpret: Any = False,
) -> Partial:
    """See `jkv.ops.attention`; `interpret` is that of `plgpu.kernel`."""
    del chunk
    return call.attend(
        q,
        k,
        v,
        positions=positions,
        lengths=lengths,
        mask=Mask(scale, window, sinks, softcap),
        slot_positions=slot_positions,
        interpret=interpret,
    )


def unsupported(q: Any, k: Any, v: Any, **_: Any) -> str | None:
    """Why there is no kernel for these operands, or None."""
    return call.refusal(q, k, v, page=None, slots=k.shape[2])
