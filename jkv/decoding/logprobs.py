"""Log-probabilities of tokens under the model itself, and of the likeliest in their places."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jkv._axes import Array
from jkv._pytree import pytree, replace
from jkv.decoding.prompts import PAD


@pytree
class Logprobs:
    """Log-probabilities of some tokens, and the k likeliest in the place of each."""

    chosen: Array  # [...] float32
    top_tokens: Array  # [..., k] int32, the likeliest first
    top: Array  # [..., k] float32

    @classmethod
    def none(cls, shape: tuple[int, ...], k: int) -> Logprobs:
        """Return those of no tokens: 0, and -1 for their ids."""
        return cls(
            chosen=jnp.zeros(shape, jnp.float32),
            top_tokens=jnp.full((*shape, k), PAD, jnp.int32),
            top=jnp.zeros((*shape, k), jnp.float32),
        )

    @classmethod
    def of(
        cls,
        logits: Float[Array, "*rows V"],
        total: Float[Array, "*rows"],
        tokens: Int[Array, "*rows"],
        k: int,
    ) -> Logprobs:
        """Read them off the logits.

        Args:
            logits: as the model gives them.
            total: their log-sum-exp.
            tokens: in whose places the logits are.
            k: how many of the likeliest, 0 for none.
        """
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - total
        if k == 0:
            return replace(cls.none(tokens.shape, 0), chosen=chosen)
        best, ids = lax.top_k(logits, k)
        return cls(chosen=chosen, top_tokens=ids, top=best - total[..., None])

    def where(self, kept: Bool[Array, "*rows"]) -> Logprobs:
        """Keep those of some tokens, and none of the others."""
        none = Logprobs.none(self.chosen.shape, self.top.shape[-1])

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(kept.reshape(*kept.shape, *(1,) * (new.ndim - kept.ndim)), new, old)

        return jax.tree.map(choose, self, none)


def stack_rows(
    rows: list[list[np.ndarray]], width: int, k: int, dtype: DTypeLike, rest: int | float
) -> np.ndarray:
    """Stack rows of arrays ``[k]`` to ``[B, width, k]``, `rest` after the end of each."""
    out = np.full((len(rows), width, k), rest, dtype)
    for i, row in enumerate(rows):
        if len(row):
            out[i, : len(row)] = np.asarray(row)
    return out
