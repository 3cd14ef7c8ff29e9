"""Penalties: transforms that push down the logits of tokens that have been there."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jkv._axes import Array
from jkv._pytree import pytree
from jkv.decoding.transform import Parameter, number, per_row


@pytree
class RepetitionPenalty:
    """Logits of tokens of prompt and answer divided by a penalty where positive, else multiplied.

    As in CTRL (Keskar et al. 2019, arXiv:1909.05858), and in transformers and vLLM.

    Example:
        >>> transform = jkv.sampling.repetition_penalty(2.0)
        >>> state = transform.init(jnp.array([[1]]), vocab=3)
        >>> transform.update(jnp.ones((1, 3)), state, jnp.array([-1]))[0].tolist()
        [[1.0, 0.5, 1.0]]
    """

    penalty: Any

    def init(self, tokens: Int[Array, "B T"], vocab: int) -> Bool[Array, "B V"]:
        """Mark the tokens of the prompts."""
        rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
        seen = jnp.zeros((tokens.shape[0], vocab), bool)
        return seen.at[rows, jnp.where(tokens < 0, vocab, tokens)].set(True, mode="drop")

    def update(
        self, logits: Float[Array, "B V"], state: Bool[Array, "B V"], token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Bool[Array, "B V"]]:
        """Push down what has been there, the last token included."""
        state = _mark(state, token)
        penalty = per_row("repetition_penalty", self.penalty, logits)
        pushed = jnp.where(logits > 0, logits / penalty, logits * penalty)
        return jnp.where(state, pushed, logits), state


@pytree
class PresencePenalty:
    """Logits of generated tokens less a penalty, however often they came.

    Example:
        >>> transform = jkv.sampling.presence_penalty(0.5)
        >>> state = transform.init(jnp.array([[1]]), vocab=3)
        >>> logits, state = transform.update(jnp.zeros((1, 3)), state, jnp.array([2]))
        >>> logits.tolist()
        [[0.0, 0.0, -0.5]]
    """

    penalty: Any

    def init(self, tokens: Int[Array, "B T"], vocab: int) -> Bool[Array, "B V"]:
        """Start with none generated: the prompt does not count."""
        return jnp.zeros((tokens.shape[0], vocab), bool)

    def update(
        self, logits: Float[Array, "B V"], state: Bool[Array, "B V"], token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Bool[Array, "B V"]]:
        """Push down what has been generated, the last token included."""
        state = _mark(state, token)
        penalty = per_row("presence_penalty", self.penalty, logits)
        return jnp.where(state, logits - penalty, logits), state


@pytree
class FrequencyPenalty:
    """Logits of generated tokens less a penalty for each time that they came.

    Example:
        >>> transform = jkv.sampling.frequency_penalty(0.5)
        >>> state = transform.init(jnp.array([[1]]), vocab=3)
        >>> logits, state = transform.update(jnp.zeros((1, 3)), state, jnp.array([2]))
        >>> transform.update(jnp.zeros((1, 3)), state, jnp.array([2]))[0].tolist()
        [[0.0, 0.0, -1.0]]
    """

    penalty: Any

    def init(self, tokens: Int[Array, "B T"], vocab: int) -> Int[Array, "B V"]:
        """Start with none generated: the prompt does not count."""
        return jnp.zeros((tokens.shape[0], vocab), jnp.int32)

    def update(
        self, logits: Float[Array, "B V"], state: Int[Array, "B V"], token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Int[Array, "B V"]]:
        """Push down what has been generated, the last token included."""
        at = jnp.where(token < 0, logits.shape[-1], token)
        state = state.at[jnp.arange(token.shape[0], dtype=jnp.int32), at].add(1, mode="drop")
        penalty = per_row("frequency_penalty", self.penalty, logits)
        # Not where the count is 0: a logit of minus infinity stays, and no other bit changes.
        return jnp.where(state > 0, logits - penalty * state.astype(logits.dtype), logits), state


def _mark(seen: Bool[Array, "B V"], token: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """`seen` with each row's token, none where it is -1."""
    at = jnp.where(token < 0, seen.shape[-1], token)
    return seen.at[jnp.arange(token.shape[0], dtype=jnp.int32), at].set(True, mode="drop")


def repetition_penalty(penalty: Parameter) -> RepetitionPenalty:
    """Push down tokens of prompt and answer; 1 changes nothing, below 1 encourages them.

    As transformers' and vLLM's `repetition_penalty`: positive logits are divided by it, others
    multiplied.

    Args:
        penalty: a number above 0; or an array, traced or ``[B]`` with one per row.

    Raises:
        ValueError: a penalty of 0 or below, or not finite.

    Example:
        >>> varied = jkv.sampling.chain(jkv.sampling.repetition_penalty(1.2), jkv.sampling.greedy())
    """
    expected = "a finite number above 0"
    return RepetitionPenalty(number("repetition_penalty", penalty, expected, lambda x: x > 0))


def presence_penalty(penalty: Parameter) -> PresencePenalty:
    """Subtract `penalty` from the logits of tokens generated so far; below 0 encourages them.

    As OpenAI's and vLLM's `presence_penalty`: what this call has generated counts, and its prompt
    does not. Neither does what an earlier call generated, where `resume=` goes on.

    Args:
        penalty: a number, from -2 to 2 as a rule; or an array, traced or ``[B]`` with one per row.

    Raises:
        ValueError: a penalty that is not finite.

    Example:
        >>> varied = jkv.sampling.chain(jkv.sampling.presence_penalty(0.5), jkv.sampling.greedy())
    """
    return PresencePenalty(number("presence_penalty", penalty, "a finite number", math.isfinite))


def frequency_penalty(penalty: Parameter) -> FrequencyPenalty:
    """Subtract `penalty` from a token's logit for each time that it was generated so far.

    As OpenAI's and vLLM's `frequency_penalty`: what this call has generated counts, and its prompt
    does not. Neither does what an earlier call generated, where `resume=` goes on.

    Args:
        penalty: a number, from -2 to 2 as a rule; or an array, traced or ``[B]`` with one per row.

    Raises:
        ValueError: a penalty that is not finite.

    Example:
        >>> varied = jkv.sampling.chain(jkv.sampling.frequency_penalty(0.5), jkv.sampling.greedy())
    """
    return FrequencyPenalty(number("frequency_penalty", penalty, "a finite number", math.isfinite))
