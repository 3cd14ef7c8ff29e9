"""The decode loop: pure functions, to be traced in any program."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, PyTree

from jkv._axes import Array
from jkv._checks import check_integer, renamed
from jkv._pytree import pytree, replace
from jkv._text import brief
from jkv._transfer import transfers
from jkv.cache.base import Cache, on_device
from jkv.decoding import apply, sampling
from jkv.decoding.arguments import CachedModel, DecoderLike, Sampler
from jkv.decoding.faults import Faults, undrawable
from jkv.decoding.logprobs import Logprobs
from jkv.decoding.prompts import PAD
from jkv.decoding.transform import Transform


@pytree
class State:
    """A decode loop between two steps: each row's last token is not in the cache yet."""

    cache: Cache
    token: Array  # [B] int32
    done: Array  # [B] bool
    sampling: PyTree  # the sampler's state
    faults: Faults  # rows that ended because there was nothing to draw from


@pytree
class Rollout:
    """What `rollout` returns; `check` it once you are out of `jit`.

    Example:
        >>> cache = jkv.init_cache(lm.config, batch=1, slots=8)
        >>> logits, cache = jkv.prefill(lm.model, jnp.array([[5, 6, 7]]), cache)
        >>> out = jkv.rollout(lm.model, logits, cache, steps=4).check()
        >>> out.tokens.shape, out.logprobs.shape
        ((1, 4), (1, 4))
    """

    tokens: Array  # [B, T] int32, -1 after a row's end
    logprobs: Array  # [B, T] float32 under the model itself, 0 after a row's end
    state: State

    @transfers
    def check(self) -> Rollout:
        """Return this rollout, unless a row ended because it could not go on. On the host.

        Raises:
            CacheFullError: a row had no slot left; its tokens are -1 from there on.
            NonFiniteError: a row's logits were NaN or infinite, or its sampler left no token; its
                tokens are -1 from there on.
        """
        self.state.cache.check()
        self.state.faults.check(np.sum(np.asarray(self.tokens) != PAD, axis=1))
        return self


