"""Speculative decoding: several tokens per pass, the same tokens as without it.

A draft proposes a row's next tokens. One pass of the model then draws the token after each of them,
and the proposals up to the first that differs are kept, together with the token that the model puts
in its place (Leviathan et al. 2023, arXiv:2211.17192). A token is
drawn with a key that depends on its position alone, so that this holds for tokens drawn at random
as for greedy ones: a draft changes when tokens come, never which.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Int, PyTree

from jkv._axes import Array
from jkv._checks import check_integer
from jkv._pytree import pytree, replace, static
from jkv._text import brief, plural
from jkv.cache.base import Cache
from jkv.decoding import sampling
from jkv.decoding.apply import apply
from jkv.decoding.arguments import DecoderLike
from jkv.decoding.faults import Faults, undrawable
from jkv.decoding.logprobs import Logprobs
from jkv.decoding.loop import State
from jkv.decoding.prompts import PAD
from jkv.decoding.transform import Transform
from jkv.errors import UnsupportedError


@runtime_checkable
class Draft(Protocol):
    """Proposes the rows' next tokens; traced into the decode loop.

    A plain function, or any pytree that can be called: what it holds as arrays are arguments of
    the compiled loop, so that a draft model's weights can be among them.

    Example:
        >>> def repeat_last(history, lengths):  # [B, S], [B] -> [B, 2]
        ...     last = jnp.take_along_axis(history, lengths[:, None] - 1, axis=1)
        ...     return jnp.repeat(last, 2, axis=1)
        >>> out = jkv.generate(lm, "ROMEO:", max_new_tokens=8, draft=repeat_last)
    """

    def __call__(self, history: Int[Array, "B S"], lengths: Int[Array, " B"]) -> Int[Array, "B k"]:
        """Propose the next k tokens of each row, -1 from where there is nothing to propose.

        Args:
            history: all tokens of each row, -1 past its end.
            lengths: how many they are, at least 1.
        """
        ...


@pytree
class PromptLookup:
    """See `prompt_lookup`."""

    ngram: int = static()
    tokens: int = static()

    def __call__(self, history: Int[Array, "B S"], lengths: Int[Array, " B"]) -> Int[Array, "B k"]:
        """Propose what followed the latest of the longest matches, periodic past the end."""
        batch, slots = history.shape
        at = jnp.arange(slots, dtype=jnp.int32)[None, :]
        last = lengths[:, None] - 1
        matched = jnp.zeros((batch, slots), jnp.int32)  # tokens that agree, counted backwards
        going = at < last
        for back in range(self.ngram):
            wanted = jnp.take_along_axis(history, jnp.maximum(last - back, 0), axis=1)
            going = going & (at >= back) & (jnp.roll(history, back, axis=1) == wanted)
            matched = matched + going.astype(jnp.int32)
        rank = matched * slots + jnp.where(matched > 0, at, 0)
        best = jnp.argmax(rank, axis=1).astype(jnp.int32)[:, None]
        found = jnp.take_along_axis(matched, best, axis=1) > 0
        # The tokens between the match and the row's end are a period: past the end they repeat.
        steps = jnp.arange(self.tokens, dtype=jnp.int32)[None, :] % jnp.maximum(last - best, 1)
        tokens = jnp.take_along_axis(history, jnp.minimum(best + 1 + steps, slots - 1), axis=1)
        return jnp.where(found, tokens, PAD)


def prompt_lookup(ngram: int = 3, tokens: int = 8) -> PromptLookup:
    """Propose what followed the same words earlier in the row: for texts that repeat themselves.

    The row's last `ngram` tokens are looked for in all that is before them, prompt and answer, and
    the tokens after the latest place are proposed; where they are not found, fewer of them are.
    Source: Saxena 2023, "Prompt Lookup Decoding".

    Args:
        ngram: tokens to look for, at most.
        tokens: proposed per pass.

    Raises:
        ValueError: no integers of at least 1.

    Example:
        >>> draft = jkv.prompt_lookup(ngram=2, tokens=3)
        >>> draft(jnp.array([[5, 6, 7, 8, 5, 6, -1]]), jnp.array([6])).tolist()
        [[7, 8, 5]]
    """
    return PromptLookup(
        ngram=check_integer("prompt_lookup's ngram", ngram, 1),
        tokens=check_integer("prompt_lookup's tokens", tokens, 1),
    )


@pytree
class _Function:
    """A draft that holds no arrays."""

    function: Any = static()

    def __call__(self, history: Array, lengths: Array) -> Any:
        return self.function(history, lengths)


@pytree
class DraftState:
    """`loop.State` with all tokens of the rows, which a draft looks at."""

    cache: Cache
    token: Array  # [B] int32, not in the cache yet
    done: Array  # [B] bool
    sampling: PyTree  # of a sampler without memory: no leaves
    faults: Faults  # rows that ended because there was nothing to draw from
    history: Array  # [B, S] int32, -1 past a row's end
    passes: Array  # [B] int32, in which each row took part


# Of the compiled loop: passes, the state, tokens of each row [B], and the buffers [B, size].
DraftCarry = tuple[Array, DraftState, Array, Array, Logprobs]


def check_draft(draft: object, batch: int, slots: int) -> Draft:
    """Return the draft as a pytree that can be called.

    Raises:
        TypeError: it cannot be called, or not hashed, or proposes no tokens.
    """
    if isinstance(draft, type) or not callable(draft):
        raise TypeError(
            f"draft got {brief(draft)}; expected jkv.prompt_lookup(), or a function of "
            "(history [B, S], lengths [B]) that proposes tokens [B, k]"
        )
    if not all(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(draft)):
        if draft.__hash__ is None:
            raise TypeError(
                f"draft got {brief(draft)}, which is neither hashable nor a pytree of arrays; "
                "expected a function or a frozen dataclass"
            )
        draft = _Function(draft)
    history = jax.ShapeDtypeStruct((batch, slots), jnp.int32)
    found = jax.eval_shape(draft, history, jax.ShapeDtypeStruct((batch,), jnp.int32))
    shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", np.dtype(object))
    fits = shape is not None and len(shape) == 2 and shape[0] == batch and shape[1] > 0
    if not fits or not jnp.issubdtype(dtype, jnp.integer):
        got = f"{dtype}{list(shape)}" if shape is not None else type(found).__name__
        raise TypeError(
            f"draft proposed {got} for {plural(batch, 'row')}; expected integers [{batch}, k]"
        )
    return draft  # pyright: ignore[reportReturnType]


def check_rollback(cache: Cache, sampler: Transform | None, vocab: int) -> None:
    """Refuse caches and samplers from which rejected proposals cannot be taken back.

    Raises:
        UnsupportedError: a cache that does not roll back inside of a compiled loop.
        ValueError: a sampler that remembers earlier tokens.
    """
    try:
        jax.eval_shape(lambda c: c.crop(c.lengths), cache)
    except UnsupportedError as error:
        raise UnsupportedError(
            "draft proposes tokens that are taken back out of the cache where the model says "
            f"others, and this kind of cache cannot do that inside the decode loop ({error}); "
            "expected one such as jkv.dense(), or no draft"
        ) from None
    if sampler is None:
        return
    tokens = jax.ShapeDtypeStruct((cache.batch, 1), jnp.int32)
    if jax.tree.leaves(jax.eval_shape(lambda s, t: s.init(t, vocab), sampler, tokens)):
        raise ValueError(
            "draft looks several tokens ahead, which a sampler that remembers the tokens before "
            "cannot (penalties, min_new_tokens and no_repeat_ngram do); expected one without "
            "memory, or no draft"
        )


def begin_draft(state: State, history: Array | np.ndarray) -> DraftState:
    """Add the tokens ``[B, S]`` so far, all but the one in the state, to the state of a prefill."""
    return DraftState(
        cache=state.cache,
        token=state.token,
        done=state.done,
        sampling=state.sampling,
        faults=state.faults,
        history=jnp.asarray(history),
        passes=jnp.zeros_like(state.token),
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames="top", donate_argnums=2)
def draft_jit(
    size: int,
    model: DecoderLike,
    state: DraftState,
    draft: Draft,
    sampler: Transform | None,
    keys: Array | None,
    ends: Array,
    limits: Array,
    *,
    top: int = 0,
) -> tuple[DraftState, Array, Logprobs, Array, Faults]:
    """Make passes until another one might not fit into `size` tokens of a row, or all have ended.

    Rows get different numbers of tokens. Returns the state, tokens and log-probabilities [B, size],
    -1 and 0 after a row's own, which rows are done, and which of them had nothing to draw
    from.

    Args:
        size: tokens per row, at most.
        model: a decoder.
        state: as it was left.
        draft: what `check_draft` returns.
        sampler: one without memory.
        keys: of the rows, or None.
        ends: ``[B, M]``, tokens at which a row ends.
        limits: ``[B]``, tokens of a row at which it ends, prompt included.
        top: likeliest tokens in the place of each, whose log-probabilities are wanted.
    """
    batch = state.token.shape[0]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    # The token that the prefill drew is not in the history yet.
    waiting = state.history.at[rows, state.cache.lengths[:, None]].set(state.token[:, None])
    state = replace(state, history=waiting, done=state.done | (state.cache.lengths + 1 >= limits))
    width = jax.eval_shape(draft, state.history, state.token).shape[1] + 1

    def going(carry: DraftCarry) -> Array:
        i, state, counts, _, _ = carry
        most = jnp.max(jnp.where(state.done, 0, counts))
        return ((i == 0) | (most + width <= size)) & ~jnp.all(state.done)

    def body(carry: DraftCarry) -> DraftCarry:
        i, state, counts, tokens, logprobs = carry
        start = state.cache.lengths + 1
        room = jnp.minimum(size - counts, limits - start)
        state, token, logprob, kept = verify(model, state, draft, sampler, keys, ends, room, top)
        state = replace(state, done=state.done | (state.cache.lengths + 1 >= limits))
        offsets = jnp.arange(width, dtype=jnp.int32)[None, :]
        at = jnp.where(kept, counts[:, None] + offsets, size)
        tokens = tokens.at[rows, at].set(token, mode="drop")
        logprobs = jax.tree.map(
            lambda whole, new: whole.at[rows, at].set(new, mode="drop"), logprobs, logprob
        )
        return i + 1, state, counts + _count(kept), tokens, logprobs

    tokens = jnp.full((batch, size), PAD, jnp.int32)
    logprobs = Logprobs.none((batch, size), top)
    carry = (jnp.int32(0), state, jnp.zeros_like(state.token), tokens, logprobs)
    _, state, _, tokens, logprobs = lax.while_loop(going, body, carry)
    # The flags twice: the state is donated to the next call before the host has read these.
    return state, tokens, logprobs, *jax.tree.map(jnp.copy, (state.done, state.faults))


def verify(
    model: DecoderLike,
    state: DraftState,
    draft: Draft,
    sampler: Transform | None,
    keys: Array | None,
    ends: Int[Array, "B M"],
    room: Int[Array, " B"],
    top: int = 0,
) -> tuple[DraftState, Int[Array, "B T"], Logprobs, Bool[Array, "B T"]]:
    """Make one pass over the proposals and keep those that the model draws itself.

    Each row that is not done keeps at least one token, and at most `room`.

    Returns:
        The next state, tokens, their log-probabilities, and which of them are kept.
    """
    held, active = state.cache.lengths, ~state.done
    proposed = draft(state.history, held + 1).astype(jnp.int32)
    order = jnp.arange(proposed.shape[1] + 1, dtype=jnp.int32)[None, :]
    known = (proposed >= 0) & (proposed < model.config.vocab)
    known = known & (order[:, 1:] < room[:, None])
    known = jnp.cumprod(known, axis=1) > 0
    tokens = jnp.concatenate([state.token[:, None], jnp.where(known, proposed, 0)], axis=1)
    counts = jnp.where(active, 1 + _count(known), 0)
    hidden, cache = model.hidden(tokens, state.cache, counts)
    logits = model.logits(hidden)  # [B, T, V]

    def choose(logits: Array, token: Array, position: Array) -> tuple[Array, Array]:
        if sampler is not None:
            logits, _ = apply(sampler, logits, state.sampling, token)
        return sampling.draw(logits, keys, position), undrawable(logits)

    positions = held[:, None] + 1 + order
    chosen, masked = jax.vmap(choose, in_axes=1, out_axes=1)(logits, tokens, positions)
    total = jax.nn.logsumexp(logits, axis=-1)
    logprobs, broken = Logprobs.of(logits, total, chosen, top), ~jnp.isfinite(total)
    bad = broken | masked
    # A token is kept if all proposals before it were drawn in their places, and none is an end.
    ended = jnp.any(chosen[..., None] == ends[:, None], axis=-1)
    goes_on = known & (chosen[:, :-1] == proposed) & ~ended[:, :-1] & ~bad[:, :-1]
    kept = jnp.cumprod(goes_on, axis=1) > 0
    kept = jnp.concatenate([active[:, None], kept & active[:, None]], axis=1)
    kept = kept & ~cache.overflowed[:, None]
    # Of what would be kept, at most the last is bad: none goes on after one.
    at_fault = kept & bad
    faults = state.faults.note(
        jnp.any(at_fault, axis=1),
        jnp.any(at_fault & broken, axis=1),
        jnp.any(at_fault & masked, axis=1),
        held + _count(kept),
    )
    kept = kept & ~bad
    count = _count(kept)
    latest = jnp.take_along_axis(chosen, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    at = jnp.where(kept, positions, state.history.shape[1])
    rows = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None]
    state = DraftState(
        cache=cache.crop(held + count),
        token=jnp.where(count > 0, latest, state.token),
        done=state.done | cache.overflowed | (faults.position >= 0) | jnp.any(kept & ended, axis=1),
        sampling=state.sampling,
        faults=faults,
        history=state.history.at[rows, at].set(chosen, mode="drop"),
        passes=state.passes + active.astype(jnp.int32),
    )
    return state, chosen, logprobs, kept


def _count(marks: Bool[Array, "B T"]) -> Int[Array, " B"]:
    """Count the marks of each row, in 32 bits whatever JAX's default is."""
    return jnp.sum(marks, axis=1, dtype=jnp.int32)
