"""A job: what a call of `generate` and its like asks for, checked before any token is computed."""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np

from jkv._checks import check_flag, check_function, check_integer
from jkv._fork import check_fork
from jkv._text import plural
from jkv._transfer import transfers
from jkv.cache import sharding
from jkv.cache.base import Cache
from jkv.cache.dense import dense
from jkv.cache.protocol import CacheKind
from jkv.decoding import capacity, draft, loop, prefix_store, programs, sampling
from jkv.decoding.apply import check_updates
from jkv.decoding.arguments import DecoderLike, Model, Progress, Prompts, TokenizerLike
from jkv.decoding.draft import Draft
from jkv.decoding.options import Options, check_top_logprobs, resolve_kind
from jkv.decoding.prefix_store import PrefixStore, StoredRows
from jkv.decoding.prompts import check_concrete, rows_of_tokens, split_model
from jkv.decoding.result import Result, differences
from jkv.decoding.stopping import Stops, parse_stops
from jkv.decoding.transform import Transform
from jkv.errors import CacheFullError, StaleError
from jkv.models.weights import Weights, is_current, weights_of


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be generated, all of it checked; run once, since its cache is donated.

    Attributes:
        model: the decoder.
        tokenizer: None where there is none.
        weights: that the model had.
        history: all tokens so far, per row; the samples of a prompt are next to each other.
        unread: the tokens to prefill, per prompt.
        cache: of all tokens but these, a row per prompt, with room for what comes.
        needed: tokens that the longest row's cache will hold in the end.
        slots: that the caller asked for, None where a cache that grows may.
        max_new: tokens per row, at most.
        block: tokens per row that are computed at a time.
        chunk: tokens per pass of the prefill.
        progress: called after each of them.
        samples: rows per prompt.
        stops: where each row ends.
        ends: the ids of these, ``[B, M]``.
        sampler: None for the likeliest tokens.
        keys: ``[B]``, None where nothing is drawn at random.
        draft: None for one token per pass.
        scored: whether log-probabilities are wanted.
        top: how many of the likeliest tokens are wanted in each place.
        stored: what a store has of the rows, None without a store.
        started: on `time.perf_counter`.
    """

    model: DecoderLike
    tokenizer: TokenizerLike | None
    weights: Weights
    history: list[np.ndarray]
    unread: list[np.ndarray]
    cache: Cache
    needed: int
    slots: int | None
    max_new: int
    block: int
    chunk: int
    progress: Progress | None
    samples: int
    stops: Stops
    ends: np.ndarray
    sampler: Transform | None
    keys: jax.Array | None
    draft: Draft | None
    scored: bool
    top: int
    stored: StoredRows | None
    started: float

    @property
    def reused(self) -> np.ndarray:
        """Tokens of each prompt that a store had, ``[B]``."""
        if self.stored is None:
            return np.zeros(len(self.unread), np.int64)
        return np.asarray([hit.length for hit in self.stored.hits], np.int64)


@transfers
def prepare(model: Model, prompts: Prompts, options: Options) -> Job:
    """Check a call and make the cache that it begins with.

    Raises:
        TypeError: see `jkv.generate`, as for all that it raises.
        ValueError: likewise.
        UnsupportedError: likewise.
        CacheFullError: likewise.
        StaleError: a result to resume that other weights have made.
    """
    started = time.perf_counter()
    check_fork()
    decoder, tokenizer = split_model(model)
    config, resume = decoder.config, options.resume
    max_new = check_integer("max_new_tokens", options.max_new_tokens, 1)
    block = check_integer("block", options.block, 1)
    chunk = check_integer("prefill_chunk", options.prefill_chunk, 16)
    check_function("progress", options.progress, "(done, total) tokens")
    scored = check_flag("return_logprobs", options.return_logprobs)
    top = check_top_logprobs(options.top_logprobs, config.vocab)
    check_concrete("sampler", options.sampler)
    check_concrete("key", options.key)
    check_concrete("draft", options.draft)

    # The rows: all of their tokens, and those that the cache does not have yet.
    rows = rows_of_tokens(prompts, config.vocab, tokenizer=tokenizer, continued=resume is not None)
    samples = check_integer("samples", options.samples, 1)
    batch = len(rows) * samples
    before = _resume(options, rows, decoder)
    unread = [np.concatenate([old[-1:], new]) for old, new in zip(before, rows, strict=True)]
    history = [np.concatenate([old, new]) for old, new in zip(before, rows, strict=True)]
    history = [row for row in history for _ in range(samples)]
    longest = max(map(len, history))

    # How tokens are drawn, and where rows end.
    keys = loop.check_sampler(options.sampler, options.key, batch)
    if samples > 1 and keys is None:
        raise ValueError(
            f"samples={samples} of a sampler that draws nothing at random would all be "
            "the same; expected one that does, such as jkv.sampling.temperature(0.8), and a key"
        )
    stops = parse_stops(options.stop, len(rows), config.vocab, config.end_ids, tokenizer)
    stops = stops.repeated(samples)
    ends = stops.matrix()
    sampler = sampling.bind(options.sampler, config.vocab, ends)
    check_updates(sampler, batch, config.vocab)

    # The cache, with what a store has.
    kind = dense() if options.cache is None else resolve_kind(options.cache)
    kept = kind if resume is None else resume.cache
    pass_size = min(chunk, max(map(len, unread)))
    capacity.check_limit(config, kept, longest, max_new, pass_size)
    needed = longest + max_new - 1
    stored = _find(options, decoder, kind, unread)
    if stored is not None:
        unread = [row[hit.length :] for row, hit in zip(unread, stored.hits, strict=True)]
    slots = _slots(options, kept, longest, max_new, block)
    cache = _first_cache(decoder, kind, resume, stored, len(rows), slots)
    drafting = None
    if options.draft is not None:
        drafting = draft.check_draft(options.draft, batch, longest + max_new)
        draft.check_rollback(cache, sampler, config.vocab)
    return Job(
        model=decoder,
        tokenizer=tokenizer,
        weights=weights_of(decoder),
        history=history,
        unread=unread,
        cache=cache,
        needed=needed,
        slots=options.slots,
        max_new=max_new,
        block=block,
        chunk=chunk,
        progress=options.progress,
        samples=samples,
        stops=stops,
        ends=ends,
        sampler=sampler,
        keys=keys,
        draft=drafting,
        scored=scored or top > 0,
        top=top,
        stored=stored,
        started=started,
    )


def _resume(options: Options, rows: list[np.ndarray], model: DecoderLike) -> list[np.ndarray]:
    """Return the tokens that each row goes on from, none without an earlier result.

    Raises:
        TypeError: no result of `jkv.generate`.
        ValueError: one of another model or of other rows, or a kind of cache beside it.
        StaleError: the model has other weights now.
    """
    resume = options.resume
    if resume is None:
        return [row[:0] for row in rows]
    if not isinstance(resume, Result):
        hint = ""
        if isinstance(resume, Cache):
            hint = (
                ". A cache does not know the tokens of its rows: save a conversation with "
                "result.save(path) and load it with jkv.load_result(path, lm), or go on from a "
                "cache with jkv.prefill and jkv.rollout"
            )
        raise TypeError(
            f"resume got {type(resume).__name__}; expected what jkv.generate returned{hint}"
        )
    if options.cache is not None:
        raise ValueError("resume goes on with the cache of its result; leave cache= out")
    if len(rows) != len(resume.history):
        raise ValueError(
            f"resume got {plural(len(rows), 'prompt')} for {plural(len(resume.history), 'row')}; "
            "expected one each, [] where there is nothing to add"
        )
    differ = differences(resume.config, model.config)
    if differ:
        raise ValueError(
            f"resume got the result of another model ({differ}); expected one of this model"
        )
    if not is_current(resume.weights, model):
        raise StaleError(
            "resume got a result of other weights than the model has now: its cache holds keys "
            "and values of the old ones. Generate anew from its tokens, result.history"
        )
    return list(resume.history)


def _find(
    options: Options, model: DecoderLike, kind: CacheKind, rows: list[np.ndarray]
) -> StoredRows | None:
    """Look for the rows in the store, None without one.

    Raises:
        TypeError: no store, or keys that are no texts.
        ValueError: keys without a store, or a store beside `resume` or `samples`.
    """
    keys = prefix_store.check_keys(options.sequence_ids, len(rows))
    if options.store is None:
        if options.sequence_ids is not None:
            raise ValueError("sequence_ids name what is in a store; expected store= too")
        return None
    if options.resume is not None or options.samples > 1:
        raise ValueError(
            "store= finds where to go on by itself and keeps one row per prompt; leave resume= "
            "and samples= out"
        )
    store = PrefixStore(options.store, model, kind, options.tenant)
    return StoredRows(store, keys, store.find(keys, rows))


def _slots(
    options: Options, kept: CacheKind | Cache, longest: int, max_new: int, block: int
) -> int:
    """Choose the slots of the first cache: those asked for, or a size that has a program.

    Raises:
        ValueError: `slots` is no number.
        CacheFullError: `slots` cannot hold what is asked.
    """
    needed = longest + max_new - 1
    if options.slots is None:
        first = longest + 2 * block if kept.grows else needed
        return capacity.slots_for(min(first, needed), kept)
    slots = check_integer("slots", options.slots, 1)
    if slots < needed:
        raise CacheFullError(
            f"slots={slots} cannot hold {plural(longest, 'prompt token')} and "
            f"{plural(max_new, 'new one')}; expected at least {needed}"
        )
    return slots


def _first_cache(
    model: DecoderLike,
    kind: CacheKind,
    resume: Result | None,
    stored: StoredRows | None,
    batch: int,
    slots: int,
) -> Cache:
    """Make the cache to begin with: a resumed one, one of stored rows, or an empty one."""
    config, mesh = model.config, sharding.mesh_of(model)
    if resume is not None:
        old = resume.cache
        fits = old.capacity is None or old.capacity >= slots
        cache = programs.copy_jit(old) if fits else programs.resize_jit(old, slots)
    elif stored is not None and any(hit.cache is not None for hit in stored.hits):
        cache = prefix_store.join_rows([hit.cache for hit in stored.hits], config, kind, slots)
    else:
        return programs.init_cache_jit(config, kind, batch, slots, config.dtype, mesh)
    return cache if mesh is None else programs.shard_cache_jit(cache, mesh)