@transfers
def prefill(
    model: DecoderLike | CachedModel,
    tokens: Array | np.ndarray,
    cache: Cache,
    counts: Array | np.ndarray | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after each row's last new token, and the cache with all of them; pure.

    A row without room for all its new tokens takes none of them: its part of the cache stays as it
    was, ``cache.overflowed`` is set for it, and its logits mean nothing. Nothing is raised, since
    this may be traced: call ``cache.check()`` on the host.

    Args:
        model: a decoder, or a `jkv.decoding.CachedModel` of your own.
        tokens: ``[B, T]`` integers, new ones, padded at the end of rows.
        cache: of the tokens before, from `jkv.init_cache` at first.
        counts: ``[B]`` integers, how many of each row's tokens are real, all by default. The
            logits of a row without any mean nothing.

    Raises:
        TypeError: no decoder, no integers, or no cache.
        ValueError: shapes that do not fit together.

    Example:
        >>> cache = jkv.init_cache(lm.config, batch=2, slots=16)
        >>> tokens, counts = jnp.array([[5, 6, 7], [5, 0, 0]]), jnp.array([3, 1])
        >>> logits, cache = jax.jit(jkv.prefill)(lm.model, tokens, cache, counts)
        >>> logits.shape, cache.check().lengths.tolist()  # CacheFullError if a row had no room
        ((2, 1024), [3, 1])
    """
    decoder, cache = _check_pass("prefill", model, cache)
    tokens = _integers("prefill", "tokens", tokens, (cache.batch, None))
    if counts is not None:
        counts = _integers("prefill", "counts", counts, (cache.batch,))
    hidden, cache = decoder.hidden(tokens, cache, counts)
    return decoder.logits(last_hidden(hidden, counts)), cache


@transfers
def decode_step(
    model: DecoderLike | CachedModel,
    token: Array | np.ndarray,
    cache: Cache,
    active: Array | np.ndarray | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after one more token in each row, and the cache with it; pure.

    A full row drops the token, keeps every bit and sets ``cache.overflowed``; its logits mean
    nothing from there on. Nothing is raised, since this may be traced: call ``cache.check()`` on
    the host.

    Args:
        model: a decoder, or a `jkv.decoding.CachedModel` of your own.
        token: ``[B]`` integers, of each row.
        cache: of the tokens before.
        active: ``[B]`` bool, rows that take part, all by default; the others keep their cache.

    Raises:
        TypeError: no decoder, no integers, or no cache.
        ValueError: shapes that do not fit together.

    Example:
        >>> cache = jkv.init_cache(lm.config, batch=1, slots=16)
        >>> logits, step = jnp.zeros((1, 1024)), jax.jit(jkv.decode_step, donate_argnums=2)
        >>> for _ in range(4):
        ...     logits, cache = step(lm.model, jnp.argmax(logits, axis=-1), cache)
        >>> cache.check().lengths.tolist()  # CacheFullError if a row ran full
        [4]
    """
    decoder, cache = _check_pass("decode_step", model, cache)
    token = _integers("decode_step", "token", token, (cache.batch,))
    if active is not None:
        active = _array("decode_step", "active", active, (cache.batch,), jnp.bool_)
    counts = None if active is None else active.astype(jnp.int32)
    hidden, cache = decoder.hidden(jnp.maximum(token, 0)[:, None], cache, counts)
    return decoder.logits(hidden[:, 0]), cache


@transfers
@renamed(said="history")
def rollout(
    model: DecoderLike | CachedModel,
    logits: Array | np.ndarray,
    cache: Cache,
    *,
    steps: int,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    ends: Array | np.ndarray | None = None,
    history: Array | np.ndarray | None = None,
) -> Rollout:
    """Draw `steps` tokens after a prefill, in one `lax.scan`; pure: trace it inside your own jit.

    The last token drawn is not in the cache yet: `steps` tokens are `steps - 1` passes.

    A row ends, with -1 for its tokens, where its cache is full (``out.state.cache.overflowed``)
    and where its logits, or what the sampler makes of them, are NaN or infinite
    (``out.state.faults``). Nothing is raised, since this may be traced: call ``out.check()`` on the
    host.

    Args:
        model: a decoder, or a `jkv.decoding.CachedModel` of your own.
        logits: ``[B, V]``, of the first token, from `prefill`.
        cache: from `prefill`.
        steps: tokens per row, an int.
        sampler: a transform of `jkv.sampling`, or a function of the logits; greedy by default.
        key: a typed key, or one per row; needed where the sampler draws at random.
        ends: ``[B, M]`` integers, tokens at which a row ends, -1 for none.
        history: ``[B, T]`` integers, the tokens so far, for samplers that look back; -1 is padding.

    Raises:
        TypeError: no decoder, no cache, or arrays of another kind.
        ValueError: `steps` below 1, shapes that do not fit together, or a sampler that draws at
            random without a key.

    Example:
        >>> @jax.jit
        ... def continued(model, tokens, cache):
        ...     logits, cache = jkv.prefill(model, tokens, cache)
        ...     return jkv.rollout(model, logits, cache, steps=4)
        >>> cache = jkv.init_cache(lm.config, batch=1, slots=16)
        >>> out = continued(lm.model, jnp.array([[5, 6, 7]]), cache)
        >>> out.check().tokens.shape  # raises CacheFullError or NonFiniteError
        (1, 4)
    """
    _, cache = _check_pass("rollout", model, cache)
    logits = _array("rollout", "logits", logits, (cache.batch, None), jnp.floating)
    steps = check_integer("steps", steps, 1)
    if ends is not None:
        ends = _integers("rollout", "ends", ends, (cache.batch, None))
    if history is not None:
        history = _integers("rollout", "history", history, (cache.batch, None))
    keys = check_sampler(sampler, key, logits.shape[0])
    transform = sampling.bind(sampler, logits.shape[-1], ends)
    if transform is not None:  # room for all tokens that one that looks back will see
        history = jnp.zeros((cache.batch, 0), jnp.int32) if history is None else history
        history = jnp.pad(history, ((0, 0), (0, steps)), constant_values=PAD)
    state, token, logprob = begin(logits, cache, history, transform, keys, ends)

    def body(state: State, _: None):
        state, token, logprob = advance(model, state, transform, keys, ends)
        return state, (token, logprob.chosen)

    state, (tokens, logprobs) = lax.scan(body, state, None, length=steps - 1)
    return Rollout(
        tokens=jnp.concatenate([token[:, None], tokens.T], axis=1),
        logprobs=jnp.concatenate([logprob.chosen[:, None], logprobs.T], axis=1),
        state=state,
    )


_KINDS = {jnp.integer: "integers", jnp.floating: "floats", jnp.bool_: "bools"}


@runtime_checkable
class _Layers(Protocol):
    """What the loops here call of a decoder."""

    def hidden(
        self, tokens: Array, cache: Cache, counts: Array | None = None
    ) -> tuple[Array, Cache]: ...
    def logits(self, hidden: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class _OwnModel:
    """A model of a user's own as a decoder, whose hidden states are the logits."""

    model: CachedModel

    def hidden(
        self, tokens: Array, cache: Cache, counts: Array | None = None
    ) -> tuple[Array, Cache]:
        made = self.model(tokens, cache, counts)
        pair = made if isinstance(made, tuple) and len(made) == 2 else (None, None)
        logits, after = pair
        if not isinstance(after, Cache) or not isinstance(logits, jax.Array):
            raise TypeError(
                f"the model returned {brief(made)}; expected a pair: logits [B, T, V], and the "
                "cache that run.end made"
            )
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise ValueError(
                f"the model returned logits {list(logits.shape)} of tokens {list(tokens.shape)}; "
                "expected [B, T, V], of what run.end returned"
            )
        return logits, after

    def logits(self, hidden: Array) -> Array:
        return hidden


def _check_pass(name: str, model: object, cache: object) -> tuple[_Layers, Cache]:
    """Check a pass' model and cache; return both, the cache copied back if it is on the host."""
    if isinstance(model, DecoderLike):
        decoder: _Layers = model
    elif isinstance(model, CachedModel):
        decoder = _OwnModel(model)
    else:
        hint = ", as lm.model is" if hasattr(model, "model") else ""
        raise TypeError(
            f"{name} got {type(model).__name__} as a model; expected a decoder{hint}, or one of "
            "your own: logits, cache = model(tokens, cache, counts)"
        )
    if not isinstance(cache, Cache):
        raise TypeError(
            f"{name} got {type(cache).__name__} as a cache; expected what jkv.init_cache, or the "
            "step before, returned"
        )
    return decoder, on_device(cache)


def _integers(name: str, what: str, value: object, shape: tuple[int | None, ...]) -> Array:
    return _array(name, what, value, shape, jnp.integer)


def _array(name: str, what: str, value: object, shape: tuple[int | None, ...], kind: type) -> Array:
    """Return an array of a kind of numbers and a shape; a size of None may be any."""
    sizes = ", ".join("any" if s is None else str(s) for s in shape)
    expected = f"{_KINDS[kind]} [{sizes}]"
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"{name} got {what} of type {type(value).__name__}; expected {expected}")
    if not jnp.issubdtype(value.dtype, kind):
        raise TypeError(f"{name} got {what} of dtype {value.dtype}; expected {expected}")
    fits = len(value.shape) == len(shape) and all(
        n > 0 if s is None else n == s for s, n in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} got {what} of shape {list(value.shape)}; expected {expected}, with as many "
            "rows as the cache"
        )
    return jnp.asarray(value)


