"""Users' samplers as the lanes of an engine take them."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jkv._axes import Array
from jkv.decoding import sampling
from jkv.decoding.apply import apply, init_state
from jkv.decoding.arguments import Sampler
from jkv.decoding.prompts import PAD
from jkv.decoding.transform import Transform

T = TypeVar("T")


def bind_sampler(sampler: Sampler, vocab: int, context: int, stop_ids: np.ndarray) -> Transform:
    """Make a user's sampler one that runs beside others; its parameters are on the host.

    Refused here, it is in no program that others share.

    Args:
        sampler: of a user.
        vocab: V.
        context: slots of a row's history.
        stop_ids: ``[E]`` at which the request ends, padded.

    Raises:
        Exception: what it raises itself, and what `jkv.decoding.apply` does.
    """
    host = as_arrays(sampling.bind(sampler, vocab, stop_ids[None]))
    lane = jax.tree.map(lambda leaf: leaf[None], host)
    _step_jit.eval_shape(vocab, context, lane)
    return host


def as_arrays(sampler: T) -> T:
    """Turn a sampler's parameters into arrays of 32 bits on the host."""

    def array(leaf: Any) -> np.ndarray:
        if isinstance(leaf, int):
            return np.asarray(leaf, np.int32)
        return np.asarray(leaf, np.float32) if isinstance(leaf, float) else np.asarray(leaf)

    return jax.tree.map(array, sampler)


def structure_of(sampler: Transform) -> Hashable:
    """Return what two samplers share that run in one program: structure, shapes and dtypes."""
    leaves, tree = jax.tree.flatten(sampler)
    return (tree, *((leaf.shape, leaf.dtype) for leaf in leaves))


# Never compiled; `jit` remembers what it has traced.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _step_jit(vocab: int, context: int, sampler: Transform) -> PyTree:
    """Apply a sampler as the steps do, under `vmap` over the lanes.

    What `vmap` does not take, such as a callback to the host without a rule for it, would fail in
    a step that others share.
    """

    def one(sampler: Transform, logits: Array, token: Array) -> PyTree:
        state = init_state(sampler, jnp.full((1, context), PAD, jnp.int32), vocab)
        return apply(sampler, logits[None], state, token[None])

    return jax.vmap(one)(sampler, jnp.zeros((1, vocab)), jnp.full((1,), PAD, jnp.int32))
