"""Transforms that allow, forbid or favour certain tokens: biases, a least length, n-grams."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv._checks import check_integer, check_token
from jkv._pytree import pytree, replace, static
from jkv._text import brief
from jkv.decoding.transform import Parameter, Stateless, number, per_row

NONE = -1  # in the place of a token where there is none


@pytree
class LogitBias(Stateless):
    """Numbers added to the logits of some tokens.

    Example:
        >>> jkv.sampling.logit_bias({1: 5.0}).apply(jnp.zeros((1, 3))).tolist()
        [[0.0, 5.0, 0.0]]
    """

    tokens: Any  # [M] int32, NONE is none; None: all tokens in their order
    values: Any  # [M] float32

    def bind(self, vocab: int, ends: Array | np.ndarray | None) -> LogitBias:
        """Return itself, once its tokens are known to be in the vocabulary.

        Raises:
            ValueError: one is not, or another number of them.
        """
        del ends
        if self.tokens is not None:
            _check_vocab("logit_bias", self.tokens, vocab)
        elif self.values.shape[0] != vocab:
            raise ValueError(
                f"logit_bias got {self.values.shape[0]} numbers; expected {vocab}, one for each "
                "token of the model's vocabulary, or a mapping of token ids to numbers"
            )
        return self

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Add them."""
        values = jnp.asarray(self.values, logits.dtype)[None]
        if self.tokens is None:
            return logits + values
        at = jnp.where(self.tokens < 0, logits.shape[-1], self.tokens)
        return logits.at[:, at].add(values, mode="drop")


@pytree
class MinNewTokens:
    """No end before so many new tokens.

    Example:
        >>> transform = jkv.sampling.min_new_tokens(2, ends=[0])
        >>> state = transform.init(jnp.array([[1]]), vocab=3)
        >>> logits, state = transform.update(jnp.zeros((1, 3)), state, jnp.array([-1]))
        >>> logits.tolist()
        [[-inf, 0.0, 0.0]]
    """

    count: Any  # int, [] or [B]
    ends: Any = None  # [1 or B, M] int32, negative ones are none; None: those of the call

    def bind(self, vocab: int, ends: Array | np.ndarray | None) -> MinNewTokens:
        """With the call's ends, where it has none of its own.

        Raises:
            ValueError: a token outside the vocabulary.
        """
        if self.ends is not None:
            _check_vocab("min_new_tokens", self.ends, vocab)
            return self
        none = np.full((1, 1), NONE, np.int32)
        return replace(self, ends=none if ends is None else ends)

    def init(self, tokens: Int[Array, "B T"], vocab: int) -> Int[Array, " B"]:
        """Start with no new token."""
        del vocab
        return jnp.zeros((tokens.shape[0],), jnp.int32)

    def update(
        self, logits: Float[Array, "B V"], state: Int[Array, " B"], token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Int[Array, " B"]]:
        """Forbid the ends of rows with fewer tokens."""
        batch, vocab = logits.shape
        state = state + (token >= 0).astype(state.dtype)
        count = per_row("min_new_tokens", self.count, logits, jnp.int32)
        ends = jnp.asarray(NONE if self.ends is None else self.ends, jnp.int32)
        ends = jnp.broadcast_to(ends, (batch, ends.shape[-1] if ends.ndim else 1))
        at = jnp.where((ends < 0) | (state[:, None] >= count), vocab, ends)
        return logits.at[jnp.arange(batch, dtype=jnp.int32)[:, None], at].set(
            -jnp.inf, mode="drop"
        ), state


@pytree
class NoRepeatNgram:
    """No token that would repeat an n-gram of the prompt or the answer.

    Example:
        >>> transform = jkv.sampling.no_repeat_ngram(2)
        >>> state = transform.init(jnp.array([[1, 2, 1]]), vocab=3)
        >>> logits, state = transform.update(jnp.zeros((1, 3)), state, jnp.array([-1]))
        >>> logits.tolist()  # "1 2" is there already
        [[0.0, 0.0, -inf]]
    """

    n: int = static()

    def init(
        self, tokens: Int[Array, "B T"], vocab: int
    ) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
        """Move the tokens of each row together, and count them."""
        del vocab
        order = jnp.argsort(tokens < 0, axis=1, stable=True)
        lengths = jnp.sum(tokens >= 0, axis=1, dtype=jnp.int32)
        return jnp.take_along_axis(tokens, order, axis=1).astype(jnp.int32), lengths

    def update(
        self, logits: Float[Array, "B V"], state: tuple[Array, Array], token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], tuple[Array, Array]]:
        """Forbid what followed earlier occurrences of the last n - 1 tokens."""
        history, lengths = state
        batch, slots = history.shape
        rows = jnp.arange(batch, dtype=jnp.int32)
        at = jnp.where(token < 0, slots, lengths)
        history = history.at[rows, at].set(token.astype(history.dtype), mode="drop")
        lengths = lengths + (token >= 0).astype(lengths.dtype)
        places = jnp.arange(slots, dtype=jnp.int32)[None]
        # Place i holds the last token of an earlier n-gram where the n - 1 before it are the
        # row's last n - 1.
        found = (places >= self.n - 1) & (places < lengths[:, None])
        for back in range(1, self.n):
            last = jnp.take_along_axis(history, jnp.maximum(lengths - back, 0)[:, None], axis=1)
            found = found & (jnp.roll(history, back, axis=1) == last)
        vocab = logits.shape[-1]
        banned = jnp.where(found & (history >= 0), history, vocab)
        return logits.at[rows[:, None], banned].set(-jnp.inf, mode="drop"), (history, lengths)


