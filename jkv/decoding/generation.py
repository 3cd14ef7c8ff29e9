"""One generation on the host: prefill in chunks, decode in blocks, one ahead of the reader."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import jax
import numpy as np

from jkv._axes import Array
from jkv._transfer import transfers
from jkv.cache.base import Cache
from jkv.decoding import capacity, draft, loop, programs
from jkv.decoding.arguments import DecoderLike, Model, Progress, Prompts
from jkv.decoding.capacity import bucket
from jkv.decoding.draft import DraftState
from jkv.decoding.faults import Faults, raise_faults
from jkv.decoding.job import Job, prepare
from jkv.decoding.logprobs import Logprobs, stack_rows
from jkv.decoding.options import GenerateOptions, Options, keywords
from jkv.decoding.prompts import PAD, pad_rows
from jkv.decoding.result import Result
from jkv.decoding.stopping import first_stop
from jkv.errors import StaleError, UnsupportedError
from jkv.models.weights import weights_of


@dataclasses.dataclass(frozen=True)
class DeviceBlock:
    """The next tokens of all rows, on the device and perhaps not computed yet."""

    tokens: Array  # [B, t] int32, -1 where a row has none
    logprobs: Logprobs  # [B, t]
    done: Array  # [B] bool
    faults: Faults


@dataclasses.dataclass
class Row:
    """A row's new tokens, as far as the host has read them."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_tokens: list[np.ndarray] = dataclasses.field(default_factory=list)  # each [k]
    top_logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    reason: str | None = None  # why it ended, None before

    def extend(self, tokens: list[int], values: Logprobs | None, i: int) -> None:
        """Add tokens, and their log-probabilities in row `i` of the values."""
        self.tokens.extend(tokens)
        if values is not None:
            self.logprobs.extend(values.chosen[i, : len(tokens)].tolist())
            self.top_tokens.extend(np.asarray(values.top_tokens[i, : len(tokens)]))
            self.top_logprobs.extend(np.asarray(values.top[i, : len(tokens)]))

    def crop(self, length: int) -> None:
        """Drop all tokens past a length."""
        for kept in (self.tokens, self.logprobs, self.top_tokens, self.top_logprobs):
            del kept[length:]


