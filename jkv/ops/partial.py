"""Attention over part of the tokens, and the exact merge of two such parts."""

import jax.numpy as jnp
from jax import lax

from jkv._axes import Array
from jkv._pytree import pytree


@pytree
class Partial:
    """Attention over a subset of the slots: its normalised output and what weight it carries.

    Two partials over disjoint subsets merge exactly, which is what split-KV decoding, sharded
    caches, shared prefixes and caches of two storage forms all rest on
    (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).

    Example:
        >>> out, lse = jnp.ones((1, 1, 2, 4)), jnp.zeros((1, 1, 2))  # [B, T, N, H], [B, T, N]
        >>> part = jkv.ops.Partial(out, lse)
        >>> jkv.ops.merge(part, part).lse[0, 0].round(3).tolist()  # log 2
        [0.693..., 0.693...]
    """

    out: Array  # [B, T, N, H] float32, zeros where nothing was seen
    lse: Array  # [B, T, N] float32, log of the sum of exp of the scores, -inf where nothing was


def merge(*parts: Partial) -> Partial:
    """Attention over the union of disjoint parts, in any order; a part that saw nothing is inert.

    Raises:
        ValueError: no part was given.

    Example:
        >>> weight = jnp.zeros((1, 1, 2))  # [B, T, N], of both parts alike
        >>> one = jkv.ops.Partial(jnp.zeros((1, 1, 2, 4)), weight)  # [B, T, N, H]
        >>> two = jkv.ops.Partial(jnp.ones((1, 1, 2, 4)), weight)
        >>> jkv.ops.merge(one, two).out[0, 0, 0].tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    if not parts:
        raise ValueError("merge got no partial results; expected at least one")
    lse = jnp.stack([part.lse for part in parts])
    # The result does not depend on the shift, so neither do its derivatives.
    m = lax.stop_gradient(jnp.max(lse, axis=0))
    # A query that saw nothing anywhere has m = -inf, and -inf - -inf is NaN.
    shift = jnp.where(jnp.isneginf(m), 0.0, m)
    weights = jnp.exp(lse - shift[None])
    l = jnp.sum(weights, axis=0)
    outs = jnp.stack([part.out for part in parts])
    out = jnp.sum(outs * weights[..., None], axis=0)
    # Nothing seen: the logarithm of 1 is replaced, so that no derivative is 0 times infinity.
    some = jnp.where(l == 0, 1.0, l)
    lse = jnp.where(l == 0, -jnp.inf, shift + jnp.log(some))
    return Partial(out=out / some[..., None], lse=lse)