def logit_bias(bias: Mapping[int, Parameter] | Parameter) -> LogitBias:
    """Add numbers to the logits of tokens: -inf forbids one, 5 makes it e^5 times as likely.

    As OpenAI's and vLLM's `logit_bias`, and transformers' `sequence_bias` of single tokens.

    Args:
        bias: token ids and what is added to their logits, numbers or traced scalars; or an array
            ``[V]`` with a number for each token. Other tokens and numbers compile nothing, up to
            the next power of two of them.

    Raises:
        TypeError: no mapping or array of numbers, or keys that are no ids.
        ValueError: an id below 0, NaN, or plus infinity.

    Example:
        >>> never = jkv.sampling.logit_bias({2: -jnp.inf})
        >>> never.apply(jnp.zeros((1, 3))).tolist()
        [[0.0, 0.0, -inf]]
        >>> sampler = jkv.sampling.chain(never, jkv.sampling.greedy())
    """
    if isinstance(bias, jax.Array | np.ndarray):
        if bias.ndim != 1 or not jnp.issubdtype(bias.dtype, jnp.number):
            raise TypeError(
                f"logit_bias got {bias.dtype}{list(bias.shape)}; expected numbers [V], one for "
                "each token, or a mapping of token ids to numbers"
            )
        if isinstance(bias, Tracer):
            return LogitBias(None, bias)
        values = np.asarray(jax.device_get(bias), np.float32)
        _check_bias(values.tolist())
        return LogitBias(None, values)
    if not isinstance(bias, Mapping):
        raise TypeError(
            f"logit_bias got {brief(bias)}; expected a mapping of token ids to numbers, such as "
            "{13: -5.0}"
        )
    ids = [check_token("logit_bias", token) for token in bias]
    room = max(4, 1 << max(len(ids) - 1, 0).bit_length()) - len(ids)
    values = [_scalar(value) for value in bias.values()]
    _check_bias([value for value in values if not isinstance(value, Tracer)])
    values += [0.0] * room
    traced = any(isinstance(value, Tracer) for value in values)
    stacked = jnp.stack([jnp.asarray(v, jnp.float32) for v in values]) if traced else None
    return LogitBias(
        np.asarray(ids + [NONE] * room, np.int32),
        np.asarray(values, np.float32) if stacked is None else stacked,
    )


def _scalar(value: object) -> float | Tracer:
    """Return a bias as a float, or as the tracer that it is.

    Raises:
        TypeError: it is no number.
    """
    if isinstance(value, Tracer) and value.ndim == 0:
        return value
    if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
        value = jax.device_get(value).item()
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"logit_bias got {brief(value)} for a token; expected a number")
    return float(value)


def _check_bias(values: Sequence[float]) -> None:
    for value in values:
        if math.isnan(value) or value == math.inf:
            raise ValueError(
                f"logit_bias got {value}; expected finite numbers, or -inf to forbid a token"
            )


def min_new_tokens(
    count: Parameter, ends: int | Sequence[int] | np.ndarray | jax.Array | None = None
) -> MinNewTokens:
    """Let no row end at a stop id before `count` new tokens.

    As transformers' `min_new_tokens` and vLLM's `min_tokens`: until then the ids have probability
    0. Stop strings end a row all the same. New are the tokens of this call, where `resume=` goes
    on. First in a chain, it leaves the cuts after it something to choose from.

    Args:
        count: an integer; or an array, traced or ``[B]`` with one per row.
        ends: an id or several; those at which each row of the call ends by default.

    Raises:
        ValueError: a count that is no integer of at least 0, or an id below 0.
        TypeError: no ids.

    Example:
        >>> longer = jkv.sampling.chain(jkv.sampling.min_new_tokens(4), jkv.sampling.greedy())
        >>> out = jkv.generate(lm, "ROMEO:", max_new_tokens=8, sampler=longer)
        >>> int(out.lengths[0]) >= 4
        True
    """
    what = "an integer of at least 0"
    count = number("min_new_tokens", count, what, lambda x: x >= 0, whole=True)
    if ends is None:
        return MinNewTokens(count)
    if isinstance(ends, np.ndarray | jax.Array):
        ends = np.asarray(jax.device_get(ends)).tolist()
    ids = [ends] if not isinstance(ends, Sequence) or isinstance(ends, str | bytes) else ends
    ids = [check_token("min_new_tokens", token) for token in ids]
    return MinNewTokens(count, np.asarray([ids or [NONE]], np.int32))


def no_repeat_ngram(n: int) -> NoRepeatNgram:
    """Forbid tokens that would make an n-gram which the prompt or the answer already has.

    As transformers' `no_repeat_ngram_size`. Each step looks at all tokens of the row.

    Args:
        n: tokens of an n-gram; 1 forbids every token that has been there.

    Raises:
        ValueError: n is not an integer of at least 1.

    Example:
        >>> once = jkv.sampling.chain(jkv.sampling.no_repeat_ngram(3), jkv.sampling.greedy())
    """
    return NoRepeatNgram(check_integer("no_repeat_ngram", n, 1))


def _check_vocab(name: str, tokens: Array | np.ndarray, vocab: int) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        ValueError: there is one.
    """
    if isinstance(tokens, Tracer):
        return
    highest = int(np.max(jax.device_get(tokens)))
    if highest >= vocab:
        raise ValueError(
            f"{name} got token {highest}; expected ids from 0 to {vocab - 1}, the model's "
            "vocabulary"
        )
