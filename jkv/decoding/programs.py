"""The programs of the decode loop, compiled, with the cache donated.

Everything that can vary from call to call without another program is an argument: lengths, the
number of steps, temperatures, keys.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jkv._axes import Array
from jkv._pytree import replace
from jkv.cache import sharding
from jkv.cache.base import Cache
from jkv.cache.init import init_cache
from jkv.cache.protocol import CacheKind
from jkv.decoding.arguments import DecoderLike
from jkv.decoding.faults import Faults
from jkv.decoding.logprobs import Logprobs
from jkv.decoding.loop import State, advance, begin, last_hidden
from jkv.decoding.prompts import PAD
from jkv.decoding.transform import Transform
from jkv.models.config import Config

# Of the compiled loop: the step, the state, and the buffers of tokens and log-probabilities.
Carry = tuple[Array, State, Array, Logprobs]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def init_cache_jit(
    config: Config, kind: CacheKind, batch: int, slots: int, dtype: str, mesh: Mesh | None = None
) -> Cache:
    """Make an empty cache in one program, laid out as the model's devices want it."""
    cache = init_cache(config, kind, batch=batch, slots=slots, dtype=dtype)
    return replace(cache, layers=sharding.shard_layers(cache.layers, mesh))


@functools.partial(jax.jit, static_argnums=1)
def shard_cache_jit(cache: Cache, mesh: Mesh) -> Cache:
    """Lay out a cache from elsewhere as the model's devices want it."""
    return replace(cache, layers=sharding.shard_layers(cache.layers, mesh))


@functools.partial(jax.jit, static_argnums=1)
def resize_jit(cache: Cache, slots: int) -> Cache:
    """Resize the cache's buffers."""
    return cache.resize(slots)


@jax.jit
def copy_jit(cache: Cache) -> Cache:
    """Copy a cache that is still in use elsewhere into buffers of its own."""
    return jax.tree.map(jnp.copy, cache)


def fork(last: Array, cache: Cache, count: int) -> tuple[Array, Cache]:
    """Repeat each row of a prefill `count` times, copies next to each other.

    They share the pages that are filled, and there are as many more as they need from here on.
    """
    return fork_jit(last, cache, count, cache.fork_sizes(count))


@functools.partial(jax.jit, static_argnums=(2, 3))
def fork_jit(
    last: Array, cache: Cache, count: int, sizes: tuple[tuple[int, ...], ...]
) -> tuple[Array, Cache]:
    """See `fork`; with storage of `sizes` for what the layers share."""
    return jnp.repeat(last, count, axis=0), cache.fork(count).fit(sizes)


@functools.partial(jax.jit, donate_argnums=(2, 4))
def absorb_jit(
    model: DecoderLike, tokens: Array, cache: Cache, counts: Array, last: Array
) -> tuple[Array, Cache]:
    """Prefill one chunk: the hidden state at each row's last real token, and the cache."""
    hidden, cache = model.hidden(tokens, cache, counts)
    return last_hidden(hidden, counts, last), cache


@functools.partial(jax.jit, static_argnames="top", donate_argnums=2)
def begin_jit(
    model: DecoderLike,
    last: Array,
    cache: Cache,
    history: Array | None,
    sampler: Transform | None,
    keys: Array | None,
    ends: Array | None,
    *,
    top: int = 0,
) -> tuple[State, Array, Logprobs]:
    """Draw the first token after a prefill: see `begin`."""
    return begin(model.logits(last), cache, history, sampler, keys, ends, top)


@functools.partial(jax.jit, static_argnums=0, static_argnames="top", donate_argnums=2)
def advance_jit(
    size: int,
    model: DecoderLike,
    state: State,
    sampler: Transform | None,
    keys: Array | None,
    ends: Array | None,
    steps: Array,
    *,
    top: int = 0,
) -> tuple[State, Array, Logprobs, Array, Faults]:
    """Draw up to `steps` of at most `size` tokens per row; end early when all rows are done.

    A `while_loop` rather than a `scan`: the number of steps is an argument and not a program, and
    a batch whose rows have ended costs nothing more. Returns the state, tokens and
    log-probabilities [B, size] (with those of the `top` likeliest tokens), which rows are done, and
    which of them had nothing to draw from.
    """
    batch = state.token.shape[0]
    tokens = jnp.full((size, batch), PAD, jnp.int32)
    logprobs = Logprobs.none((size, batch), top)

    def going(carry: Carry) -> Array:
        i, state, _, _ = carry
        return (i < steps) & ~jnp.all(state.done)

    def body(carry: Carry) -> Carry:
        i, state, tokens, logprobs = carry
        state, token, logprob = advance(model, state, sampler, keys, ends, top)
        tokens = lax.dynamic_update_index_in_dim(tokens, token, i, 0)
        logprobs = jax.tree.map(
            lambda whole, new: lax.dynamic_update_index_in_dim(whole, new, i, 0), logprobs, logprob
        )
        return i + 1, state, tokens, logprobs

    carry = (jnp.int32(0), state, tokens, logprobs)
    _, state, tokens, logprobs = lax.while_loop(going, body, carry)
    # The flags twice: the state is donated to the next call before the host has read these.
    logprobs = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), logprobs)
    return state, tokens.T, logprobs, *jax.tree.map(jnp.copy, (state.done, state.faults))
