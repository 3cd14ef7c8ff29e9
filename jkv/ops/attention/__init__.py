"""Attention over a cache: one meaning (`reference`), several implementations, one choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from jkv import _compat
from jkv._axes import Array, Shaped
from jkv._text import brief
from jkv.ops import dispatch
from jkv.ops.attention import reference, xla, xla_paged
from jkv.ops.dispatch import Choice, Implementation, fold_rows, lazy_import
from jkv.ops.kv import KV, ContiguousKV, PagedKV
from jkv.ops.masks import AttentionSpec
from jkv.ops.partial import Partial, merge

__all__ = ["IMPLEMENTATIONS", "attention", "attention_with_chunk", "explain"]


def __dir__() -> list[str]:
    return sorted(__all__)


def _supports_all(q: Any, kv: Any, positions: Any, spec: Any) -> None:
    """Return no reason against any case."""
    del q, kv, positions, spec


def _by_xla(q: Array, kv: KV, positions: Array, spec: AttentionSpec) -> Partial:
    if isinstance(kv, PagedKV):
        return xla_paged.attention(q, kv, positions, spec)
    return xla.attention(q, kv, positions, spec)


def _fold(operands: Any, batched: Any, size: int) -> tuple[Any, ...] | None:
    q, kv, positions = operands
    folded = kv.fold(batched[1], size)
    if folded is None:
        return None
    q, positions = fold_rows((q, positions), (batched[0], batched[2]), size)
    return q, folded, positions


def _kernel(
    name: str, platform: str, oldest_jax: tuple[int, ...], *, only_chunks: bool = False
) -> Implementation:
    module = f"{__name__}.{name}"
    return Implementation(
        name,
        (platform,),
        lazy_import(module, "unsupported"),
        lazy_import(module, "attention"),
        only_chunks=only_chunks,
        oldest_jax=oldest_jax,
    )


# Best first.
OPERATION = dispatch.Operation(
    "attention",
    [
        _kernel("cudnn", "cuda", _compat.CUDNN_RESIDUAL, only_chunks=True),
        _kernel("mosaic_gpu", "cuda", _compat.MOSAIC_GPU),
        _kernel("mosaic_tpu", "tpu", _compat.MOSAIC_TPU),
        Implementation("xla", dispatch.PLATFORMS, _supports_all, _by_xla, differentiable=True),
        Implementation("reference", (), _supports_all, reference.attention, differentiable=True),
    ],
    _fold,
)
IMPLEMENTATIONS = OPERATION.names
"""The names that `implementation=` takes, in the order in which they are tried."""


def attention(
    q: Float[Array, "B T N H"],
    kv: KV | Sequence[KV],
    positions: Int[Array, "B T"],
    spec: AttentionSpec | None = None,
    *,
    implementation: str | None = None,
) -> Partial:
    """Attend from new tokens to cached ones, as a `Partial` that merges with others.

    Args:
        q: queries, already rotated; each of the K key/value heads serves N / K of the N heads.
        kv: what is attended to, `ContiguousKV` or `PagedKV`, whose keys and values are arrays or
            in a codec's form (`jkv.ops.codecs`), which is read a block at a time. Several of
            them, over disjoint tokens, are attended to as one: their partial results merged.
        positions: of the queries; -1 is padding, which sees nothing.
        spec: scale, window, sinks and softcap; by default a scale of ``1 / sqrt(H)`` alone.
        implementation: one of `IMPLEMENTATIONS`; by default the best of those that can do this on
            the platform compiled for, see `explain`.

    Raises:
        TypeError: something else in place of `kv` or `spec`.
        ValueError: shapes that do not fit together.
        UnsupportedError: an implementation of that name does not exist, or cannot do this.

    Example:
        >>> q, k = jnp.ones((1, 1, 4, 8)), jnp.ones((1, 2, 16, 8))  # [B, T, N, H], [B, K, S, H]
        >>> kv = jkv.ops.ContiguousKV(k, k, lengths=jnp.array([3]))
        >>> spec = jkv.ops.AttentionSpec(scale=8**-0.5, window=1024)
        >>> jkv.ops.attention(q, kv, jnp.array([[2]]), spec).out.shape
        (1, 1, 4, 8)
    """
    spec = _check_spec(q, spec)
    dispatch.warn_of_dtype(q.dtype)
    parts = [
        OPERATION.run(implementation, (q, one.for_queries(positions), positions), spec)
        for one in _check_operands(q, kv)
    ]
    return parts[0] if len(parts) == 1 else merge(*parts)


def explain(
    q: Shaped,
    kv: KV,
    spec: AttentionSpec | None = None,
    *,
    platform: str | None = None,
) -> Choice:
    """Return which implementation `attention` would choose, and why not those before it.

    Args:
        q: queries; shapes (`jax.ShapeDtypeStruct`) do, also in `kv`.
        kv: what is attended to.
        spec: as for `attention`.
        platform: "cuda", "tpu" or "cpu", by default that of this process.

    Raises:
        TypeError, ValueError: as `attention` does.
        UnsupportedError: another platform.

    Example:
        >>> q, k = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 2, 16, 4))
        >>> jkv.ops.explain(q, jkv.ops.ContiguousKV(k, k), platform="cpu").name
        'xla'
    """
    spec = _check_spec(q, spec)
    (one,) = _check_operands(q, kv)
    choice = OPERATION.choose(platform, (q, one, None), spec)
    if (platform or dispatch.platforms()[0]) != "cuda":
        return choice
    return dataclasses.replace(choice, advice=dispatch.advise_dtype(q.dtype))


def attention_with_chunk(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    spec: AttentionSpec,
    past: KV | Sequence[KV] = (),
    *,
    written: KV | None = None,
    since: int = 0,
) -> Partial:
    """Attend from a chunk of new tokens to those before it and to itself.

    Each row's real tokens come first and in order, and follow those of `past`.

    Args:
        q: queries, already rotated.
        k: keys of the chunk.
        v: values of the chunk.
        positions: of the chunk's tokens, -1 for padding.
        spec: scale, window, sinks and softcap.
        past: the tokens before the chunk.
        written: the tokens before it and its own in one operand, where there is one: attended to
            as it is, unless an implementation is better at the chunk alone.
        since: the chunk's tokens before this position neither see nor are seen.

    Example:
        >>> q = k = v = jnp.ones((1, 3, 2, 4))  # [B, T, N, H], [B, T, K, H]
        >>> at, spec = jnp.arange(3)[None], jkv.ops.AttentionSpec(scale=0.5)
        >>> jkv.ops.attention_with_chunk(q, k, v, at, spec).out.shape
        (1, 3, 2, 4)
    """
    own = ContiguousKV.of_chunk(k, v)
    apart = _attends_apart(q, own, spec)
    if written is not None and not apart:
        return attention(q, written, positions, spec)
    past = _check_operands(q, past)
    if since and apart:
        part = _attend_shifted(q, k, v, positions, spec, since)
    elif since:
        positions = jnp.where(positions >= since, positions, -1)
        part = attention(q, ContiguousKV(own.k, own.v, slot_positions=positions), positions, spec)
    else:
        part = attention(q, own, positions, spec)
    if not past:
        return part

    def attend_and_merge() -> Partial:
        return merge(attention(q, past, positions, spec), part)

    # Before most prefills there is nothing, and not even a ring is to be walked. Only here, since
    # on a TPU a branch takes copies of encoded buffers. Pages are walked as far as they are filled.
    if not apart or any(isinstance(one, PagedKV) for one in past):
        return attend_and_merge()
    return lax.cond(jnp.any(positions[:, 0] > 0), attend_and_merge, lambda: part)


def _attends_apart(q: Shaped, own: ContiguousKV, spec: AttentionSpec) -> bool:
    """Return whether the best implementation for a chunk can attend to the chunk alone."""
    return OPERATION.find(explain(q, own, spec).name).only_chunks


def _attend_shifted(
    q: Array, k: Array, v: Array, positions: Array, spec: AttentionSpec, since: int
) -> Partial:
    """Attend among the chunk's tokens from a position on, moved to the front and back."""
    new = q.shape[1]
    skipped = jnp.sum((positions >= 0) & (positions < since), axis=1)
    offsets = jnp.arange(new, dtype=jnp.int32)[None]

    def shift(x: Array, by: Array) -> Array:
        at = (offsets + by[:, None]) % new
        return jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), axis=1)

    later = shift(jnp.where(positions >= since, positions, -1), skipped)
    q, k, v = (shift(x, skipped) for x in (q, k, v))
    part = attention(q, ContiguousKV.of_chunk(k, v), later, spec)
    return jax.tree.map(lambda x: shift(x, -skipped), part)


def _check_spec(q: Any, spec: object) -> AttentionSpec:
    if spec is None:
        return AttentionSpec(scale=q.shape[-1] ** -0.5)
    if not isinstance(spec, AttentionSpec):
        raise TypeError(
            f"attention got spec={brief(spec)}; expected an AttentionSpec, such as "
            "AttentionSpec(scale=64**-0.5, window=1024)"
        )
    return spec


def _check_operands(q: Any, kv: object) -> list[KV]:
    found = [kv] if isinstance(kv, ContiguousKV | PagedKV) else kv
    if not isinstance(found, list | tuple) or not all(
        isinstance(one, ContiguousKV | PagedKV) for one in found
    ):
        raise TypeError(
            f"attention got kv={brief(kv)}; expected jkv.ops.ContiguousKV(k, v, ...), "
            "jkv.ops.PagedKV(...), or a list of them"
        )
    for one in found:
        if q.shape[2] % one.kv_heads:
            raise ValueError(
                f"attention got {q.shape[2]} query heads over {one.kv_heads} key/value heads; "
                "expected a multiple"
            )
        one.check(q)
    return list(found)
