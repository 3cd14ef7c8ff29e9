"""What the decode loop is held against: a model without a cache, a spy, a tokenizer of letters."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 160  # tokens of the one shape in which the uncached model runs


@jax.jit
def _logits(model: Any, tokens: jax.Array) -> jax.Array:
    return model(tokens)[0]


def logits(model: Any, row: Any) -> np.ndarray:
    """Logits after each token of a row [T, V], with no cache anywhere near; padded at the end."""
    tokens = np.zeros((1, WIDTH), np.int32)
    tokens[0, : len(row)] = row
    return np.array(_logits(model, tokens))[0, : len(row)]


def greedy(model: Any, row: Any, new: int) -> list[int]:
    """The likeliest continuation, the whole prefix recomputed for each token."""
    said = list(row)
    for _ in range(new):
        said.append(int(np.argmax(logits(model, said)[-1])))
    return said[len(row) :]


def logprobs(model: Any, row: Any, new: int) -> np.ndarray:
    """Log-probability of each of a row's last `new` tokens, in float64."""
    scores = logits(model, row)[:-1].astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return scores[np.arange(len(row) - 1), np.asarray(row)[1:]][-new:]


def generated(out: Any) -> list[list[int]]:
    """A result's new tokens, row by row; what is past a row's length must be -1."""
    rows = []
    for row, length in zip(out.tokens, out.lengths, strict=True):
        assert (row[length:] == -1).all()
        assert (row[:length] >= 0).all()
        rows.append(row[:length].tolist())
    return rows


def check_cache(model: Any, out: Any) -> None:
    """A result's cache holds the keys and values of all its tokens but the last, and no more."""
    lengths = np.asarray(out.cache.lengths)
    np.testing.assert_array_equal(lengths, [len(h) - 1 for h in out.history])
    assert not np.asarray(out.cache.overflowed).any()
    if out.cache.recomputes:
        for row, held, length in zip(out.history, out.cache.shared[0].tokens, lengths, strict=True):
            np.testing.assert_array_equal(np.asarray(held)[:length], row[:-1])
        return
    for row, history in enumerate(out.history):
        for (keys, values), (want_keys, want_values) in zip(
            out.cache.to_legacy(), _fresh(model, history[:-1]), strict=True
        ):
            for got, want in ((keys, want_keys), (values, want_values)):
                length = len(history) - 1
                np.testing.assert_allclose(
                    np.asarray(got)[row, :, :length],
                    np.asarray(want)[0, :, :length],
                    rtol=2e-4,
                    atol=2e-4,
                )


@functools.partial(jax.jit, static_argnums=3)
def _prefilled(model: Any, tokens: jax.Array, counts: jax.Array, slots: int) -> Any:
    import jkv

    cache = jkv.init_cache(model.config, jkv.dense(), batch=1, slots=slots)
    return model.hidden(tokens, cache, counts)[1]


def _fresh(model: Any, row: Any) -> Any:
    tokens = np.zeros((1, WIDTH), np.int32)
    tokens[0, : len(row)] = row
    return _prefilled(model, tokens, np.asarray([len(row)], np.int32), WIDTH).to_legacy()


@jax.tree_util.register_pytree_node_class
class Spy:
    """A decoder that notes each pass that is really made: ``(T, real tokens of each row)``."""

    def __init__(self, decoder: Any, log: list | None = None):
        self.decoder, self.log = decoder, [] if log is None else log

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.decoder,), _Same(self.log)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Spy:
        return cls(children[0], aux.value)

    @property
    def config(self) -> Any:
        return self.decoder.config

    def hidden(self, tokens: Any, cache: Any, counts: Any = None) -> Any:
        new = tokens.shape[1]
        counted = jnp.full((tokens.shape[0],), new) if counts is None else counts
        jax.debug.callback(lambda c: self.log.append((new, np.asarray(c).tolist())), counted)
        return self.decoder.hidden(tokens, cache, counts)

    def logits(self, hidden: Any) -> Any:
        return self.decoder.logits(hidden)

    def passes(self) -> list[tuple[int, list[int]]]:
        """What was noted since the last call."""
        jax.effects_barrier()
        noted, self.log[:] = list(self.log), []
        return noted


class _Same:
    """Something unhashable as static data of a pytree, equal to itself only."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


class Letters:
    """A tokenizer of eleven tokens, each a piece of text; one of them is no text at all."""

    pieces = ("a", "b", "c", "d", "e", "f", "gh", "ij", " ", "", "k")

    def encode(self, text: str) -> list[int]:
        return [self.pieces.index(letter) for letter in text]

    encode_continuation = encode

    def decode(self, tokens: Any) -> str:
        return "".join(self.pieces[t] for t in tokens)

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token].encode()

    def is_special(self, token: int) -> bool:
        return False


def lm(model: Any) -> SimpleNamespace:
    """What `jkv.load` returns, as far as generation cares."""
    return SimpleNamespace(model=model, tokenizer=Letters(), config=model.config)
