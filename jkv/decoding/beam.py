"""Beam search: the likeliest continuations that a search of limited width finds."""

from __future__ import annotations

import dataclasses
import functools
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from jkv._axes import Array
from jkv._checks import check_flag, check_integer, check_number
from jkv._pytree import pytree, replace
from jkv._text import brief
from jkv._transfer import transfers
from jkv.cache.base import Cache
from jkv.decoding import loop, programs
from jkv.decoding.arguments import DecoderLike, Model, Prompts, TokenizerLike
from jkv.decoding.capacity import bucket
from jkv.decoding.faults import Faults
from jkv.decoding.generation import read_prompts
from jkv.decoding.job import Job, prepare
from jkv.decoding.options import Options, SearchOptions, keywords
from jkv.decoding.prompts import PAD
from jkv.decoding.result import texts_of


@dataclasses.dataclass(frozen=True, repr=False)
class Beams:
    """What `beam_search` finds: W hypotheses for each prompt, the best first.

    Attributes:
        tokens: ``[B, W, T]`` int32, new tokens, -1 after a hypothesis' end.
        scores: ``[B, W]`` float32, the sum of its tokens' natural log-probabilities divided by its
            length to the power of `length_penalty`.
        lengths: ``[B, W]``, new tokens of each, the one that ended it included.
        finish_reasons: per prompt and hypothesis "stop" or "length".
        history: per prompt all its tokens, those of a resumed result included.

    Example:
        >>> found = jkv.beam_search(lm, "ROMEO:", max_new_tokens=8, beams=2)
        >>> bool(found.scores[0, 0] >= found.scores[0, 1])  # the best first
        True
    """

    tokens: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray
    finish_reasons: tuple[tuple[str, ...], ...]
    history: tuple[np.ndarray, ...]
    tokenizer: TokenizerLike | None = None  # for `texts`; None where the search had none

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """The new text of each prompt's hypotheses, the best first; see `Result.texts`.

        Raises:
            UnsupportedError: no tokenizer took part.
        """
        found = []
        for prompt, rows, lengths in zip(self.history, self.tokens, self.lengths, strict=True):
            whole = [np.append(prompt, row[:n]) for row, n in zip(rows, lengths, strict=True)]
            found.append(texts_of(self.tokenizer, whole, lengths))
        return tuple(found)

    def __repr__(self) -> str:
        """Shapes rather than numbers."""
        return f"Beams(tokens=int32{list(self.tokens.shape)}, lengths={self.lengths.tolist()})"


@pytree
class Hypotheses:
    """Hypotheses that have ended, the best first."""

    tokens: Array  # [B, W, T] int32
    scores: Array  # [B, W] float32, -inf where there is none yet
    lengths: Array  # [B, W] int32
    stopped: Array  # [B, W] bool, by a token rather than by the length


@pytree
class BeamState:
    """A search between two steps: what runs, the likeliest first, and what has ended."""

    cache: Cache  # a row per beam, those of a prompt next to each other
    tokens: Array  # [B, W, T] int32
    sums: Array  # [B, W] float32, of log-probabilities; -inf where nothing runs
    found: Hypotheses
    done: Array  # [B] bool
    faults: Faults  # prompts that ended because a beam's logits could not be ranked


# Of the compiled loop: the step, the state, and each beam's parent [B, W].
Carry = tuple[Array, BeamState, Array]


