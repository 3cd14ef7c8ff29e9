"""Attention over the cache by kernels for Hopper GPUs, see `jkv.ops.mosaic_gpu`.

The work is split over programs by how many slots are filled; a second small launch merges their
results. Pages are copied from where they are.
"""

from __future__ import annotations

from jkv._axes import Array, Shaped
from jkv.ops.kv import KV
from jkv.ops.masks import AttentionSpec
from jkv.ops.mosaic_gpu import launch
from jkv.ops.partial import Partial


def attention(
    q: Array, kv: KV, positions: Array, spec: AttentionSpec, interpret: object = False
) -> Partial:
    """Attend, see `jkv.ops.attention`; `interpret` is that of `plgpu.kernel`."""
    return launch.attend(q, kv, positions, spec, interpret=interpret)


def unsupported(q: Shaped, kv: KV, positions: Shaped | None, spec: AttentionSpec) -> str | None:
    """Return why there is no kernel for these operands, or None."""
    del positions, spec
    return launch.refusal(q, kv)
