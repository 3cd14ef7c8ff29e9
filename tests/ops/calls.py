"""The operation in plain keywords, of which tests vary one or two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jkv import _compat, ops
from jkv.ops.attention import OPERATION

SPEC = ("scale", "window", "sinks", "softcap")
STATIC = (*SPEC, "chunk", "implementation")


def needs(name: str) -> pytest.MarkDecorator:
    """Skip the tests of an implementation that this JAX is too old for."""
    why = _compat.why_too_old(OPERATION.find(name).oldest_jax)
    return pytest.mark.skipif(why is not None, reason=f"{name}: {why}")


def operands(
    q: Any,
    k: Any,
    v: Any,
    block_table: Any = None,
    *,
    positions: Any = None,
    slot_positions: Any = None,
    lengths: Any = None,
    chunk: bool = False,
    scale: float | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """Queries, keys and values, positions and spec, as the operation takes them."""
    spec = ops.AttentionSpec(q.shape[-1] ** -0.5 if scale is None else scale, **options)
    if block_table is not None:
        return q, ops.PagedKV(k, v, block_table, lengths), positions, spec
    return q, ops.ContiguousKV(k, v, lengths, slot_positions, chunk), positions, spec


def attention(*arrays: Any, implementation: str | None = None, **options: Any) -> ops.Partial:
    """`ops.attention` over slots, or with a block table over pages."""
    return ops.attention(*operands(*arrays, **options), implementation=implementation)


def explain(*arrays: Any, platform: str | None = None, **options: Any) -> Any:
    """`ops.explain` likewise."""
    q, kv, _, spec = operands(*arrays, **options)
    return ops.explain(q, kv, spec, platform=platform)


def by(function: Callable[..., ops.Partial]) -> Callable[..., ops.Partial]:
    """The same of an implementation's own function."""

    def call(*arrays: Any, interpret: Any = False, **options: Any) -> ops.Partial:
        return function(*operands(*arrays, **options), interpret=interpret)

    return call


def cut(x: np.ndarray, page: int, spare: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cut slots ``[B, K, S, H]`` into pages in random order, `spare` of them free, and a table."""
    batch, heads, slots, dim = x.shape
    count = slots // page
    pages = np.full((batch * count + spare, heads, page, dim), np.nan, np.float32)
    table = (
        np.random.default_rng(seed).permutation(len(pages))[: batch * count].reshape(batch, count)
    )
    parts = x.reshape(batch, heads, count, page, dim).swapaxes(1, 2)
    pages[table.reshape(-1)] = parts.reshape(-1, heads, page, dim)
    return pages, table.astype(np.int32)
