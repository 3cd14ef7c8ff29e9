"""A model over a cache, one token at a time."""

from __future__ import annotations

from typing import Any

import jax


@jax.jit
def one_by_one(model: Any, cache: Any, tokens: jax.Array) -> jax.Array:
    """Return the logits ``[B, T, V]`` after each token, in one compiled loop."""

    def body(cache: Any, token: jax.Array) -> Any:
        logits, cache = model(token[:, None], cache)
        return cache, logits[:, 0]

    return jax.lax.scan(body, cache, tokens.T)[1].swapaxes(0, 1)
