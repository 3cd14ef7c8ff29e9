"""Sampling as a chain of small transforms of the logits, in the manner of optax.

A transform is a pair: `init(tokens, vocab)` makes its state from the prompts, and
`update(logits, state, token)` changes the logits of the next token, `token` being the one that
these logits follow. Any pytree with the two methods is a transform, and so is a plain function of
the logits ``[B, V]`` that returns as many. Parameters are leaves, so that another temperature
compiles nothing; they may be traced, or arrays ``[B]`` of one per row.

    hot = chain(temperature(0.8), top_k(50), top_p(0.95))
    no_newline = chain(lambda logits: logits.at[:, 10].set(-jnp.inf), greedy())

A function is known by itself: one that is made anew for each call is compiled for each.

After the last transform a token is drawn with the row's own key, folded with its position: a row's
tokens do not depend on the batch that it is in, nor on where a call was cut in two. A chain with
`greedy()` draws nothing, and needs no key.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key, PyTree

from jkv._axes import Array
from jkv._pytree import pytree, static
from jkv._text import brief
from jkv.decoding.apply import apply, init_state
from jkv.decoding.constraints import LogitBias, MinNewTokens, NoRepeatNgram
from jkv.decoding.constraints import logit_bias as logit_bias
from jkv.decoding.constraints import min_new_tokens as min_new_tokens
from jkv.decoding.constraints import no_repeat_ngram as no_repeat_ngram
from jkv.decoding.penalties import FrequencyPenalty, PresencePenalty, RepetitionPenalty
from jkv.decoding.penalties import frequency_penalty as frequency_penalty
from jkv.decoding.penalties import presence_penalty as presence_penalty
from jkv.decoding.penalties import repetition_penalty as repetition_penalty
from jkv.decoding.transform import Function, Parameter, Stateless, Transform, number, per_row

THREEFRY = "threefry2x32"  # the implementation of the keys that rows draw with

# Of a share of probability: sums in float32 miss a boundary by as much on either side.
ROUNDING = 2e-6
LEAST_TEMPERATURE = 1e-6

# What is defined there makes transforms; given itself, it was not called.
_MODULES = (__name__, "jkv.decoding.constraints", "jkv.decoding.penalties")


@pytree
class Greedy(Stateless):
    """All weight on the likeliest token, the first of equals.

    Example:
        >>> jkv.sampling.greedy().apply(jnp.array([[1.0, 3.0]])).tolist()
        [[-inf, 3.0]]
    """

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Set all other tokens to minus infinity."""
        tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        return jnp.where(tokens == likeliest(logits)[:, None], logits, -jnp.inf)


@pytree
class Temperature(Stateless):
    """Logits divided by a temperature.

    Example:
        >>> jkv.sampling.temperature(0.5).apply(jnp.array([[1.0, 3.0]])).tolist()
        [[2.0, 6.0]]
    """

    value: Any  # float, or an array [], [B] or broadcastable to [B, V]
    may_be_zero: bool = static(default=False)

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Flatten above 1, sharpen below; a row at 0 keeps its likeliest token alone."""
        value = per_row("temperature", self.value, logits)
        if not self.may_be_zero:
            return logits / value
        cold = value < LEAST_TEMPERATURE
        return jnp.where(cold, Greedy().apply(logits), logits / jnp.where(cold, 1, value))


@pytree
class TopK(Stateless):
    """The k likeliest tokens; those that equal the last of them stay too.

    Example:
        >>> jkv.sampling.top_k(2).k
        2
    """

    k: int = static()

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Set tokens below the k-th to minus infinity."""
        kth = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][:, -1:]
        return jnp.where(logits < kth, -jnp.inf, logits)


