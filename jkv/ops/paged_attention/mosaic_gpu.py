"""Attention over pages on Hopper GPUs: as over rows, each page copied from where it lies. See
`jkv.ops.mosaic_gpu`.
"""

from __future__ import annotations

from typing import Any

from jkv._axes import Array
from jkv.ops.masks import Mask
from jkv.ops.mosaic_gpu import call
from jkv.ops.pages import Tiled
from jkv.ops.partial import Partial


def paged_attention(
    q: Array,
    k_pages: Any,
    v_pages: Any,
    block_table: Array,
    *,
    positions: Array,
    lengths: Array,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    interpret: Any = False,
) -> Partial:
    """See `jkv.ops.paged_attention`; `interpret` is that of `plgpu.kernel`."""
    return call.attend(
        q,
        k_pages,
        v_pages,
        positions=positions,
        lengths=lengths,
        mask=Mask(scale, window, sinks, softcap),
        table=block_table,
        interpret=interpret,
    )


def unsupported(q: Any, k_pages: Any, v_pages: Any, block_table: Any, **_: Any) -> str | None:
    """Why there is no kernel for these operands, or None."""
    if isinstance(k_pages, Tiled) or isinstance(v_pages, Tiled):
        return "pages that lie as a TPU wants them"
    page = k_pages.shape[2]
    return call.refusal(q, k_pages, v_pages, page=page, slots=block_table.shape[1] * page)
