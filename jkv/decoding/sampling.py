"""Sampling as a chain of small transforms of the logits, in the manner of optax.

A transform is a pair: `init(tokens, vocab)` makes its state from what has been said so far, and
`update(logits, state, token)` changes the logits of the next token, `token` being the one that
these logits follow. Any pytree with the two methods is a transform. Parameters are leaves, so
that another temperature compiles nothing.

    hot = chain(temperature(0.8), top_k(50), top_p(0.95))

After the last transform a token is drawn with the row's own key, folded with its position: what a
row says does not depend on the batch it is in, nor on where a call was cut in two.
"""

from __future__ import annotations

import abc
import math
import numbers
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from jkv._axes import Array
from jkv._pytree import pytree, static
from jkv._text import brief
from jkv.decoding.apply import apply, init_state

THREEFRY = "threefry2x32"  # the implementation of the keys that rows draw with


@runtime_checkable
class Transform(Protocol):
    """One step from the model's logits to those that are drawn from."""

    def init(self, tokens: Int[Array, "B T"], vocab: int) -> Any:
        """State after the tokens so far (-1 is padding)."""
        ...

    def update(
        self, logits: Float[Array, "B V"], state: Any, token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Any]:
        """The changed logits, and the state after `token` (-1: none since `init`)."""
        ...


class _Stateless(abc.ABC):
    def init(self, tokens: Int[Array, "B T"], vocab: int) -> tuple[()]:
        """Nothing to remember."""
        del tokens, vocab
        return ()

    def update(
        self, logits: Float[Array, "B V"], state: Any, token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Any]:
        """See the class."""
        del token
        return self.apply(logits), state

    @abc.abstractmethod
    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The changed logits."""


@pytree
class Greedy(_Stateless):
    """All weight on the likeliest token, the first of equals."""

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Minus infinity everywhere else."""
        tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        return jnp.where(tokens == likeliest(logits)[:, None], logits, -jnp.inf)


@pytree
class Temperature(_Stateless):
    """Logits divided by a temperature."""

    value: Any  # float, or an array broadcastable to [B, V]

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Flatter above 1, sharper below."""
        return logits / self.value


@pytree
class TopK(_Stateless):
    """The k likeliest tokens; those that equal the last of them stay too."""

    k: int = static()

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Minus infinity below the k-th."""
        kth = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][:, -1:]
        return jnp.where(logits < kth, -jnp.inf, logits)


@pytree
class TopP(_Stateless):
    """The nucleus: the likeliest tokens that together reach probability p (arXiv:1904.09751)."""

    p: Any

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Minus infinity outside; the likeliest token always stays."""
        order = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(order, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # Rounding carries the sum of all past 1, where everything is inside.
        inside = ((before < self.p) | (jnp.float32(self.p) >= 1)).at[:, 0].set(True)
        least = jnp.min(jnp.where(inside, order, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits < least, -jnp.inf, logits)


@pytree
class MinP(_Stateless):
    """Tokens at least p times as likely as the likeliest (arXiv:2407.01082)."""

    p: Any

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Minus infinity below."""
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.float32(self.p))
        return jnp.where(logits < floor, -jnp.inf, logits)


@pytree
class RepetitionPenalty:
    """Logits of tokens already said divided by a penalty where positive, multiplied where not.

    As in CTRL (Keskar et al. 2019, arXiv:1909.05858); the prompt counts as said.
    """

    penalty: Any

    def init(self, tokens: Int[Array, "B T"], vocab: int) -> Bool[Array, "B V"]:
        """Which tokens have been said."""
        rows = jnp.arange(tokens.shape[0])[:, None]
        said = jnp.zeros((tokens.shape[0], vocab), bool)
        return said.at[rows, jnp.where(tokens < 0, vocab, tokens)].set(True, mode="drop")

    def update(
        self, logits: Float[Array, "B V"], state: Bool[Array, "B V"], token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Bool[Array, "B V"]]:
        """Push down what has been said, the last token included."""
        vocab = logits.shape[-1]
        at = jnp.where(token < 0, vocab, token)
        state = state.at[jnp.arange(token.shape[0]), at].set(True, mode="drop")
        pushed = jnp.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return jnp.where(state, pushed, logits), state


@pytree
class Chain:
    """Transforms one after another."""

    transforms: tuple[Any, ...]

    def init(self, tokens: Int[Array, "B T"], vocab: int) -> tuple[Any, ...]:
        """The state of each."""
        return tuple(init_state(t, tokens, vocab) for t in self.transforms)

    def update(
        self, logits: Float[Array, "B V"], state: Any, token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Any]:
        """Each on the result of the one before."""
        after = []
        for transform, inner in zip(self.transforms, state, strict=True):
            logits, inner = apply(transform, logits, inner, token)
            after.append(inner)
        return logits, tuple(after)


def greedy() -> Greedy:
    """Always the likeliest token; needs no key."""
    return Greedy()