@pytree
class TopKArray(Stateless):
    """`TopK` with k as an array, traced or one per row: sorts all tokens instead of finding k."""

    k: Any  # int [] or [B]

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Set tokens below each row's k-th to minus infinity."""
        order = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        at = jnp.clip(per_row("top_k", self.k, logits, jnp.int32) - 1, 0, logits.shape[-1] - 1)
        at = jnp.broadcast_to(at, (logits.shape[0], 1))
        return jnp.where(logits < jnp.take_along_axis(order, at, axis=1), -jnp.inf, logits)


@pytree
class TopP(Stateless):
    """The nucleus: the likeliest tokens that together reach probability p (arXiv:1904.09751).

    Example:
        >>> jkv.sampling.top_p(0.9).p
        0.9
    """

    p: Any

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Set tokens outside to minus infinity; the likeliest token always stays."""
        p = per_row("top_p", self.p, logits)
        order = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(order, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # Tokens before that sum to p exactly are enough. Rounding carries the sum of all past 1,
        # where everything is inside.
        inside = ((before < p * (1 - ROUNDING)) | (p >= 1)).at[:, 0].set(True)
        least = jnp.min(jnp.where(inside, order, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits < least, -jnp.inf, logits)


@pytree
class MinP(Stateless):
    """Tokens at least p times as likely as the likeliest (arXiv:2407.01082).

    Example:
        >>> jkv.sampling.min_p(0.5).p
        0.5
    """

    p: Any

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Set less likely tokens to minus infinity; exactly p times as likely is likely enough."""
        best = jnp.max(logits, axis=-1, keepdims=True)
        floor = jnp.log(per_row("min_p", self.p, logits)) - ROUNDING
        return jnp.where(logits - best < floor, -jnp.inf, logits)


@pytree
class Chain:
    """Transforms one after another.

    Example:
        >>> hot = jkv.sampling.chain(jkv.sampling.temperature(0.8), jkv.sampling.top_k(50))
        >>> len(hot.transforms)
        2
    """

    transforms: tuple[Any, ...]

    def init(self, tokens: Int[Array, "B T"], vocab: int) -> tuple[Any, ...]:
        """Make the state of each."""
        return tuple(init_state(t, tokens, vocab) for t in self.transforms)

    def update(
        self, logits: Float[Array, "B V"], state: PyTree, token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Any]:
        """Apply each to the result of the one before."""
        after = []
        for transform, inner in zip(self.transforms, state, strict=True):
            logits, inner = apply(transform, logits, inner, token)
            after.append(inner)
        return logits, tuple(after)


def greedy() -> Greedy:
    """Take the likeliest token always; needs no key.

    Example:
        >>> out = jkv.generate(lm, "ROMEO:", max_new_tokens=8, sampler=jkv.sampling.greedy())
    """
    return Greedy()


def temperature(value: Parameter) -> Greedy | Temperature:
    """Divide the logits by `value`; 0 is greedy, as is what is too small to divide by (1e-6).

    Args:
        value: a number; or an array, traced or ``[B]`` with one per row. Only a plain 0 is known
            to draw nothing: with arrays a key is needed.

    Raises:
        ValueError: a value below 0, or not finite.

    Example:
        >>> hot, key = jkv.sampling.temperature(0.8), jax.random.key(0)
        >>> out = jkv.generate(lm, "ROMEO:", max_new_tokens=8, sampler=hot, key=key)
    """
    value = number("temperature", value, "a finite number of at least 0", lambda x: x >= 0)
    if not isinstance(value, float):
        return Temperature(value, may_be_zero=True)
    # Logits divided by less overflow float32, and the likeliest token would be one of many.
    return Greedy() if value < LEAST_TEMPERATURE else Temperature(value)


def top_k(k: Parameter) -> TopK | TopKArray:
    """Keep the k likeliest tokens.

    Args:
        k: an int, of which another compiles anew; or an array, traced or ``[B]`` with one per row,
            for which all tokens are sorted.

    Raises:
        ValueError: k is not an integer of at least 1.

    Example:
        >>> jkv.sampling.top_k(1).apply(jnp.array([[1.0, 3.0]])).tolist()
        [[-inf, 3.0]]
    """
    k = number("top_k", k, "an integer of at least 1", lambda x: x >= 1, whole=True)
    return TopK(k) if isinstance(k, int) else TopKArray(k)