NEEDS_KEY = (
    "a sampler that draws at random needs key=jax.random.key(seed); one that ends with "
    "jkv.sampling.greedy(), in a chain, takes the likeliest token and needs none"
)


def check_sampler(sampler: object, key: object, batch: int) -> Array | None:
    """Return the rows' keys, None where nothing is drawn at random.

    Raises:
        TypeError: no sampler, or no key.
        ValueError: a sampler that needs a key, without one.
    """
    if sampler is not None:
        sampling.check(sampler)
    if key is not None:
        keys = sampling.row_keys(key, batch)
        return keys if sampling.needs_key(sampler) else None
    if sampling.needs_key(sampler):
        raise ValueError(NEEDS_KEY)
    return None


def begin(
    logits: Array,
    cache: Cache,
    history: Array | None,
    sampler: Transform | None,
    keys: Array | None,
    ends: Array | None,
    top: int = 0,
) -> tuple[State, Array, Logprobs]:
    """Draw each row's first token.

    Returns:
        The state, the token ``[B]``, and its log-probabilities ``[B]`` with those of the `top`
        likeliest tokens.
    """
    nothing = jnp.full((logits.shape[0],), PAD, jnp.int32)
    history = nothing[:, None] if history is None else history
    inner = () if sampler is None else apply.init_state(sampler, history, logits.shape[-1])
    state = State(
        cache=cache,
        token=nothing,
        done=cache.overflowed,
        sampling=inner,
        faults=Faults.none(cache.batch),
    )
    return _choose(logits, state, sampler, keys, ends, top)


def advance(
    model: DecoderLike | CachedModel,
    state: State,
    sampler: Transform | None,
    keys: Array | None,
    ends: Array | None,
    top: int = 0,
) -> tuple[State, Array, Logprobs]:
    """Put each row's token into the cache and draw the next; returns what `begin` does."""
    logits, cache = decode_step(model, state.token, state.cache, ~state.done)
    state = replace(state, cache=cache, done=state.done | cache.overflowed)
    return _choose(logits, state, sampler, keys, ends, top)


def _choose(
    logits: Array,
    state: State,
    sampler: Transform | None,
    keys: Array | None,
    ends: Array | None,
    top: int = 0,
) -> tuple[State, Array, Logprobs]:
    inner, changed = state.sampling, logits
    if sampler is not None:
        changed, inner = apply.apply(sampler, logits, inner, state.token)
    # The position of the drawn token; the cache holds all tokens before it by now.
    position = state.cache.lengths
    token = sampling.draw(changed, keys, position)
    total = jax.nn.logsumexp(logits, axis=-1)
    faults = state.faults.note(~state.done, ~jnp.isfinite(total), undrawable(changed), position)
    silent = state.done | (faults.position >= 0)
    done = silent
    if ends is not None:
        done = done | jnp.any(token[:, None] == ends, axis=1)
    after = State(
        cache=state.cache,
        token=jnp.where(silent, state.token, token),
        done=done,
        sampling=inner,
        faults=faults,
    )
    logprobs = Logprobs.of(logits, total, token, top).where(~silent)
    return after, jnp.where(silent, PAD, token), logprobs


def last_hidden(hidden: Array, counts: Array | None, before: Array | None = None) -> Array:
    """Take each row's hidden state at its last real token, [B, D]; `before` where it has none."""
    if counts is None:
        return hidden[:, -1]
    at = jnp.maximum(counts - 1, 0)[:, None, None]
    last = jnp.take_along_axis(hidden, at, axis=1)[:, 0]
    return last if before is None else jnp.where((counts > 0)[:, None], last, before)