def temperature(value: Any) -> Greedy | Temperature:
    """Divide the logits by `value`; 0 is greedy, as is what is too small to divide by (1e-6).

    Raises:
        ValueError: a value below 0, or not finite.
    """
    value = _number("temperature", value, "a finite number of at least 0", lambda x: x >= 0)
    # Logits divided by less overflow float32, and the likeliest token would be one of many.
    return Greedy() if value < 1e-6 else Temperature(value)


def top_k(k: Any) -> TopK:
    """Keep the k likeliest tokens. Another k compiles anew.

    Raises:
        ValueError: k is not an integer of at least 1.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"top_k got {brief(k)}; expected an integer of at least 1")
    return TopK(int(k))


def top_p(p: Any) -> TopP:
    """Keep the likeliest tokens that together reach probability p.

    Raises:
        ValueError: p outside (0, 1].
    """
    return TopP(_number("top_p", p, "a number above 0 and at most 1", lambda x: 0 < x <= 1))


def min_p(p: Any) -> MinP:
    """Keep tokens at least p times as likely as the likeliest.

    Raises:
        ValueError: p outside (0, 1].
    """
    return MinP(_number("min_p", p, "a number above 0 and at most 1", lambda x: 0 < x <= 1))


def repetition_penalty(penalty: Any) -> RepetitionPenalty:
    """Push down tokens already said; 1 changes nothing, below 1 encourages them.

    Raises:
        ValueError: a penalty of 0 or below, or not finite.
    """
    value = _number("repetition_penalty", penalty, "a finite number above 0", lambda x: x > 0)
    return RepetitionPenalty(value)


def chain(*transforms: Any) -> Chain:
    """Several transforms as one, applied from left to right.

    Raises:
        TypeError: something that is no transform.
    """
    for transform in transforms:
        check(transform)
    return Chain(tuple(transforms))


def check(sampler: Any) -> None:
    """Refuse what is no transform.

    Raises:
        TypeError: `init` or `update` is missing, or it is no pytree of numbers.
    """
    if isinstance(sampler, type) or not isinstance(sampler, Transform):
        raise TypeError(
            f"got {brief(sampler)} as a sampler; expected one of jkv.sampling's transforms, "
            "such as jkv.sampling.temperature(0.8), or an object with init and update"
        )
    for leaf in jax.tree.leaves(sampler):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
            raise TypeError(
                f"got a sampler that holds {brief(leaf)}; expected a pytree of numbers and arrays, "
                "such as a dataclass registered with jax.tree_util.register_dataclass"
            )


def needs_key(sampler: Any) -> bool:
    """Whether a token is drawn at random: always, unless a greedy transform is in the chain."""
    if isinstance(sampler, Chain):
        return all(needs_key(t) for t in sampler.transforms)
    return sampler is not None and not isinstance(sampler, Greedy)


def row_keys(key: Any, batch: int) -> Key[Array, " B"]:
    """One key per row: folded from a single key with the row's number, or given as ``[B]``.

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
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(
            f"got keys of shape {key.shape}; expected one key, or {batch}, one per row"
        )
    return key


def _threefry(keys: Key[Array, "..."]) -> Key[Array, "..."]:
    """Threefry keys of all the bits that keys of another implementation have."""
    if str(jax.random.key_impl(keys)) == THREEFRY:
        return keys
    words = jax.random.key_data(keys).reshape(*keys.shape, -1).astype(jnp.uint32)
    made = jax.random.wrap_key_data(jnp.zeros((*keys.shape, 2), jnp.uint32), impl=THREEFRY)

    def fold(key: Array, words: Array) -> Array:
        for word in words:
            key = jax.random.fold_in(key, word)
        return key

    return fold(made, words) if keys.ndim == 0 else jax.vmap(fold)(made, words)


def draw(logits: Float[Array, "B V"], keys: Any, positions: Int[Array, " B"]) -> Int[Array, " B"]:
    """A token per row: by the Gumbel-max trick with the row's key and position, or the likeliest.

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
    """The first of the largest, or of NaN where there is any: what argmax says.

    In two plain reductions. XLA's CPU compiler does not vectorise the one of argmax, which carries
    an index beside the value: four times as long, 3 % of a decode step of eight rows of GPT-2 124M.
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    best = (logits == top) | jnp.isnan(logits)
    return jnp.min(jnp.where(best, tokens, logits.shape[-1]), axis=-1)


def _number(name: str, value: Any, expected: str, holds: Any) -> float:
    plain = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or not holds(value):
        raise ValueError(f"{name} got {brief(value)}; expected {expected}")
    return float(value)


__all__ = [
    "Chain",
    "Greedy",
    "MinP",
    "RepetitionPenalty",
    "Temperature",
    "TopK",
    "TopP",
    "Transform",
    "chain",
    "greedy",
    "min_p",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
]


def __dir__() -> list[str]:
    return sorted(__all__)