def top_p(p: Parameter) -> TopP:
    """Keep the likeliest tokens that together reach probability p.

    Args:
        p: a number above 0 and at most 1; or an array, traced or ``[B]`` with one per row.

    Raises:
        ValueError: p outside (0, 1].

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
        >>> jnp.isfinite(jkv.sampling.top_p(0.6).apply(logits)).tolist()
        [[True, True, False]]
    """
    return TopP(number("top_p", p, "a number above 0 and at most 1", lambda x: 0 < x <= 1))


def min_p(p: Parameter) -> MinP:
    """Keep tokens at least p times as likely as the likeliest.

    Args:
        p: a number above 0 and at most 1; or an array, traced or ``[B]`` with one per row.

    Raises:
        ValueError: p outside (0, 1].

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
        >>> jnp.isfinite(jkv.sampling.min_p(0.5).apply(logits)).tolist()
        [[True, True, False]]
    """
    return MinP(number("min_p", p, "a number above 0 and at most 1", lambda x: 0 < x <= 1))


def chain(*transforms: Transform | Callable[[Array], Array]) -> Chain:
    """Make several transforms into one, applied from left to right.

    Args:
        transforms: of this module, of your own, or plain functions of the logits ``[B, V]``.

    Raises:
        TypeError: something that is no transform.

    Example:
        >>> hot = [jkv.sampling.temperature(0.8), jkv.sampling.top_p(0.95)]
        >>> sampler = jkv.sampling.chain(jkv.sampling.repetition_penalty(1.1), *hot)
    """
    return Chain(tuple(check(transform) for transform in transforms))


def check(sampler: object) -> Transform:
    """Make a transform of what a user gave: a plain function is one of the logits.

    Raises:
        TypeError: `init` or `update` is missing, it is a function of something else, or it is no
            pytree of numbers.
    """
    maker = getattr(sampler, "__module__", "") in _MODULES and inspect.isfunction(sampler)
    known = isinstance(sampler, Transform) or callable(sampler)
    if isinstance(sampler, type) or maker or not known:
        raise TypeError(
            f"got {brief(sampler)} as a sampler; expected one of jkv.sampling's transforms, such "
            "as jkv.sampling.temperature(0.8), a function of the logits [B, V], or an object with "
            "init and update"
        )
    if not isinstance(sampler, Transform):
        return _function(cast(Callable[..., object], sampler))
    for leaf in jax.tree.leaves(sampler):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
            raise TypeError(
                f"got a sampler that holds {brief(leaf)}; expected a pytree of numbers and arrays, "
                "such as a dataclass registered with jax.tree_util.register_dataclass"
            )
    return sampler