@transfers
@keywords(SearchOptions, Options)
def beam_search(
    model: Model,
    prompts: Prompts,
    *,
    beams: int = 4,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    **options: Unpack[SearchOptions],
) -> Beams:
    """Search the W best continuations of each prompt, among those that W beams come across.

    Each step extends all running beams by all tokens. Of the W likeliest extensions those that end
    are kept as hypotheses, with the score ``sum of log-probabilities / length ** length_penalty``;
    the W likeliest that don't end run on. The extensions of the last step all end. A prompt is done
    when no beam that still runs can reach the score of its W-th hypothesis. One beam is greedy
    decoding: there, the first end is the only one.

    The prompts are prefilled once; the beams' caches are copies of theirs, reordered at each step.

    Args:
        model: `lm.model`, or `lm` where prompts are texts.
        prompts: one row each, or one text; see `jkv.generate`.
        beams: W, at most the vocabulary. Another number compiles anew.
        length_penalty: 0 compares plain sums, which favours short hypotheses, 1 the mean per token.
        early_stopping: a prompt is done as soon as it has W hypotheses, whatever the beams that
            still run could reach.
        options: keywords of `jkv.generate`, which describes them. `max_new_tokens` is the length
            of a hypothesis at most, and `stop` takes token ids only.

    Raises:
        TypeError: prompts or stops of a wrong type, or `early_stopping` no bool.
        ValueError: numbers out of range, stop strings, or what `jkv.generate` refuses.
        CacheFullError: `slots` too small for what is asked.
        NonFiniteError: the logits of a beam are NaN or infinite.

    Reference: Wu et al. 2016, arXiv:1609.08144 (section 7), with the length penalty of Hugging
    Face's `generate(num_beams=W, early_stopping="never")`, which finds the same.

    Example:
        >>> found = jkv.beam_search(lm, "ROMEO:", max_new_tokens=8, beams=2)
        >>> found.tokens.shape, len(found.texts[0])  # [B, W, T]
        ((1, 2, 8), 2)
    """
    width = check_integer("beams", beams, 1)
    penalty = check_number("length_penalty", length_penalty)
    early = check_flag("early_stopping", early_stopping)
    # One block: all steps are one program.
    job = prepare(model, prompts, Options(block=options["max_new_tokens"], **options))
    if width > job.model.config.vocab:
        raise ValueError(
            f"beams got {width}; expected at most {job.model.config.vocab}, the model's vocabulary"
        )
    strings = [s for row in job.stops.strings for s in row]
    if strings:
        raise ValueError(
            f"stop got the string {brief(strings[0])}; beams end at token ids only: expected those"
        )
    last, cache = read_prompts(job.model, job.unread, job.cache, job.chunk, job.progress)
    last, copies = programs.fork(last, cache, width)
    search = search_jit(
        width,
        bucket(job.max_new, 16),
        job.model,
        last,
        copies,
        job.ends,
        np.int32(job.max_new),
        np.float32(penalty),
        np.bool_(early or width == 1),
    )
    search.cache.check()
    prompts_end = np.asarray([len(row) for row in job.history])
    search.faults.check(np.asarray(search.faults.position) - prompts_end)
    return _read(search.found, job)


