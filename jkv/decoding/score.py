"""Scores of given texts: the log-probability of each token under the model."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jkv._axes import Array
from jkv._checks import check_integer
from jkv._transfer import transfers
from jkv.cache import sharding
from jkv.cache.base import Cache
from jkv.cache.dense import dense
from jkv.decoding import capacity, programs
from jkv.decoding.arguments import CacheLike, DecoderLike, Model, Prompts
from jkv.decoding.capacity import bucket
from jkv.decoding.faults import MODEL
from jkv.decoding.logprobs import Logprobs
from jkv.decoding.options import check_top_logprobs, resolve_kind
from jkv.decoding.prompts import PAD, pad_rows, rows_of_tokens, split_model
from jkv.errors import NonFiniteError

PART = 16  # tokens per row whose logits are there at a time


@dataclasses.dataclass(frozen=True, repr=False)
class Scores:
    """What `score` returns.

    Attributes:
        tokens: ``[B, T]`` int32, of the prompts, -1 after a row's end.
        lengths: ``[B]``, tokens of each.
        logprobs: ``[B, T]`` float32 natural logarithms of each token given those before it; 0 for a
            row's first token, which nothing comes before, and after a row's end.
        top_tokens: ``[B, T, k]`` int32, the k likeliest in the place of each token, the likeliest
            first, -1 where there are none; None unless asked for.
        top_logprobs: ``[B, T, k]`` float32, theirs.

    Example:
        >>> scores = jkv.score(lm, ["To be, or not to be", "To be"])
        >>> scores.totals.shape, scores.perplexities.shape
        ((2,), (2,))
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    top_tokens: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None

    @property
    def totals(self) -> np.ndarray:
        """Log-probability of each row given its first token, ``[B]`` float64."""
        return self.logprobs.astype(np.float64).sum(axis=1)

    @property
    def perplexities(self) -> np.ndarray:
        """Perplexity of each row, its first token left out, ``[B]``; NaN for rows of one token."""
        count = np.where(self.lengths > 1, self.lengths - 1, np.nan)
        return np.exp(-self.totals / count)

    def __repr__(self) -> str:
        """Shapes rather than numbers."""
        return f"Scores(tokens=int32{list(self.tokens.shape)}, lengths={self.lengths.tolist()})"