def _function(function: Callable[..., object]) -> Function:
    """Make a transform of a user's function; arrays that it holds as a pytree stay arguments."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise TypeError(
            f"got {brief(function)} as a sampler, which cannot be called with one argument; "
            "expected a function of the logits [B, V] that returns as many. What looks back at "
            "tokens is an object with init and update, see jkv.sampling.Transform"
        ) from None
    except ValueError:  # written in C, and silent about its arguments
        pass
    if not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(function)):
        if function.__hash__ is None:
            raise TypeError(
                f"got {brief(function)} as a sampler, which is neither hashable nor a pytree of "
                "arrays; expected a function or a frozen dataclass"
            )
        function = jax.tree_util.Partial(function)
    return Function(function)


@overload
def bind(
    sampler: Transform | Callable[[Array], Array],
    vocab: int,
    ends: Array | np.ndarray | None = None,
) -> Transform: ...
@overload
def bind(
    sampler: object, vocab: int, ends: Array | np.ndarray | None = None
) -> Transform | None: ...
def bind(sampler: object, vocab: int, ends: Array | np.ndarray | None = None) -> Transform | None:
    """Make a transform of what a user gave, for rows of one model that end at `ends`.

    Args:
        sampler: see `check`; None stays None.
        vocab: V.
        ends: ``[B, M]`` or ``[1, M]`` token ids at which rows end, negative ones are none. None:
            they end nowhere.

    Raises:
        TypeError: see `check`.
        ValueError: tokens outside the vocabulary.
    """
    if sampler is None:
        return None
    sampler = check(sampler)
    if isinstance(sampler, Chain):
        return Chain(tuple(bind(transform, vocab, ends) for transform in sampler.transforms))
    if isinstance(sampler, LogitBias | MinNewTokens):
        return sampler.bind(vocab, ends)
    return sampler


def needs_key(sampler: object) -> bool:
    """Tell whether tokens are drawn at random: unless a greedy transform is in the chain."""
    if isinstance(sampler, Chain):
        return all(needs_key(t) for t in sampler.transforms)
    return sampler is not None and not isinstance(sampler, Greedy)


def row_keys(key: object, batch: int) -> Key[Array, " B"]:
    """Return one key per row: folded from a single key with the row's number, or given as ``[B]``.

    They are threefry keys whatever implementation the given ones are of: `jax.vmap` over keys of
    "rbg" and "unsafe_rbg" draws for the whole batch from its first key, and a row's tokens would
    depend on its neighbours.

    Raises:
        TypeError: not a typed key.
        ValueError: keys of another shape.
    """
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"got key={brief(key)}; expected jax.random.key(seed), or one such key per row"
        )
    key = _threefry(key)
    if key.shape == ():
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(
            jnp.arange(batch, dtype=jnp.int32)
        )
    if key.shape != (batch,):
        raise ValueError(
            f"got keys of shape {key.shape}; expected one key, or {batch}, one per row"
        )
    return key


def _threefry(keys: Key[Array, "..."]) -> Key[Array, "..."]:
    """Convert keys of another implementation, with all their bits, to threefry keys."""
    if str(jax.random.key_impl(keys)) == THREEFRY:
        return keys
    words = jax.random.key_data(keys).reshape(*keys.shape, -1).astype(jnp.uint32)
    made = jax.random.wrap_key_data(jnp.zeros((*keys.shape, 2), jnp.uint32), impl=THREEFRY)

    def fold(key: Array, words: Array) -> Array:
        for word in words:
            key = jax.random.fold_in(key, word)
        return key

    return fold(made, words) if keys.ndim == 0 else jax.vmap(fold)(made, words)


def draw(
    logits: Float[Array, "B V"], keys: Array | None, positions: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Draw a token per row: the likeliest, or by the Gumbel-max trick with key and position.

    Args:
        logits: after all transforms.
        keys: ``[B]``, or None for the likeliest token.
        positions: of the token that is drawn.
    """
    if keys is None:
        return likeliest(logits)

    def noise(key: Array, position: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, position), logits.shape[1:], jnp.float32)

    return likeliest(logits + jax.vmap(noise)(keys, positions))


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Return the first of the largest, or of NaN where there is any, as argmax does.

    In two plain reductions. XLA's CPU compiler does not vectorise the one of argmax, which carries
    an index beside the value: four times as long, 3 % of a decode step of eight rows of GPT-2 124M.
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    best = (logits == top) | jnp.isnan(logits)
    return jnp.min(jnp.where(best, tokens, logits.shape[-1]), axis=-1)


__all__ = [
    "Chain",
    "FrequencyPenalty",
    "Greedy",
    "LogitBias",
    "MinNewTokens",
    "MinP",
    "NoRepeatNgram",
    "PresencePenalty",
    "RepetitionPenalty",
    "Temperature",
    "TopK",
    "TopP",
    "Transform",
    "chain",
    "frequency_penalty",
    "greedy",
    "logit_bias",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram",
    "presence_penalty",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
]


def __dir__() -> list[str]:
    return sorted(__all__)