class Generation:
    """A job under way: `blocks` yields new tokens, `finish` makes its result.

    Attributes:
        job: what is generated; its cache is donated to the device.
        rows: what has been read of each row.
        state: of the decode loop, None before the prefill.
        exhausted: whether all blocks have been read, rather than interrupted.
        first_read: when the first token was read, on `time.perf_counter`.
        last_read: likewise, the latest.
    """

    def __init__(self, job: Job):
        self.job = job
        self.rows = [Row() for _ in job.history]
        self.state: loop.State | DraftState | None = None
        self.exhausted = False
        self.first_read = self.last_read = job.started
        self._longest = max(map(len, job.history))
        self._faults: list[tuple[int, int, bool]] = []  # of the rows read so far

    @property
    def ended(self) -> list[bool]:
        """Whether each row has ended, as far as it has been read."""
        return [row.reason is not None for row in self.rows]

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield new tokens ``[B, t]`` as they come, the first alone; a row that has ended is -1.

        Raises:
            NonFiniteError: a row had nothing to draw from, once the tokens before have been given.
        """
        job = self.job
        first = self.read(self.prefill())
        self.first_read = self.last_read
        yield first
        raise_faults(self._faults)
        waiting, dispatched = None, 1
        while True:
            ahead = None
            if dispatched < job.max_new and not all(self.ended):
                steps = min(job.block, job.max_new - dispatched)
                ahead = self.dispatch(steps)
                # With a draft, how many they are is known once they have been read.
                dispatched += steps if job.draft is None else 0
            if waiting is not None:
                yield self.read(waiting)
                raise_faults(self._faults)
            if ahead is None:
                self.exhausted = True
                return
            waiting = ahead

    def check_weights(self) -> None:
        """Refuse to go on with other weights than it began with.

        Raises:
            StaleError: the model's weights were changed in place meanwhile.
        """
        if weights_of(self.job.model) is not self.job.weights:
            raise StaleError(
                "the model's weights were changed while this generation was under way; begin anew"
            )

    def prefill(self) -> DeviceBlock:
        """Read each prompt once, fork its row for each sample, and draw the first tokens."""
        job, slots = self.job, bucket(self._longest + self.job.max_new)
        last, cache = read_prompts(job.model, job.unread, job.cache, job.chunk, job.progress)
        if job.samples > 1:
            last, cache = programs.fork(last, cache, job.samples)
        # Only samplers look back; another width is another program.
        history = None if job.sampler is None else pad_rows(job.history, slots)
        state, token, logprob = programs.begin_jit(
            job.model, last, cache, history, job.sampler, job.keys, job.ends, top=job.top
        )
        if job.draft is not None:
            state = draft.begin_draft(state, pad_rows(job.history, slots))
        self.state = state
        logprobs = jax.tree.map(lambda leaf: leaf[:, None], logprob)
        return DeviceBlock(token[:, None], logprobs, state.done, state.faults)

    def dispatch(self, steps: int) -> DeviceBlock:
        """Start up to `steps` more tokens; nothing is waited for."""
        job, state = self.job, self._grow()
        how = (job.sampler, job.keys, job.ends)
        if job.draft is None:
            advance = functools.partial(programs.advance_jit, job.block, job.model, state, *how)
            self.state, *out = advance(np.int32(steps), top=job.top)
        else:
            limits = np.asarray([len(row) + job.max_new for row in job.history], np.int32)
            advance = functools.partial(draft.draft_jit, job.block, job.model, state, job.draft)
            self.state, *out = advance(*how, limits, top=job.top)
        return DeviceBlock(*out)

    def _grow(self) -> Any:
        """Return the state; a cache that grows has slots for the next block."""
        job, state = self.job, self.state
        if state is None or not state.cache.grows or job.slots is not None:
            return state
        # One block of those that have been dispatched has not been read.
        held = self._longest + max(len(row.tokens) for row in self.rows) + 2 * job.block
        slots = capacity.slots_for(min(held, job.needed), state.cache)
        if state.cache.capacity is None or state.cache.capacity >= slots:
            return state
        return dataclasses.replace(state, cache=capacity.grow(state.cache, slots))

    def read(self, block: DeviceBlock) -> np.ndarray:
        """Read a block from the device into the rows, and cut rows at their stop strings."""
        job, tokens = self.job, np.array(block.tokens)
        values = jax.tree.map(np.asarray, block.logprobs) if job.scored else None
        done, faults = np.asarray(block.done), block.faults
        self.last_read = time.perf_counter()
        for i, row in enumerate(self.rows):
            if row.reason is not None:
                tokens[i] = PAD
                continue
            new = tokens[i][tokens[i] != PAD].tolist()
            row.extend(new, values, i)
            strings = job.stops.strings[i]
            match = first_stop(job.tokenizer, strings, job.history[i], row.tokens, len(new))
            if match is not None:
                tokens[i, len(new) - (len(row.tokens) - match.kept) :] = PAD
                row.crop(match.kept)
                row.reason = "stop"
            elif row.tokens and row.tokens[-1] in job.stops.ids[i]:
                row.reason = "stop"
            elif len(row.tokens) >= job.max_new or done[i]:
                row.reason = "length"  # or no room, which `finish` says
                if len(row.tokens) < job.max_new and np.asarray(faults.position)[i] >= 0:
                    self._faults.append((i, len(row.tokens), bool(np.asarray(faults.sampler)[i])))
        return tokens


def read_prompts(
    model: DecoderLike,
    rows: Sequence[np.ndarray],
    cache: Cache,
    chunk: int,
    progress: Progress | None = None,
) -> tuple[Array, Cache]:
    """Prefill rows of tokens into a cache, which is donated, chunk by chunk.

    Returns:
        The hidden state ``[B, D]`` after each row's last token, and the cache.
    """
    counts = np.asarray([len(row) for row in rows], np.int32)
    total, done = int(counts.max()), 0
    last: Any = np.zeros((len(counts), model.config.width), model.config.dtype)
    while done < total:
        size = min(chunk, bucket(total - done, 16))
        tokens = pad_rows([row[done : done + size] for row in rows], size)
        here = np.clip(counts - done, 0, size)
        last, cache = programs.absorb_jit(model, np.maximum(tokens, 0), cache, here, last)
        done += size
        if progress is not None:
            jax.block_until_ready(last)
            progress(min(done, total), total)
    return last, cache


@transfers
def finish(generation: Generation) -> Result:
    """Make the result of a generation whose blocks have been read, and keep its rows in the store.

    Raises:
        CacheFullError: a row had no room.
        NonFiniteError: a cache that rounds was given what it cannot hold.
    """
    job, rows, state = generation.job, generation.rows, generation.state
    if state is None:
        raise RuntimeError("nothing has been generated: an error in jkv")
    cache = state.cache.check()
    lengths = np.asarray([len(row.tokens) for row in rows])
    tokens = [np.asarray(row.tokens, np.int32) for row in rows]
    history = [np.concatenate([h, t]) for h, t in zip(job.history, tokens, strict=True)]
    if any(job.stops.strings):
        # The device went on with a row until the host found its stop string.
        cache = _crop(job, cache, [row[:-1] for row in history])
    if job.stored is not None:
        # The last token has no keys and values yet.
        seconds = (generation.last_read - job.started) / len(history)
        job.stored.keep([row[:-1] for row in history], cache, seconds)
    width = int(lengths.max())
    logprobs = top_tokens = top_logprobs = None
    if job.scored:
        logprobs = np.zeros((len(rows), width), np.float32)
        for i, row in enumerate(rows):
            logprobs[i, : lengths[i]] = row.logprobs
    if job.top:
        top_tokens = stack_rows([row.top_tokens for row in rows], width, job.top, np.int32, PAD)
        top_logprobs = stack_rows([row.top_logprobs for row in rows], width, job.top, np.float32, 0)
    return Result(
        tokens=pad_rows(tokens, width),
        lengths=lengths,
        finish_reasons=tuple(row.reason or "length" for row in rows),
        logprobs=logprobs,
        cache=cache,
        history=tuple(history),
        prefill_seconds=generation.first_read - job.started,
        decode_seconds=generation.last_read - generation.first_read,
        config=job.model.config,
        passes=np.asarray(state.passes) if isinstance(state, DraftState) else lengths - 1,
        reused=job.reused,
        tokenizer=job.tokenizer,
        top_tokens=top_tokens,
        top_logprobs=top_logprobs,
        weights=job.weights,
    )


def _crop(job: Job, cache: Cache, rows: list[np.ndarray]) -> Cache:
    """Crop a cache to rows that it may hold more of."""
    try:
        return cache.crop(np.asarray([len(row) for row in rows], np.int32))
    except UnsupportedError:
        # A window has let go of what the shorter rows would see: they are read once more.
        return read_prompts(job.model, rows, cache.crop(0), job.chunk)[1]


@transfers
@keywords(GenerateOptions, Options)
def generate(
    model: Model,
    prompts: Prompts,
    **options: Unpack[GenerateOptions],
) -> Result:
    """Continue prompts of any lengths, in one batch.

    Args:
        model: `lm.model`, or `lm` where prompts or stops are texts.
        prompts: a list of rows, each a list or array of ids (or a text), or an array ``[B, T]``;
            one text is one row.
        max_new_tokens: per row, at most; an int.
        cache: the kind or its text ("int4"), `jkv.dense()` by default.
        sampler: a transform of `jkv.sampling`, or a function of the logits ``[B, V]``; greedy by
            default.
        stop: ids and strings at which a row ends beside the checkpoint's end-of-text ids, or one
            list of them per row; () switches all off, and so does an empty list of a row. Strings
            are looked for in the text with its special tokens ("</s>" is one), as `transformers`
            does: one may begin in the prompt, and the row ends with the token that completes it.
            What stopped a row is part of its tokens.
        key: `jax.random.key(seed)`, or one key per row; for samplers that draw at random.
        return_logprobs: also the log-probability of each new token under the model.
        top_logprobs: k, also the k likeliest tokens in the place of each new one, and theirs.
        resume: an earlier `Result` to go on from, or one that `jkv.load_result` has loaded: its
            last token of each row and the new prompts are prefilled, nothing else. The earlier
            result stays valid. A text is encoded as a
            continuation, without special tokens or a space put before it, so that the texts of
            all turns join; an empty prompt, [] or "", adds nothing to a row.
        slots: tokens that each row's cache has room for; by default what is needed, rounded up so
            that few programs serve all requests.
        prefill_chunk: tokens per pass of the prefill, at least 16.
        progress: called with (done, total) tokens of the longest prompt after each chunk.
        samples: rows of the result per prompt, next to each other, drawn apart. It is what each
            prompt given so many times says, but prefilled once: one key stands for as many as there
            are rows in the result, and a resumed turn has a prompt for each of them.
        draft: proposes tokens, of which one pass then says as many as are right:
            `jkv.prompt_lookup()`, or a function of (history [B, S], lengths [B]) that returns
            [B, k] tokens. The result is the same, sooner where texts repeat themselves.
        store: a `jkv.store.Store`: of each row what is known of its beginning is taken from there,
            and in the end the row is put there. The tokens are the same.
        sequence_ids: a key in the store for each row, looked at first; None finds rows by their
            tokens alone.
        tenant: whose entries.

    Raises:
        TypeError: prompts, stops, sampler, key or draft of a wrong type.
        ValueError: empty prompts, ids outside the vocabulary, more tokens than the model's context
            (which `jkv.window` may pass), numbers out of range, samples that would all be the same,
            or a draft with a sampler that remembers.
        UnsupportedError: a draft with a kind of cache that cannot roll back in the decode loop.
        CacheFullError: `slots` too small for what is asked.
        NonFiniteError: the model's logits are NaN or infinite, or the sampler left a row nothing to
            draw from; with the row and the step. Nothing goes to the store.

    Example:
        >>> lm = jkv.load("shakespeare")
        >>> out = jkv.generate(lm, "ROMEO:", max_new_tokens=8)
        >>> more = jkv.generate(lm, " Juliet", max_new_tokens=8, resume=out)
        >>> "ROMEO:" + out.text + " Juliet" + more.text == lm.decode(more.history[0])
        True
    """
    generation = Generation(prepare(model, prompts, Options(**options)))
    for _ in generation.blocks():
        pass
    return finish(generation)