def _read(found: Hypotheses, job: Job) -> Beams:
    lengths = np.asarray(found.lengths)
    stopped = np.asarray(found.stopped).tolist()
    return Beams(
        tokens=np.array(found.tokens)[:, :, : int(lengths.max())],
        scores=np.array(found.scores),
        lengths=lengths,
        finish_reasons=tuple(tuple("stop" if s else "length" for s in row) for row in stopped),
        history=tuple(job.history),
        tokenizer=job.tokenizer,
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def search_jit(
    width: int,
    size: int,
    model: DecoderLike,
    last: Array,
    cache: Cache,
    ends: Array,
    steps: Array,
    penalty: Array,
    early: Array,
) -> BeamState:
    """Search after a prefill: `steps` of at most `size` tokens, fewer where all are done.

    Args:
        width: W.
        size: T.
        model: a decoder.
        last: ``[B * W, D]``, hidden states after the prompts.
        cache: of as many rows.
        ends: ``[B, M]``, tokens that end a hypothesis.
        steps: tokens per hypothesis, at most.
        penalty: the exponent of a hypothesis' length.
        early: whether W hypotheses are enough.
    """
    batch = last.shape[0] // width
    nothing = jnp.full((batch, width, size), PAD, jnp.int32)
    worst = jnp.full((batch, width), -jnp.inf, jnp.float32)
    search = BeamState(
        cache=cache,
        tokens=nothing,
        sums=worst.at[:, 0].set(0.0),  # all beams are the same so far, and would stay so
        found=Hypotheses(
            tokens=nothing,
            scores=worst,
            lengths=jnp.zeros((batch, width), jnp.int32),
            stopped=jnp.zeros((batch, width), bool),
        ),
        done=jnp.zeros((batch,), bool),
        faults=Faults.none(batch),
    )

    def chosen(i: Array, logits: Array, search: BeamState) -> tuple[BeamState, Array]:
        logits = logits.reshape(batch, width, -1)
        return select(search, logits, ends, i, steps, penalty, early)

    def going(carry: Carry) -> Array:
        i, search, _ = carry
        return (i < steps) & ~jnp.all(search.done)

    def body(carry: Carry) -> Carry:
        i, search, parents = carry
        if width > 1:
            # Here and not where the parents are chosen: a layer at a time needs room for its copy,
            # about half the memory that all of them at once need.
            rows = (jnp.arange(batch, dtype=jnp.int32)[:, None] * width + parents).reshape(-1)
            search = replace(search, cache=search.cache.take(rows))
        token = lax.dynamic_index_in_dim(search.tokens, i - 1, axis=2, keepdims=False)
        active = jnp.repeat(~search.done, width)
        logits, cache = loop.decode_step(model, token.reshape(-1), search.cache, active)
        search, parents = chosen(i, logits, replace(search, cache=cache))
        return i + 1, search, parents

    search, parents = chosen(jnp.int32(0), model.logits(last), search)
    return lax.while_loop(going, body, (jnp.int32(1), search, parents))[1]


def select(
    search: BeamState,
    logits: Float[Array, "B W V"],
    ends: Int[Array, "B M"],
    i: Int[Array, ""],
    steps: Int[Array, ""],
    penalty: Float[Array, ""],
    early: Bool[Array, ""],
) -> tuple[BeamState, Int[Array, "B W"]]:
    """Extend the beams by token number `i`: the next search, and which beam each comes from."""
    batch, width, vocab = logits.shape
    # Beams that don't run are copies of others, or rows of a prompt that is done.
    broken = ~jnp.isfinite(jax.nn.logsumexp(logits, axis=-1)) & ~jnp.isneginf(search.sums)
    broken, position = jnp.any(broken, axis=1), search.cache.lengths.reshape(batch, width)[:, 0]
    faults = search.faults.note(~search.done, broken, broken, position)
    sums = search.sums[:, :, None] + jax.nn.log_softmax(logits)
    at = jnp.where(ends < 0, vocab, ends)  # negative indices would wrap
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    ending = jnp.zeros((batch, vocab), bool).at[rows, at].set(True, mode="drop")
    final = i + 1 >= steps

    def best(sums: Array) -> tuple[Array, Array, Array, Array]:
        """Find the W best extensions: their sums, parents, tokens and whole sequences."""
        top, index = lax.top_k(sums.reshape(batch, -1), width)
        parents, tokens = index // vocab, index % vocab
        sequences = jnp.take_along_axis(search.tokens, parents[:, :, None], axis=1)
        sequences = lax.dynamic_update_index_in_dim(sequences, tokens, i, axis=2)
        return top, parents, tokens, sequences

    top, _, tokens, sequences = best(sums)
    stopped = jnp.take_along_axis(ending, tokens, axis=1)
    ended = (stopped | final) & ~search.done[:, None] & ~jnp.isneginf(top)
    length = (i + 1).astype(jnp.float32)
    fresh = Hypotheses(
        tokens=sequences,
        scores=jnp.where(ended, top / length**penalty, -jnp.inf),
        lengths=jnp.full((batch, width), i + 1, jnp.int32),
        stopped=stopped,
    )
    found = _better(search.found, fresh)

    sums, parents, _, sequences = best(jnp.where(ending[:, None, :], -jnp.inf, sums))
    # Sums only fall. With a positive penalty a score is best at the greatest length, else at once.
    reach = jnp.where(penalty > 0, steps.astype(jnp.float32), length + 1)
    worst = found.scores[:, -1]
    done = search.done | final | (sums[:, 0] / reach**penalty <= worst)
    done = done | (early & ~jnp.isneginf(worst)) | (faults.position >= 0)
    after = BeamState(
        cache=search.cache, tokens=sequences, sums=sums, found=found, done=done, faults=faults
    )
    return after, parents


def _better(old: Hypotheses, new: Hypotheses) -> Hypotheses:
    """Merge hypotheses into the W best of both, the earlier of equals."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
    scores, at = lax.top_k(both.scores, old.scores.shape[1])
    return Hypotheses(
        tokens=jnp.take_along_axis(both.tokens, at[:, :, None], axis=1),
        scores=scores,
        lengths=jnp.take_along_axis(both.lengths, at, axis=1),
        stopped=jnp.take_along_axis(both.stopped, at, axis=1),
    )
