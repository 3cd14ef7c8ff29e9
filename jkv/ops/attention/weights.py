"""Attention that returns its weights, for caches that keep tokens by the attention they get."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv.ops import dispatch
from jkv.ops.attention import xla
from jkv.ops.codecs.base import PRODUCT
from jkv.ops.dispatch import fold_unless_shared
from jkv.ops.masks import AttentionSpec

# Keys [B, K, S, H], values [B, K, S, H] and positions [B, K, S], -1 and below where there is none.
Part = tuple[Array, Array, Array]
OutAndWeights = tuple[Array, Array]
Products = Callable[[Array, Array], Array]  # of queries and keys
Sums = Callable[[Array, Array, Array], Array]  # of weights, values and positions


def attention_weights(
    q: Float[Array, "B T N H"],
    parts: Sequence[Part],
    positions: Int[Array, "B T"],
    spec: AttentionSpec,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K G T S"]]:
    """Attend to the union of some parts, and return the weight of each slot for each query.

    Unlike in `jkv.ops.attention`, every key/value head has tokens of its own. The weights are
    written out, as many as queries times slots, so this is for few slots, or few queries.

    Args:
        q: queries, already rotated.
        parts: keys, values and positions of the slots, each head's own; S counts those of all
            parts, one after another. What lies in an empty slot may be anything, NaN included.
        positions: of the queries; -1 is padding, which sees nothing and has weights of zero.
        spec: scale, window, sinks and softcap.

    Returns:
        The output and the weights, both float32; a query's weights sum to 1 if it sees anything.
    """
    batch, new, heads, dim = q.shape
    kv_heads = parts[0][0].shape[1]
    groups = heads // kv_heads
    # Rows and heads are one axis, as in `xla`.
    at = jnp.repeat(positions, kv_heads, axis=0)
    lines: list[Part] = jax.tree.map(
        lambda x: x.reshape(batch * kv_heads, *x.shape[2:]), list(parts)
    )

    def attend(q: Array, lines: list[Part], products: Products, sums: Sums) -> OutAndWeights:
        scores = [xla.mask_scores(spec, products(q, k), at, places) for k, _, places in lines]
        weights, l, _ = xla.softmax(jnp.concatenate(scores, axis=-1))
        weights = weights / l
        out, start = jnp.zeros(q.shape, jnp.float32), 0
        for _, v, places in lines:
            own = lax.slice_in_dim(weights, start, start + v.shape[1], axis=-1)
            out += sums(own, v, places)
            start += v.shape[1]
        return out, weights

    def in_place(w: Array, v: Array, places: Array) -> Array:
        return xla.weighted_sum_in_place(w, v, at, places)

    def plain(q: Array, lines: list[Part]) -> OutAndWeights:
        return attend(q, lines, _products, in_place)

    def in_pairs(q: Array, lines: list[Part]) -> OutAndWeights:
        # As in `xla`: one query row alone makes accelerators copy the whole cache.
        out, weights = plain(jnp.concatenate([q, q], axis=1), lines)
        return out[:, :1], weights[:, :1]

    rows = q.reshape(batch, new, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch * kv_heads, groups * new, dim)
    forms = {"cpu": plain, "default": plain if groups * new > 1 else in_pairs}
    kernels = _kernels(rows, *lines[0][:2]) if len(parts) == 1 else None
    if kernels is not None:
        forms["tpu"] = functools.partial(attend, products=kernels[0], sums=kernels[1])
    dispatch.note("xla" if kernels is None else "mosaic_tpu")
    out, weights = lax.platform_dependent(rows, lines, **forms)
    out = out.reshape(batch, kv_heads, groups, new, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape), weights.reshape(batch, kv_heads, groups, new, -1)


def _products(q: Float[Array, "Z R H"], k: Float[Array, "Z S H"]) -> Float[Array, "Z R S"]:
    return jnp.einsum("zrh,zsh->zrs", q, k, **PRODUCT)


def _sums(w: Float[Array, "Z R S"], v: Float[Array, "Z S H"]) -> Float[Array, "Z R H"]:
    """Sum values with weights, with zeros for values of weight zero, as the kernel does."""
    used = jnp.any(w > 0, axis=1)[..., None]
    return xla.weighted_sum(w, jnp.where(used, v, jnp.zeros((), v.dtype)))


def _kernels(q: Array, k: Array, v: Array) -> tuple[Products, Sums] | None:
    """Return kernels for TPUs, if those are compiled for and take such operands."""
    if not dispatch.tpu_kernels():
        return None
    from jkv.ops.mosaic_tpu import weights as tpu  # Pallas takes a while to import

    if tpu.unsupported(q, k, v) is not None:
        return None

    # Under `vmap`, with more lines or by XLA.
    def products(q: Array, k: Array) -> Array:
        return dispatch.kernel(tpu.products, _products, (q, k), fold=fold_unless_shared(1))

    def sums(w: Array, v: Array, places: Array) -> Array:
        del places
        return dispatch.kernel(tpu.sums, _sums, (w, v), fold=fold_unless_shared(1))

    return products, sums
