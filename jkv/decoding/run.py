"""One generation on the host: prefill in chunks, decode in blocks, one ahead of the reader."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any, Unpack

import jax
import numpy as np

from jkv._checks import check_integer
from jkv._fork import check_fork
from jkv._text import plural
from jkv._transfer import transfers
from jkv.cache import heads
from jkv.cache.base import Cache
from jkv.cache.dense import dense
from jkv.decoding import capacity, draft, loop, prefix_store, sampling
from jkv.decoding.apply import check_updates
from jkv.decoding.arguments import Model, Prompts
from jkv.decoding.capacity import bucket
from jkv.decoding.faults import Faults, raise_faults
from jkv.decoding.logprobs import stacked
from jkv.decoding.options import (
    GenerateOptions,
    Options,
    check_plain,
    checked_kind,
    checked_top,
    keywords,
)
from jkv.decoding.prompts import PAD, check_concrete, padded, rows_of_tokens, split_model
from jkv.decoding.result import Result, differences
from jkv.decoding.stopping import Stops, first_stop, parse_stops
from jkv.errors import CacheFullError, StaleError, UnsupportedError
from jkv.models.weights import still, weights_of


@dataclasses.dataclass
class _Row:
    """What the host knows of a row that is being generated."""

    strings: tuple[str, ...]
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_tokens: list[np.ndarray] = dataclasses.field(default_factory=list)  # each [k]
    top_logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    reason: str | None = None


class Run:
    """A generation under way: `blocks` yields what is new, `result` closes it."""

    @transfers
    def __init__(self, model: Model, prompts: Prompts, options: Options):
        self.started = self.first_read = self.last_read = time.perf_counter()
        self.options = options
        check_fork()
        self.model, self.tokenizer = split_model(model)
        self.weights = weights_of(self.model)
        config, resume = self.model.config, options.resume
        self.max_new = check_integer("max_new_tokens", options.max_new_tokens, 1)
        self.size = check_integer("block", options.block, 1)
        check_integer("prefill_chunk", options.prefill_chunk, 16)
        check_plain(options)
        self.top = checked_top(options.top_logprobs, config.vocab)
        self.scored = bool(options.return_logprobs) or self.top > 0
        for name in ("sampler", "key", "draft"):
            check_concrete(name, getattr(options, name))
        self.new = rows_of_tokens(
            prompts, config.vocab, tokenizer=self.tokenizer, continued=resume is not None
        )
        self.samples = check_integer("samples", options.samples, 1)
        batch = len(self.new) * self.samples
        self.history = [row for row in self._history(resume) for _ in range(self.samples)]
        self.keys = loop.check_sampler(options.sampler, options.key, batch)
        if self.samples > 1 and self.keys is None:
            raise ValueError(
                f"samples={self.samples} of a sampler that draws nothing at random would all be "
                "the same; expected one that does, such as jkv.sampling.temperature(0.8), and a key"
            )
        stopping = parse_stops(
            options.stop, len(self.new), config.vocab, config.end_ids, self.tokenizer
        )
        self.stops: Stops = stopping.repeated(self.samples)
        self.ends = self.stops.matrix()
        self.sampler = sampling.bind(options.sampler, config.vocab, self.ends)
        check_updates(self.sampler, batch, config.vocab)
        longest = max(map(len, self.history))
        kind = dense() if options.cache is None else checked_kind(options.cache)
        chunk = min(options.prefill_chunk, max(map(len, self.new)))
        kept = kind if resume is None else resume.cache
        capacity.check_limit(config, kept, longest, self.max_new, chunk)
        self.needed = longest + self.max_new - 1
        self.reused = np.zeros(len(self.new), np.int64)
        self._stored(kind)
        self.cache = self._first_cache(kind, longest)
        self.draft = None
        if options.draft is not None:
            self.draft = draft.checked(options.draft, batch, longest + self.max_new)
            draft.check_goes_with(self.cache, self.sampler, config.vocab)
        self.rows = [_Row(strings) for strings in self.stops.strings]
        self.state: Any = None  # a loop.State from the prefill on
        self.exhausted = False  # all blocks have been read, rather than interrupted
        self.faults: list[tuple[int, int, bool]] = []  # of the rows read so far, see `raise_faults`

    def _history(self, resume: Any) -> list[np.ndarray]:
        """All tokens of each row so far; a resumed row's waiting token joins its new ones."""
        if resume is None:
            return list(self.new)
        if not isinstance(resume, Result):
            raise TypeError(
                f"resume got {type(resume).__name__}; expected what jkv.generate returned"
            )
        if self.options.cache is not None:
            raise ValueError("resume goes on with the cache of its result; leave cache= out")
        if len(self.new) != len(resume.history):
            raise ValueError(
                f"resume got {plural(len(self.new), 'prompt')} for "
                f"{plural(len(resume.history), 'row')}; expected one "
                "each, [] where there is nothing to add"
            )
        differ = differences(resume.config, self.model.config)
        if differ:
            raise ValueError(
                f"resume got the result of another model ({differ}); expected one of this model"
            )
        if not still(resume.weights, self.model):
            raise StaleError(
                "resume got a result of other weights than the model has now: its cache holds keys "
                "and values of the old ones. Generate anew from its tokens, result.history"
            )
        old = resume.history
        history = [np.concatenate([a, b]) for a, b in zip(old, self.new, strict=True)]
        self.new = [np.concatenate([a[-1:], b]) for a, b in zip(old, self.new, strict=True)]
        return history

    def _stored(self, kind: Any) -> None:
        """What the store has of each row; it is left out of what is to be read."""
        options = self.options
        self.found: list[Cache | None] = []
        self.spared: list[float] = []  # seconds
        self.prefixes = None
        self.ids = prefix_store.check_ids(options.sequence_ids, len(self.new))
        if options.store is None:
            if options.sequence_ids is not None:
                raise ValueError("sequence_ids name what is in a store; expected store= too")
            return
        if options.resume is not None or self.samples > 1:
            raise ValueError(
                "store= finds where to go on by itself and keeps one row per prompt; leave resume= "
                "and samples= out"
            )
        self.prefixes = prefix_store.PrefixStore(options.store, self.model, kind, options.tenant)
        known = self.prefixes.find(self.ids, self.new)
        for i, (found, row) in enumerate(zip(known, self.new, strict=True)):
            self.found.append(found.cache)
            self.spared.append(found.seconds)
            self.reused[i] = found.length
            self.new[i] = row[found.length :]

    def _first_cache(self, kind: Any, longest: int) -> Cache:
        """The cache to begin with: a new one, or the resumed one with room for what comes."""
        options, config = self.options, self.model.config
        if options.slots is not None and check_integer("slots", options.slots, 1) < self.needed:
            raise CacheFullError(
                f"slots={options.slots} cannot hold {plural(longest, 'prompt token')} and "
                f"{plural(self.max_new, 'new one')}; expected at least {self.needed}"
            )
        kept = kind if options.resume is None else options.resume.cache
        first = longest + 2 * self.size if kept.grows else self.needed
        slots = options.slots or capacity.slots_for(min(first, self.needed), kept)
        mesh = heads.mesh_of(self.model)
        if options.resume is not None:
            old = options.resume.cache
            fits = old.capacity is None or old.capacity >= slots
            cache = loop.copied(old) if fits else loop.resized(old, slots)
        elif any(row is not None for row in self.found):
            cache = prefix_store.joined(self.found, config, kind, slots)
        else:
            return loop.new_cache(config, kind, len(self.new), slots, config.dtype, mesh)
        return cache if mesh is None else loop.parted(cache, mesh)

    def blocks(self) -> Iterator[np.ndarray]:
        """New tokens ``[B, t]`` as they come, the first alone; a row that has ended is -1.

        Raises:
            NonFiniteError: a row had nothing to draw from, once the tokens before have been given.
        """
        yield self._accept(*self._prefill(), block_of=1)
        raise_faults(self.faults)
        waiting, said = None, 1
        while True:
            ahead = None
            if said < self.max_new and not self._finished():
                steps = min(self.size, self.max_new - said)
                ahead = self._dispatch(steps)
                # With a draft, how many they are is known once they have been read.
                said += steps if self.draft is None else 0
            if waiting is not None:
                yield self._accept(*waiting)
                raise_faults(self.faults)
            if ahead is None:
                self.exhausted = True
                return
            waiting = ahead

    def _finished(self) -> bool:
        return all(row.reason is not None for row in self.rows)

    def check_weights(self) -> None:
        """Refuse to go on with other weights than it has begun with.

        Raises:
            StaleError: the model's weights were changed in place meanwhile.
        """
        if weights_of(self.model) is not self.weights:
            raise StaleError(
                "the model's weights were changed while this generation was under way; begin anew"
            )

    def absorb(self) -> Any:
        """All prompts into the cache; the hidden states after their last tokens."""
        last, self.cache = self._read(self.new, self.cache, self.options.progress)
        return last

    def _read(
        self, rows: list[np.ndarray], cache: Cache, progress: Any = None
    ) -> tuple[Any, Cache]:
        """Rows of tokens into a cache, which is donated, chunk by chunk."""
        counts = np.asarray([len(row) for row in rows], np.int32)
        total, chunk, done = int(counts.max()), self.options.prefill_chunk, 0
        width = self.model.config.width
        last = np.zeros((len(counts), width), self.model.config.dtype)
        while done < total:
            size = min(chunk, bucket(total - done, 16))
            tokens = padded([row[done : done + size] for row in rows], size)
            here = np.clip(counts - done, 0, size)
            last, cache = loop.absorb(self.model, np.maximum(tokens, 0), cache, here, last)
            done += size
            if progress is not None:
                jax.block_until_ready(last)
                progress(min(done, total), total)
        return last, cache

    def _prefill(self) -> tuple[Any, Any, Any, Faults]:
        """Each prompt once, a row for each of its samples, and the first token of each row."""
        last = self.absorb()
        if self.samples > 1:
            last, self.cache = loop.forked(last, self.cache, self.samples)
        said = None
        if self.sampler is not None:  # only samplers look back; another width is another program
            said = padded(self.history, bucket(max(map(len, self.history)) + self.max_new))
        self.state, token, logprob = loop.begun(
            self.model, last, self.cache, said, self.sampler, self.keys, self.ends, top=self.top
        )
        if self.draft is not None:
            slots = bucket(max(map(len, self.history)) + self.max_new)
            self.state = draft.drafting(self.state, padded(self.history, slots))
        logprobs = jax.tree.map(lambda leaf: leaf[:, None], logprob)
        return token[:, None], logprobs, self.state.done, self.state.faults

    def _dispatch(self, steps: int) -> tuple[Any, Any, Any, Faults]:
        """Start up to `steps` more tokens; nothing is waited for."""
        state = self.state
        if state.cache.grows and self.options.slots is None:
            held = max(map(len, self.history)) + max(len(r.tokens) for r in self.rows)
            # One block of those that have been dispatched has not been read.
            wanted = capacity.slots_for(min(held + 2 * self.size, self.needed), state.cache)
            if state.cache.capacity < wanted:
                state = dataclasses.replace(state, cache=capacity.grown(state.cache, wanted))
        how = (self.sampler, self.keys, self.ends)
        if self.draft is None:
            advanced = functools.partial(loop.advanced, self.size, self.model, state, *how)
            self.state, *out = advanced(np.int32(steps), top=self.top)
        else:
            limits = np.asarray([len(row) + self.max_new for row in self.history], np.int32)
            drafted = functools.partial(draft.drafted, self.size, self.model, state, self.draft)
            self.state, *out = drafted(*how, limits, top=self.top)
        return tuple(out)

    def _accept(
        self, tokens: Any, logprobs: Any, done: Any, faults: Faults, block_of: int | None = None
    ) -> np.ndarray:
        """Read a block from the device into the rows, and cut rows at their stop strings."""
        block = np.array(tokens)
        values = jax.tree.map(np.asarray, logprobs) if self.scored else None
        ended = np.asarray(done)
        self.last_read = time.perf_counter()
        if block_of == 1:
            self.first_read = self.last_read
        for i, row in enumerate(self.rows):
            if row.reason is not None:
                block[i] = PAD
                continue
            fresh = block[i][block[i] != PAD]
            row.tokens.extend(fresh.tolist())
            if values is not None:
                row.logprobs.extend(values.chosen[i, : len(fresh)].tolist())
                row.top_tokens.extend(values.top_tokens[i, : len(fresh)])
                row.top_logprobs.extend(values.top[i, : len(fresh)])
            match = first_stop(self.tokenizer, row.strings, self.history[i], row.tokens, len(fresh))
            if match is not None:
                block[i, len(fresh) - (len(row.tokens) - match.kept) :] = PAD
                for kept in (row.tokens, row.logprobs, row.top_tokens, row.top_logprobs):
                    del kept[match.kept :]
                row.reason = "stop"
            elif row.tokens and row.tokens[-1] in self.stops.ids[i]:
                row.reason = "stop"
            elif len(row.tokens) >= self.max_new or ended[i]:
                row.reason = "length"  # or no room, which `result` says
                if len(row.tokens) < self.max_new and np.asarray(faults.position)[i] >= 0:
                    self.faults.append((i, len(row.tokens), bool(np.asarray(faults.sampler)[i])))
        return block

    def _cropped(self, cache: Cache, rows: list[np.ndarray]) -> Cache:
        """The cache of rows that it holds more of."""
        try:
            return cache.crop(np.asarray([len(row) for row in rows], np.int32))
        except UnsupportedError:
            # A window has let go of what the shorter rows would see: they are read once more.
            return self._read(rows, cache.crop(0))[1]

    @transfers
    def result(self) -> Result:
        """Everything said, once `blocks` is exhausted.

        Raises:
            CacheFullError: a row had no room.
            NonFiniteError: a cache that rounds was given what it cannot hold.
        """
        cache = self.state.cache.check()
        lengths = np.asarray([len(row.tokens) for row in self.rows])
        said = [np.asarray(row.tokens, np.int32) for row in self.rows]
        history = [np.concatenate([h, s]) for h, s in zip(self.history, said, strict=True)]
        if any(row.strings for row in self.rows):
            # A row is found to have stopped after the device went on with it.
            cache = self._cropped(cache, [h[:-1] for h in history])
        if self.prefixes is not None:
            self._keep(self.prefixes, cache, history)
        logprobs = top_tokens = top_logprobs = None
        width = int(lengths.max())
        if self.top:
            lists = [row.top_tokens for row in self.rows], [row.top_logprobs for row in self.rows]
            top_tokens = stacked(lists[0], width, self.top, np.int32, PAD)
            top_logprobs = stacked(lists[1], width, self.top, np.float32, 0)
        if self.scored:
            logprobs = np.zeros((len(said), width), np.float32)
            for i, row in enumerate(self.rows):
                logprobs[i, : lengths[i]] = row.logprobs
        return Result(
            tokens=padded(said, width),
            lengths=lengths,
            finish_reasons=tuple(row.reason or "length" for row in self.rows),
            logprobs=logprobs,
            cache=cache,
            history=tuple(history),
            prefill_seconds=self.first_read - self.started,
            decode_seconds=self.last_read - self.first_read,
            config=self.model.config,
            passes=lengths - 1 if self.draft is None else np.asarray(self.state.passes),
            reused=self.reused,
            tokenizer=self.tokenizer,
            top_tokens=top_tokens,
            top_logprobs=top_logprobs,
            weights=self.weights,
        )

    def _keep(
        self, prefixes: prefix_store.PrefixStore, cache: Cache, history: list[np.ndarray]
    ) -> None:
        """Each row into the store, but for its last token, which has no keys and values yet."""
        took = (self.last_read - self.started) / len(history)
        # The whole cache's, with what an earlier one took to make.
        seconds = [took + spared for spared in self.spared]
        caches = (
            prefix_store.row_of(cache, i) for i in range(len(history))
        )  # copies on the device
        prefixes.keep(self.ids, [row[:-1] for row in history], caches, seconds)


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
        resume: an earlier `Result` to go on from: its last token of each row and the new prompts
            are prefilled, nothing else. The earlier result stays valid. A text is encoded as a
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
        >>> out = jkv.generate(lm, "ROMEO:", max_new_tokens=16)
        >>> more = jkv.generate(lm, " Juliet", max_new_tokens=16, resume=out)
        >>> print("ROMEO:" + out.text + " Juliet" + more.text)
    """
    run = Run(model, prompts, Options(**options))
    for _ in run.blocks():
        pass
    return run.result()