@transfers
def score(
    model: Model,
    prompts: Prompts,
    *,
    top_logprobs: int = 0,
    cache: CacheLike | None = None,
    prefill_chunk: int = 256,
) -> Scores:
    """Score prompts of any lengths, in one batch: each token's log-probability given those before.

    Args:
        model: `lm.model`, or `lm` where prompts are texts.
        prompts: a list of rows, each a list or array of ids (or a text), or an array ``[B, T]``;
            one text is one row. What the tokenizer puts before a text (a BOS) is a token too.
        top_logprobs: k, alternatives per token.
        cache: the kind or its text ("int4"), `jkv.dense()` by default: what the model sees of a
            text that is longer than a chunk.
        prefill_chunk: tokens per pass, at least 16.

    Raises:
        TypeError: prompts or a kind of a wrong type.
        ValueError: empty prompts, ids outside the vocabulary, more tokens than the model's context,
            or numbers out of range.
        NonFiniteError: the model's logits are NaN or infinite; with the rows and tokens.

    Example:
        >>> scores = jkv.score(lm, ["To be, or not to be", "To be, or not to eat"])
        >>> bool(scores.totals[0] > scores.totals[1])  # the first is the likelier one
        True
        >>> scores.perplexities.shape
        (2,)
    """
    decoder, tokenizer = split_model(model)
    config = decoder.config
    rows = rows_of_tokens(prompts, config.vocab, tokenizer=tokenizer)
    chunk, top = (
        check_integer("prefill_chunk", prefill_chunk, 16),
        check_top_logprobs(top_logprobs, config.vocab),
    )
    kind = dense() if cache is None else resolve_kind(cache)
    longest = max(map(len, rows))
    capacity.check_limit(config, kind, longest, 0, min(chunk, longest))
    # The last token of a row has nothing after it.
    counts = np.asarray([len(row) - 1 for row in rows], np.int32)
    slots = bucket(max(longest - 1, 1))
    mesh = sharding.mesh_of(decoder)
    held = programs.init_cache_jit(config, kind, len(rows), slots, config.dtype, mesh)
    logprobs = np.zeros((len(rows), longest), np.float32)
    top_tokens = np.full((len(rows), longest, top), PAD, np.int32)
    top_values = np.zeros((len(rows), longest, top), np.float32)
    bad: list[tuple[int, int]] = []
    done = 0
    while done < longest - 1:
        size = min(chunk, bucket(longest - 1 - done, 16))
        tokens = pad_rows([row[:-1][done : done + size] for row in rows], size)
        following = pad_rows([row[1:][done : done + size] for row in rows], size)
        here = np.clip(counts - done, 0, size)
        found, finite, held = _score_jit(
            decoder, np.maximum(tokens, 0), held, here, following, top=top
        )
        width = min(size, longest - 1 - done)
        places = slice(done + 1, done + 1 + width)
        logprobs[:, places] = np.asarray(found.chosen)[:, :width]
        top_tokens[:, places] = np.asarray(found.top_tokens)[:, :width]
        top_values[:, places] = np.asarray(found.top)[:, :width]
        bad += [(int(b), int(t) + done + 1) for b, t in np.argwhere(~np.asarray(finite))]
        done += size
    if bad:
        raise NonFiniteError(f"tokens could not be scored: {', '.join(_first_of(bad))}: {MODEL}")
    held.check()
    return Scores(
        tokens=pad_rows(rows, longest),
        lengths=np.asarray([len(row) for row in rows]),
        logprobs=logprobs,
        top_tokens=top_tokens if top else None,
        top_logprobs=top_values if top else None,
    )


def _first_of(bad: list[tuple[int, int]]) -> list[str]:
    """Name the first bad token of each row."""
    first: dict[int, int] = {}
    for row, token in bad:
        first[row] = min(token, first.get(row, token))
    return [f"row {row} at token {token}" for row, token in sorted(first.items())]


@functools.partial(jax.jit, static_argnames="top", donate_argnums=2)
def _score_jit(
    model: DecoderLike, tokens: Array, cache: Cache, counts: Array, following: Array, *, top: int
) -> tuple[Logprobs, Array, Cache]:
    """Score one chunk: log-probabilities of the tokens that follow, which are finite, the cache.

    Args:
        model: a decoder.
        tokens: ``[B, T]``.
        cache: of those before, donated.
        counts: ``[B]``, how many are real.
        following: ``[B, T]``, the token after each, -1 where there is none.
        top: k.
    """
    hidden, cache = model.hidden(tokens, cache, counts)
    batch, new, width = hidden.shape
    parts = -(-new // PART)
    spare = ((0, 0), (0, parts * PART - new))
    hidden = jnp.pad(hidden, (*spare, (0, 0))).reshape(batch, parts, PART, width)
    after = jnp.pad(following, spare, constant_values=PAD).reshape(batch, parts, PART)

    def part(what: tuple[Array, Array]) -> tuple[Logprobs, Array]:
        hidden, after = what
        logits = model.logits(hidden)
        total = jax.nn.logsumexp(logits, axis=-1)
        found = Logprobs.of(logits, total, jnp.maximum(after, 0), top)
        return found.where(after >= 0), jnp.isfinite(total) | (after < 0)

    # All logits of a chunk would be [B, T, V]: a gigabyte for large vocabularies.
    found = lax.map(part, (jnp.swapaxes(hidden, 0, 1), jnp.swapaxes(after, 0, 1)))

    def joined(leaf: Array) -> Array:
        leaf = jnp.swapaxes(leaf, 0, 1)
        return leaf.reshape(batch, parts * PART, *leaf.shape[3:])[:, :new]

    found, finite = jax.tree.map(joined, found)
    return found, finite, cache
