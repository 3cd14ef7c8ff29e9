"""The engine: many requests at once over one pool of pages.

Each step gives every running request its next tokens and reads one more piece of the prompts that
are waiting (Orca, Yu et al. 2022; chunked prefill, Agrawal et al. 2023, arXiv:2308.16369), in pages
that requests share and give back (Kwon et al. 2023, arXiv:2309.06180). The host is one step behind
the device: a step is dispatched before the tokens of the last one have been read.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import jax
import numpy as np

from jkv._checks import (
    check_function,
    check_integer,
    check_one_of,
    check_text,
    got,
    is_integer,
)
from jkv._fork import check_fork
from jkv._transfer import intended, transfers
from jkv.cache.paged import PagedKind
from jkv.decoding import loop, sampling
from jkv.decoding.arguments import Ids, Model, Prompts, Sampler, Stop
from jkv.decoding.detokenize import new_text
from jkv.decoding.prompts import check_concrete, rows_of_tokens, split_model
from jkv.decoding.result import differences
from jkv.decoding.stopping import parse_stops
from jkv.engine.request import Request
from jkv.engine.runner import Runner
from jkv.engine.scheduler import Scheduler, StepError
from jkv.errors import UnsupportedError
from jkv.store.policy import Policy

if TYPE_CHECKING:
    from jkv.store import Store

T = TypeVar("T")

# A request of priority p goes before those that came at most 64 p requests before it: it is
# served sooner, and nobody waits for ever.
PRIORITY = 64


class Engine(Scheduler):
    """Continuous batching over a paged cache; see `submit`, `step` and `run`.

    Args:
        lm: what `jkv.load` or `jkv.shard` returns, or a decoder (then prompts are ids).
        pages: pages of the pool, each of `page` tokens in every layer.
        page: tokens per page, by default those of `cache`, which are 16.
        max_batch: requests that run at once.
        cache: a `jkv.paged` kind or its text ("paged:16,int8"), for pages in another form; by
            default in the model's dtype. With quantized pages, a prefix hit reads quantized values
            while a fresh prefill reads exact ones: a request's tokens may then differ from those
            that it would have alone.
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
        lm: Model,
        *,
        pages: int,
        page: int | None = None,
        max_batch: int = 8,
        cache: PagedKind | str | None = None,
        block: int = 4,
        prefill_chunk: int = 256,
        prefill_rows: int = 4,
        policy: Policy | None = None,
        share: bool = True,
        preemption: Literal["auto", "recompute", "swap"] = "auto",
        swap_bytes: int = 1 << 30,
        store: Store | None = None,
    ):
        model, tokenizer = split_model(lm)
        check_one_of(
            "preemption",
            preemption,
            ("auto", "recompute", "swap"),
            of="Engine",
            error=UnsupportedError,
        )
        batch = Runner(
            model,
            pages=check_integer("pages", pages, 1),
            page=None if page is None else check_integer("page", page, 1),
            lanes=check_integer("max_batch", max_batch, 1),
            kind=cache,
            block=check_integer("block", block, 1),
            chunk=check_integer("prefill_chunk", prefill_chunk, 1),
            rows=check_integer("prefill_rows", prefill_rows, 1),
            policy=policy,
            store=store,
        )
        super().__init__(
            batch, tokenizer, share=share, preemption=preemption, swap_bytes=swap_bytes
        )
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._torn = False  # a transaction has begun and has not ended
        self._frame: FrameType | None = None  # of the one that began last

    @property
    def model(self) -> Any:
        """The decoder that it has, in `update`'s latest weights."""
        return self.batch.model

    # What users do.

    @overload
    def submit(
        self,
        prompt: str | Ids,
        *,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        key: jax.Array | None = None,
        stop: Stop | None = None,
        priority: int = 0,
        tenant: str = "",
        on_token: Callable[[Request, int], object] | None = None,
        samples: None = None,
        request_id: Any = None,
    ) -> Request: ...

    @overload
    def submit(
        self,
        prompt: str | Ids,
        *,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        key: jax.Array | None = None,
        stop: Stop | None = None,
        priority: int = 0,
        tenant: str = "",
        on_token: Callable[[Request, int], object] | None = None,
        samples: int,
        request_id: Any = None,
    ) -> list[Request]: ...

    @transfers
    def submit(
        self,
        prompt: str | Ids,
        *,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        key: jax.Array | None = None,
        stop: Stop | None = None,
        priority: int = 0,
        tenant: str = "",
        on_token: Callable[[Request, int], object] | None = None,
        samples: int | None = None,
        request_id: Any = None,
    ) -> Request | list[Request]:
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
            request_id: an id of the caller's own, which the request carries; it may be anything.

        Returns:
            The `Request`, or a list of them where `samples` is given.

        Raises:
            TypeError: see `jkv.generate`.
            ValueError: likewise; or a prompt that with its answer is longer than the context.
            PoolFullError: it could never fit into the pool.
            StaleError: the model's weights were changed in place: see `update`.
            RuntimeError: in a child that was forked, where JAX hangs.
        """
        check_concrete("prompt", prompt)
        config = self.batch.config
        row = prompt if isinstance(prompt, str) else np.asarray(prompt)
        rows = rows_of_tokens([row], config.vocab, tokenizer=self.tokenizer)
        count = 1 if samples is None else check_integer("samples", samples, 1)
        requests = self._requests(
            rows,
            count,
            [request_id],
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            key=key,
            stop=stop,
            priority=priority,
            tenant=tenant,
            on_token=on_token,
        )
        self._queue(requests)
        return requests[0] if samples is None else requests

    def _requests(
        self,
        rows: list[np.ndarray],
        samples: int,
        ids: Sequence[Any],
        *,
        max_new_tokens: int,
        sampler: Sampler | None,
        key: jax.Array | None,
        stop: Stop | None,
        priority: int,
        tenant: str,
        on_token: Callable[[Request, int], object] | None,
    ) -> list[Request]:
        """Make requests, `samples` of each row; they are not queued yet.

        What they bring is on the host from here on, whatever device it was on: a pass takes
        everything of all its requests at once.
        """
        check_fork()
        config = self.batch.config
        self._settle()
        self.batch.check_weights()
        most = check_integer("max_new_tokens", max_new_tokens, 1)
        ending = parse_stops(stop, len(rows), config.vocab, config.end_ids, self.tokenizer)
        check_text("tenant", tenant)
        check_function("on_token", on_token, "(request, token)")
        if not is_integer(priority):
            raise TypeError(f"{got('priority', priority)}; expected an integer")
        check_concrete("sampler", sampler)
        check_concrete("key", key)
        keys = self._keys(sampler, key, len(rows), samples)
        for stop_ids in ending.ids:
            self.batch.check_ends(stop_ids)
        known: dict[tuple[int, ...], Any] = {}
        for stop_ids in ending.ids:
            if stop_ids not in known:
                known[stop_ids] = self.batch.bound(sampler, stop_ids)
        for row in rows:
            self.batch.check_fits(len(row), most)
        requests = []
        for i in range(len(rows) * samples):
            row, number = i // samples, next(self._numbers)
            requests.append(
                Request(
                    number=number,
                    prompt=rows[row],
                    max_new_tokens=most,
                    sampler=known[ending.ids[row]],
                    key=keys[i],
                    stop_ids=ending.ids[row],
                    stop_strings=ending.strings[row],
                    priority=int(priority),
                    tenant=tenant,
                    on_token=on_token,
                    engine=self,
                    rank=number - PRIORITY * int(priority),
                    submitted=time.perf_counter(),
                    request_id=ids[row],
                )
            )
        return requests

    def _queue(self, requests: list[Request]) -> None:
        """Queue requests, all of them or, interrupted, none or all."""
        with self._lock:
            self.requests.add(requests)

    @transfers
    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        key: jax.Array | None = None,
        stop: Stop | None = None,
        priority: int = 0,
        tenant: str = "",
        on_token: Callable[[Request, int], object] | None = None,
        request_ids: Sequence[Any] | None = None,
    ) -> list[Request]:
        """Submit prompts, run until all of them have ended, and return their requests.

        Requests that were submitted before run beside them. What is interrupted is cancelled.

        Args:
            prompts: a list of texts and of token ids, or one text.
            max_new_tokens: of each, at most.
            sampler: as of `submit`.
            key: one for all, or one per prompt; the tokens are those of `jkv.generate`.
            stop: as of `submit`, for all; or one list of ids and strings per prompt.
            priority: as of `submit`.
            tenant: likewise.
            on_token: likewise.
            request_ids: an id of the caller's own for each prompt.

        Returns:
            The finished requests in the order of the prompts. One that failed has its `error`, and
            the others their tokens.

        Raises:
            TypeError: see `submit`; nothing is run if one of the prompts is refused.
            ValueError: likewise.
            PoolFullError: likewise.

        Example:
            >>> engine = jkv.Engine(lm, pages=512)
            >>> [r.text for r in engine.generate(["ROMEO:", "JULIET:"], max_new_tokens=16)]
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = rows_of_tokens(prompts, self.batch.config.vocab, tokenizer=self.tokenizer)
        ids = [None] * len(rows) if request_ids is None else list(request_ids)
        if len(ids) != len(rows):
            raise ValueError(
                f"request_ids got {len(ids)} ids for {len(rows)} prompts; expected one for each"
            )
        with self._lock:
            self._check_outside()
        requests = self._requests(
            rows,
            1,
            ids,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            key=key,
            stop=stop,
            priority=priority,
            tenant=tenant,
            on_token=on_token,
        )
        try:
            self._queue(requests)
            for request in requests:
                while not request.endings:
                    self.advance(request, len(request.tokens))
        finally:
            for request in requests:
                self.abandon(request)
        return requests

    def step(self) -> bool:
        """One step of everything; whether there is more to do.

        Raises:
            RuntimeError: called from a request's callback.
        """
        return self._transact(self._step_or_charge)

    def run(self) -> None:
        """Run steps until every request has ended."""
        while self.step():
            pass

    def advance(self, request: Request, seen: int) -> None:
        """Run steps until the request has more than `seen` tokens, or has ended."""

        def step() -> None:
            if not request.endings and len(request.tokens) <= seen:
                self._step_or_charge()

        while not request.endings and len(request.tokens) <= seen:
            self._transact(step)

    @transfers
    def cancel(self, request: Request) -> None:
        """See `Request.cancel`."""

        def cancel() -> None:
            if request.seat is not None and self._sits(request.seat):
                self._leave(request.seat, "cancelled")
            elif not request.endings:
                self._finish(request, "cancelled")

        with self._lock:
            if self._within():
                cancel()  # of a callback, and part of the step that called it
            else:
                self._transact(cancel)

    def abandon(self, request: Request) -> None:
        """Cancel a request from where nothing may be waited for, such as a finaliser.

        It has ended at once; its pages go back with the step that is under way, or with the next
        call of the engine.
        """
        if not request.endings:
            # First the intent: a request that has ended and is not swept would be live for ever.
            self._abandoned.append(request)
            request.end("cancelled")

    def watch(self, reader: weakref.ref[Any], request: Request) -> None:
        """Cancel the request once this iteration over its tokens is gone."""
        self.requests.readers[reader] = request

    def update(self, lm: Model) -> None:
        """Take new weights, of the same model after a training step for example.

        Requests that run or wait keep their tokens and go on with the new weights; what was cached
        of the old ones is dropped, and in a store it is not found any more.

        Args:
            lm: what `jkv.load` returns, or a decoder, of the configuration that the engine has.

        Raises:
            ValueError: another configuration.
        """
        check_fork()
        model, _ = split_model(lm)
        old = self.batch.config
        if differ := differences(old, model.config) or (old != model.config and "its settings"):
            raise ValueError(
                f"update got another model ({differ}); expected the same with new weights. For "
                "another model make another engine"
            )

        def update() -> None:
            self.batch.model = model
            self._recover()

        self._transact(update)

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
            self._settle()
            live = list(self.requests.live.values())
            return self.figures.as_dict(live=live, pool=self.batch.pool_stats())

    def close(self) -> None:
        """End all requests; pages that may be found again go to the store, if there is one."""
        self._transact(self._end_all)

    def _end_all(self) -> None:
        try:
            self._flush()
        except StepError as failed:
            self._charge(failed)
        for seat in [seat for seat in self.seats if seat]:
            self._leave(seat, "cancelled")
        for request in list(self.requests.live.values()):
            self._finish(request, "cancelled")
        self.batch.keep_all()
        if self.batch.kept is not None:
            self.batch.kept.flush(self.batch.page / self.figures.prefill_rate())

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm(self, samplers: Iterable[Sampler] = ()) -> None:
        """Compile all that is needed for requests with these samplers, and greedy ones."""

        def warm() -> None:
            for sampler in samplers:
                self.batch.group_of(self.batch.bound(sampler, ()))
            self.batch.warm(swaps=self.preemption != "recompute")

        self._transact(warm)

    # Transactions. Whatever changes lanes, pages or the device's state runs in one. One that has
    # begun and not ended, because of an interrupt at any place, is undone by the next: all but the
    # requests that have not ended, and their tokens, is made anew.

    def _transact(self, work: Callable[[], T]) -> T:
        with self._lock, intended():
            check_fork()
            self._check_outside()
            try:
                self._frame = sys._getframe()
                if self._torn:
                    self._recover()
                self._torn = True
                self._sweep()
                done = work()
                self._sweep()
                self._torn = False
                return done
            finally:
                self._frame = None

    def _settle(self) -> None:
        """Recover from what was interrupted, and let go of what was abandoned."""
        with self._lock:
            swept = self._torn or self._abandoned or self.requests.deserted()
            if swept and not self._within():
                self._transact(lambda: None)

    def _step_or_charge(self) -> bool:
        try:
            return self._step()
        except StepError as failed:
            self._charge(failed)
            return True

    def _within(self) -> bool:
        """Whether a transaction of this engine is on this thread's stack: it called a callback.

        Not a flag alone, which an interrupt could leave behind.
        """
        if self._frame is None:
            return False
        frame = sys._getframe()
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    def _check_outside(self) -> None:
        if self._within():
            raise RuntimeError(
                "an engine was run from a callback of one of its requests; callbacks may "
                "submit and cancel, and the engine goes on by itself"
            )

    def _keys(self, sampler: Any, key: Any, rows: int, samples: int) -> Any:
        """The data ``[2]`` of the key of each sample of each row, or None for each.

        They are those that `jkv.generate` would give to them.
        """
        count = rows * samples
        if sampler is not None:
            sampling.check(sampler)
        if not sampling.needs_key(sampler):
            if samples > 1:
                raise ValueError(
                    f"samples={samples} of a sampler that draws nothing at random would all be the "
                    "same; expected one that does, such as jkv.sampling.temperature(0.8), and a key"
                )
            return [None] * count
        if key is None:
            raise ValueError(loop.NEEDS_KEY)
        return jax.device_get(jax.random.key_data(sampling.row_keys(key, count)))
