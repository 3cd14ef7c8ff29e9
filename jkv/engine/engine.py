"""The engine: many requests at once over one pool of pages.

Each step gives every running request its next tokens and reads one more piece of the prompts that
are waiting (Orca, Yu et al. 2022; chunked prefill, Agrawal et al. 2023, arXiv:2308.16369), in pages
that requests share and give back (Kwon et al. 2023, arXiv:2309.06180). The host is one step behind
the device: a step is dispatched before the tokens of the last one have been read.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jkv._text import brief
from jkv._transfer import intended, transfers
from jkv.decoding import loop, sampling
from jkv.decoding.detokenize import new_text
from jkv.decoding.request import (
    check_concrete,
    integer,
    rows_of_tokens,
    split_model,
    stops,
)
from jkv.engine.batch import Batch
from jkv.engine.request import FINISHED, RUNNING, WAITING, Request
from jkv.engine.steps import Steps
from jkv.errors import UnsupportedError

# A request of priority p goes before those that came at most 64 p requests before it: it is
# served sooner, and nobody waits for ever.
PRIORITY = 64


class Engine(Steps):
    """Continuous batching over a paged cache; see `submit`, `step` and `run`.

    Args:
        lm: what `jkv.load` or `jkv.shard` returns, or a decoder (then prompts are ids).
        pages: pages of the pool, each of `page` tokens in every layer.
        page: tokens per page, by default those of `cache`, which are 16.
        max_batch: requests that run at once.
        cache: a `jkv.paged` kind or its text ("paged:16,int8"), for pages in another form; by
            default in the model's dtype. Pages that round are read rounded where they are found,
            and exact by those who read a prompt in one piece: a request may then say something
            else than it would alone.
        block: tokens that each request gets per step, at most: more of them make less work for
            the host, and up to twice as many slots are held that may never be used.
        prefill_chunk: tokens of prompts per step: of one, or of several in equal parts. More of
            them make long prompts shorter work, and the step of those who run beside them longer.
        prefill_rows: prompts that are read in one step, at most.
        policy: which of the pages that nobody owns goes first, of `jkv.store`; LRU by default.
        share: whether equal prefixes of prompts of one tenant share pages.
        preemption: what becomes of the pages of a request that has to wait: "recompute", "swap"
            (they are copied to the host), or "auto", whichever is sooner as measured so far.
        swap_bytes: on the host, at most; requests beyond that are recomputed.
        store: a `jkv.store.Store`: pages that the pool gives away go there, and are found again by
            prompts that begin with them, in another process too; and so do requests that wait.

    Raises:
        TypeError: a kind that is not paged.
        ValueError: numbers out of range.
        UnsupportedError: an unknown `preemption`.
    """

    @transfers
    def __init__(
        self,
        lm: Any,
        *,
        pages: Any,
        page: Any = None,
        max_batch: Any = 8,
        cache: Any = None,
        block: Any = 4,
        prefill_chunk: Any = 256,
        prefill_rows: Any = 4,
        policy: Any = None,
        share: Any = True,
        preemption: Any = "auto",
        swap_bytes: Any = 1 << 30,
        store: Any = None,
    ):
        model, tokenizer = split_model(lm)
        if preemption not in ("auto", "recompute", "swap"):
            raise UnsupportedError(
                f"Engine got preemption={brief(preemption)}; expected 'auto', 'recompute' or 'swap'"
            )
        batch = Batch(
            model,
            pages=integer("pages", pages, 1),
            page=None if page is None else integer("page", page, 1),
            lanes=integer("max_batch", max_batch, 1),
            kind=cache,
            block=integer("block", block, 1),
            chunk=integer("prefill_chunk", prefill_chunk, 1),
            rows=integer("prefill_rows", prefill_rows, 1),
            policy=policy,
            store=store,
        )
        super().__init__(
            batch, tokenizer, share=share, preemption=preemption, swap_bytes=swap_bytes
        )
        self.model = model
        self._number = 0
        self._lock = threading.RLock()
        self._inside = False
        self._torn = False  # a step has begun and has not ended

    # What users do.

    @transfers
    def submit(
        self,
        prompt: Any,
        *,
        max_new_tokens: Any,
        sampler: Any = None,
        key: Any = None,
        stop: Any = None,
        priority: Any = 0,
        tenant: Any = "",
        on_token: Any = None,
        samples: Any = None,
    ) -> Any:
        """Queue a prompt.

        Args:
            prompt: a text, or token ids.
            max_new_tokens: at most.
            sampler: a transform of `jkv.sampling`, or a function of the logits ``[1, V]``; greedy
                by default. One of a structure that the engine has not seen, or another function,
                compiles its programs anew.
            key: `jax.random.key(seed)`, for samplers that draw at random: the tokens are those of
                `jkv.generate` with the same key.
            stop: ids and strings at which it ends beside the checkpoint's, as of `jkv.generate`;
                at most 16 ids. () switches all off.
            priority: an integer; higher is sooner.
            tenant: requests share prefixes with those of their tenant only.
            on_token: called with (request, token) as tokens come. What it raises ends the request.
            samples: requests for as many answers, drawn apart, to one prompt, whose pages they
                share.

        Returns:
            The `Request`, or a list of them where `samples` is given.

        Raises:
            TypeError: see `jkv.generate`.
            ValueError: likewise; or a prompt that with its answer is longer than the context.
            PoolFullError: it could never fit into the pool.
        """
        config = self.model.config
        check_concrete("prompt", prompt)
        prompt = [prompt] if isinstance(prompt, str) else [np.asarray(prompt)]
        (tokens,) = rows_of_tokens(prompt, config.vocab, tokenizer=self.tokenizer)
        most = integer("max_new_tokens", max_new_tokens, 1)
        ending = stops(stop, 1, config.vocab, config.end_ids, self.tokenizer)
        if isinstance(priority, bool) or not isinstance(priority, int | np.integer):
            raise TypeError(f"priority got {brief(priority)}; expected an integer")
        if not isinstance(tenant, str):
            raise TypeError(f"tenant got {brief(tenant)}; expected a text")
        if on_token is not None and not callable(on_token):
            raise TypeError(
                f"on_token got {brief(on_token)}; expected a function of (request, token)"
            )
        count = 1 if samples is None else integer("samples", samples, 1)
        check_concrete("sampler", sampler)
        check_concrete("key", key)
        keys = self._keys(sampler, key, count)
        self.batch.check_ends(ending.ids[0])
        sampler = self.batch.bind(sampler, ending.ids[0])
        self.batch.check_sampler(sampler)
        self.batch.check_fits(len(tokens), most)
        with self._lock:
            requests = []
            for i in range(count):
                self._number += 1
                request = Request(
                    number=self._number,
                    prompt=tokens,
                    max_new_tokens=most,
                    sampler=sampler,
                    key=None if keys is None else keys[i],
                    stop_ids=ending.ids[0],
                    stop_strings=ending.strings[0],
                    priority=int(priority),
                    tenant=tenant,
                    on_token=on_token,
                    engine=self,
                    rank=self._number - PRIORITY * int(priority),
                    submitted=time.perf_counter(),
                )
                self.waiting.push(request)
                requests.append(request)
        return requests[0] if samples is None else requests

    def step(self) -> bool:
        """One step of everything; whether there is more to do.

        Raises:
            RuntimeError: called from a request's callback.
        """
        with self._stepping():
            return self._step()

    def run(self) -> None:
        """Steps until every request has ended."""
        while self.step():
            pass

    def advance(self, request: Request, seen: int) -> None:
        """Steps until the request has more than `seen` tokens, or has ended."""
        while request.state != FINISHED and len(request.tokens) <= seen:
            with self._stepping():
                if request.state != FINISHED and len(request.tokens) <= seen:
                    self._step()

    @transfers
    def cancel(self, request: Request) -> None:
        """See `Request.cancel`."""
        with self._lock:
            if self._torn and not self._inside:
                self._recover()
                self._torn = False
            if request.state == WAITING:
                self.waiting.remove(request)
                self._close(request, "cancelled")
            elif request.state == RUNNING:
                seat = next(s for s in self.seats if s is not None and s.request is request)
                self._leave(seat, "cancelled")

    def text(self, request: Request) -> str:
        """The new text of a request.

        Raises:
            UnsupportedError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UnsupportedError("there is no tokenizer: use request.tokens, which are ids")
        return new_text(self.tokenizer, request.prompt, request.tokens)

    def stats(self) -> dict[str, Any]:
        """Figures since the engine was made; seconds, pages, tokens. See `Stats`."""
        with self._lock:
            running = sum(seat is not None for seat in self.seats)
            return self.figures.as_dict(
                running=running, waiting=len(self.waiting), pool=self.batch.pool_stats()
            )

    def close(self) -> None:
        """End all requests; pages that may be found again go to the store, if there is one."""
        with self._stepping():
            self._flush()
            for seat in [seat for seat in self.seats if seat]:
                self._leave(seat, "cancelled")
            while len(self.waiting):
                self._close(self.waiting.pop(), "cancelled")
            self.batch.keep_all()
            if self.batch.kept is not None:
                self.batch.kept.flush(self.batch.page / self.figures.prefill_rate())

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm(self, samplers: Any = ()) -> None:
        """Compile all that is needed for requests with these samplers, and greedy ones."""
        with self._stepping():
            for sampler in samplers:
                sampler = self.batch.bind(sampler, ())
                self.batch.check_sampler(sampler)
                self.batch.group_of(sampler)
            self.batch.warm(swaps=self.preemption != "recompute")

    # One step.

    @contextlib.contextmanager
    def _stepping(self) -> Iterator[None]:
        with self._lock, intended():
            if self._inside:
                raise RuntimeError(
                    "an engine was run from a callback of one of its requests; callbacks may "
                    "submit and cancel, and the engine goes on by itself"
                )
            self._inside = True
            try:
                if self._torn:
                    self._recover()
                self._torn = True
                yield
                self._torn = False
            finally:
                self._inside = False

    def _keys(self, sampler: Any, key: Any, count: int) -> np.ndarray | None:
        """The data ``[count, 2]`` of each sample's key, as `jkv.generate` would give it to them."""
        if sampler is not None:
            sampling.check(sampler)
        if not sampling.needs_key(sampler):
            if count > 1:
                raise ValueError(
                    f"samples={count} of a sampler that draws nothing at random would all be the "
                    "same; expected one that does, such as jkv.sampling.temperature(0.8), and a key"
                )
            return None
        if key is None:
            raise ValueError(loop.NEEDS_KEY)
        return jax.device_get(jax.random.key_data(sampling.row_keys(key, count)))
