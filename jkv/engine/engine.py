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

from jkv.decoding import sampling
from jkv.decoding.request import (
    first_stop,
    integer,
    rows_of_tokens,
    split_model,
    stops,
)
from jkv.engine.batch import Batch, Part
from jkv.engine.request import FINISHED, RUNNING, WAITING, Request
from jkv.engine.scheduler import Queue, Seat, shared_ahead
from jkv.engine.stats import Stats
from jkv.errors import NonFiniteError, PoolFullError, UnsupportedError

# A request of priority p goes before those that came at most 64 p requests before it: it is
# served sooner, and nobody waits for ever.
PRIORITY = 64
SAMPLED = 16  # steps, of which one is looked at for slots that are held and not filled


class Engine:
    """Continuous batching over a paged cache; see `submit`, `step` and `run`.

    Args:
        lm: what `jkv.load` returns, or a decoder (then prompts are ids).
        pages: pages of the pool, each of `page` tokens in every layer.
        page: tokens per page, by default those of `cache`, which are 16.
        max_batch: requests that run at once.
        cache: a `jkv.paged` kind, for pages in another form; by default in the model's dtype. Pages
            that round are read rounded where they are found, and exact by those who read a prompt
            in one piece: a request may then say something else than it would alone.
        block: tokens that each request gets per step, at most: more of them make less work for
            the host, and up to twice as many slots are held that may never be used.
        prefill_chunk: tokens of a prompt per step.
        prefill_rows: prompts that are read in one step.
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

    def __init__(
        self,
        lm: Any,
        *,
        pages: Any,
        page: Any = None,
        max_batch: Any = 8,
        cache: Any = None,
        block: Any = 4,
        prefill_chunk: Any = 64,
        prefill_rows: Any = 4,
        policy: Any = None,
        share: Any = True,
        preemption: Any = "auto",
        swap_bytes: Any = 1 << 30,
        store: Any = None,
    ):
        self.model, self.tokenizer = split_model(lm)
        if preemption not in ("auto", "recompute", "swap"):
            raise UnsupportedError(
                f"Engine got preemption={preemption!r}; expected 'auto', 'recompute' or 'swap'"
            )
        self.batch = Batch(
            self.model,
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
        self.share = share
        self.preemption, self.swap_bytes = preemption, swap_bytes
        self.waiting = Queue()
        self.seats: list[Seat | None] = [None] * self.batch.lanes
        self.figures = Stats()
        self._sent: list[Part] = []  # what was dispatched last and has not been read
        self._number = 0
        self._lock = threading.RLock()
        self._inside = False
        self._torn = False  # a step has begun and has not ended
        self._popped: list[Request] = []  # neither waiting nor in a seat, for a moment

    # What users do.

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
            sampler: a transform of `jkv.sampling`, greedy by default. One of a structure that the
                engine has not seen compiles its programs anew.
            key: `jax.random.key(seed)`, for samplers that draw at random: the tokens are those of
                `jkv.generate` with the same key.
            stop: ids and strings at which it ends, as of `jkv.generate`.
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
        prompt = [prompt] if isinstance(prompt, str) else [np.asarray(prompt)]
        (tokens,) = rows_of_tokens(prompt, config.vocab, tokenizer=self.tokenizer)
        most = integer("max_new_tokens", max_new_tokens, 1)
        ending = stops(stop, 1, config.vocab, config.end_ids, self.tokenizer)
        if isinstance(priority, bool) or not isinstance(priority, int | np.integer):
            raise TypeError(f"priority got {priority!r}; expected an integer")
        if not isinstance(tenant, str):
            raise TypeError(f"tenant got {tenant!r}; expected a text")
        if on_token is not None and not callable(on_token):
            raise TypeError(f"on_token got {on_token!r}; expected a function of (request, token)")
        count = 1 if samples is None else integer("samples", samples, 1)
        keys = self._keys(sampler, key, count)
        self.batch.check_sampler(sampler)
        self.batch.check_ends(ending.ids[0])
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

    def cancel(self, request: Request) -> None:
        """See `Request.cancel`."""
        with self._lock:
            if request.state == WAITING:
                self.waiting.remove(request)
                self._close(request, "cancelled")
            elif request.state == RUNNING:
                seat = next(s for s in self.seats if s is not None and s.request is request)
                self._leave(seat, "cancelled")

    def text(self, tokens: list[int]) -> str:
        """Text of ids.

        Raises:
            UnsupportedError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UnsupportedError("there is no tokenizer: use request.tokens, which are ids")
        return self.tokenizer.decode(tokens)

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
                sampling.check(sampler)
                self.batch.group_of(sampler)
            self.batch.warm(swaps=self.preemption != "recompute")

    # One step.

    @contextlib.contextmanager
    def _stepping(self) -> Iterator[None]:
        with self._lock:
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

    def _recover(self) -> None:
        """After a step that was interrupted: nobody knows what the device has, so begin anew.

        What has been said stays said. Those who were running wait, and are read once more.
        """
        self._sent = []
        self.batch.reset()
        seated = [seat.request for seat in self.seats if seat]
        self.seats = [None] * self.batch.lanes
        for request in dict.fromkeys([*seated, *self._popped]):
            if request.state == FINISHED or request in self.waiting:
                continue
            request.state, request.preemptions = WAITING, request.preemptions + 1
            if request.tokens and request.tokens[-1] in request.stop_ids:
                self._close(request, "stop")
            elif len(request.tokens) >= request.max_new_tokens:
                self._close(request, "length")
            else:
                self.waiting.push(request)
        self._popped = []

    def _step(self) -> bool:
        began, waited = time.perf_counter(), self.batch.waited
        read = self.figures.counts["prefill_tokens"]
        self._admit()
        sent = self._dispatch()
        before, self._sent = self._sent, sent
        self._accept(before)
        if self.batch.kept is not None:
            self.batch.kept.flush(self.batch.page / self.figures.prefill_rate())
        if not before and not sent:
            self.figures.rested()
            return any(self.seats) or len(self.waiting) > 0
        self.figures.stepped(
            time.perf_counter() - began,
            self.batch.waited - waited,
            self.figures.counts["prefill_tokens"] - read,
        )
        if self.figures.counts["steps"] % SAMPLED == 0:
            self.figures.filled(*self.batch.filled(s for s in self.seats if s))
        return True

    def _flush(self) -> None:
        """Read what has been dispatched: what the host knows is all there is."""
        before, self._sent = self._sent, []
        self._accept(before)

    def _admit(self) -> None:
        """Waiting requests into free lanes by their ranks, as long as there are pages."""
        later = self._popped
        while len(self.waiting) and None in self.seats and len(later) < 2 * len(self.seats):
            request = self.waiting.pop()
            later.append(request)
            if self.share and request.swapped is None:
                page = self.batch.page
                if shared_ahead(request.history, request.tenant, self.seats, page):
                    continue
            try:
                seat = self._seated(request)
            except Exception as error:
                # Of a store, or of a sampler: what keeps this one out need not stop the others.
                later.remove(request)
                request.error = error
                self._close(request, "error")
                continue
            if seat is None:
                break
            later.remove(request)
            self.seats[seat.lane] = seat
            request.state = RUNNING
        while later:
            self.waiting.push(later.pop())

    def _seated(self, request: Request) -> Seat | None:
        """The request in the first free lane, None if there are too few pages to go on with."""
        batch, saved = self.batch, request.swapped
        running = sum(seat is not None for seat in self.seats)
        held = batch.sequences(request.tenant)
        seat = Seat(
            request=request,
            lane=self.seats.index(None),
            held=held,
            target=len(request.history),
            cached=0,
            limit=request.max_new_tokens - len(request.tokens),
        )
        seated = False
        try:
            if saved is not None:
                seat.ahead, seat.target = 0, saved.length
            elif self.share:
                seat.cached = batch.match(held, request.history)
            # Each of those that run will soon want a page more.
            missing = batch.pages_for(seat.target + 1) - seat.cached // batch.page
            if running and missing > batch.free_pages() - running:
                return None
            if saved is not None:
                pages = batch.fetch(saved)
                self._forget_swapped(request)
                if pages is None:  # the store has lost them: as if they had not been saved
                    seat.ahead, seat.target = 1, len(request.history)
                else:
                    batch.restore(seat, saved.length, pages)
                    seat.cached = seat.shown = saved.length
            batch.install(seat)
            seated = True
        finally:
            if not seated:
                batch.close(held)
        if not request.preemptions:
            request.cached_tokens = seat.cached
            self.figures.counts["hit_tokens"] += seat.cached
            self.figures.counts["asked_tokens"] += seat.target
        return seat

    def _dispatch(self) -> list[Part]:
        """Start the next piece of prompts and the next tokens; nothing is waited for."""
        prompts, saying = self._prompts(), self._saying()
        # One that was chosen may have made room for another since.
        prompts = [(seat, upto) for seat, upto in prompts if self._sits(seat)]
        parts = []
        if prompts:
            self.figures.counts["prefill_tokens"] += sum(u - seat.cached for seat, u in prompts)
            parts.append(self.batch.absorb(prompts))
            for seat, upto in prompts:
                # Whether pages that round could hold it is known once it has been read.
                if self.share and not self.batch.rounds:
                    self._show(seat, upto)
        if saying:
            parts.append(self.batch.decode(saying))
        for seat in [*saying, *(seat for seat, _ in prompts)]:
            self.batch.let_go(seat)
        return parts

    def _show(self, seat: Seat, upto: int) -> None:
        self.batch.publish(seat, upto)
        seat.shown = upto

    def _sits(self, seat: Seat) -> bool:
        return self.seats[seat.lane] is seat

    def _prompts(self) -> list[tuple[Seat, int]]:
        """Seats that read their prompts, the first in rank, and up to where."""
        reading = sorted((s for s in self.seats if s and s.reading), key=_rank)
        chosen = []
        for seat in reading[: self.batch.rows]:
            upto = min(seat.cached + self.batch.chunk, seat.target)
            if self._sits(seat) and self._reserve(seat, upto):
                chosen.append((seat, upto))
        return chosen

    def _saying(self) -> list[Seat]:
        """Seats that say tokens, with pages for them; the first in rank get theirs first."""
        chosen = [s for s in self.seats if s and not s.reading and s.wants()]
        short = [s for s in chosen if s.bound(self.batch.block) > s.reserved]
        refused = set()
        for seat in sorted(short, key=_rank):
            upto = seat.bound(self.batch.block)
            if self._sits(seat) and not self._reserve(seat, upto):
                refused.add(seat)
        return [s for s in chosen if self._sits(s) and s not in refused]

    def _reserve(self, seat: Seat, upto: int) -> bool:
        """Pages for so many tokens, at the cost of those who come last; False if that is it."""
        while True:
            try:
                self.batch.reserve(seat, upto)
                return True
            except PoolFullError:
                self._flush()  # who has ended gives pages back
                if not self._sits(seat):
                    return False
                if not self.batch.could(seat, upto):
                    last = max((s for s in self.seats if s), key=_rank)
                    self._preempt(last)
                    if last is seat:
                        return False

    def _preempt(self, seat: Seat) -> None:
        """Back to the queue, to go on with the same tokens; nothing is under way."""
        request = seat.request
        how = self._how(seat)
        if how == "swap":
            request.swapped = self.batch.save(seat)
            if request.swapped is None:
                how = "recompute"
            else:
                self.figures.swapped_bytes += request.swapped.nbytes
        request.preemptions += 1
        self.figures.counts[how] += 1
        self._vacate(seat)
        request.state = WAITING
        self.waiting.push(request)

    def _how(self, seat: Seat) -> str:
        """What becomes of its pages."""
        size = self.batch.bytes_of(seat)
        if seat.reading or self.figures.swapped_bytes + size > self.swap_bytes:
            return "recompute"
        if self.preemption != "auto":
            return self.preemption
        # There and back, against the prefill of as much if the prefix index has lost it all.
        swap = 2 * size / self.batch.rate
        return "swap" if swap < seat.written() / self.figures.prefill_rate() else "recompute"

    def _accept(self, parts: list[Part]) -> None:
        """Read what passes said into their requests."""
        said = lanes = 0
        for part in parts:
            for seat, tokens, active, broken in self.batch.read(part):
                if not self._sits(seat):
                    continue  # it has ended, or was sent away, since
                if broken:
                    self._broke(seat)
                elif tokens:
                    if self.share and seat.shown < seat.target:
                        self._show(seat, seat.target)
                    said, lanes = said + len(tokens), lanes + 1
                    self._heard(seat, tokens, active)
        if said:
            self.figures.said(said, lanes, time.perf_counter())

    def _broke(self, seat: Seat) -> None:
        """Its pages hold what no code can: nobody should find them."""
        seat.request.error = NonFiniteError(
            "the model made NaN or infinity of this request's tokens, which no code of these pages "
            "can hold; jkv.paged() keeps them as they are"
        )
        self.batch.close(seat.held)
        self.seats[seat.lane] = None
        self._close(seat.request, "error")

    def _heard(self, seat: Seat, tokens: list[int], active: bool) -> None:
        request = seat.request
        if request.first_token is None:
            request.first_token = time.perf_counter()
            self.figures.first.append(request.first_token - request.submitted)
        request.tokens += tokens
        seat.said += len(tokens)
        if request.stop_strings or request.on_token is not None:
            try:
                ended = self._told(request, len(tokens))
            except Exception as error:
                # A user's function, or a tokenizer that cannot say what these tokens mean: this
                # request's affair, and nobody else's.
                request.error = error
                if self._sits(seat):
                    self._leave(seat, "error")
                return
            if not self._sits(seat):
                return  # cancelled by its own callback
            if ended:
                self._leave(seat, "stop")
                return
        if not active:
            stopped = request.tokens[-1] in request.stop_ids
            self._leave(seat, "stop" if stopped else "length")

    def _told(self, request: Request, fresh: int) -> bool:
        """Cut the tokens at a stop string and tell the callback; whether there was one."""
        cut = None
        if request.stop_strings:
            cut = first_stop(self.tokenizer, request.stop_strings, request.tokens, fresh)
        if cut is not None:
            gone = len(request.tokens) - cut
            fresh -= gone
            self.figures.counts["tokens"] -= gone
            del request.tokens[cut:]
        if request.on_token is not None:
            for token in request.tokens[len(request.tokens) - fresh :]:
                request.on_token(request, token)
                if request.state != RUNNING:
                    break
        return cut is not None

    def _leave(self, seat: Seat, reason: str) -> None:
        """A request's end: its pages go back, the full ones to be found again."""
        self._vacate(seat)
        self._close(seat.request, reason)

    def _vacate(self, seat: Seat) -> None:
        """Pages back and the lane free; what they hold may still be found."""
        if self.share:
            self.batch.publish(seat, seat.written())
        self.batch.close(seat.held)
        self.seats[seat.lane] = None

    def _close(self, request: Request, reason: str) -> None:
        if request.swapped is not None:
            self.batch.forget(request.swapped)
            self._forget_swapped(request)
        request.state, request.finish_reason = FINISHED, reason
        request.finished = time.perf_counter()
        self.figures.counts["finished"] += 1
        self.figures.counts[reason] += 1

    def _forget_swapped(self, request: Request) -> None:
        self.figures.swapped_bytes -= request.swapped.nbytes
        request.swapped = None

    def _keys(self, sampler: Any, key: Any, count: int) -> Any:
        """A key for each of the samples, as `jkv.generate` would give it to them."""
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
            raise ValueError("a sampler that draws at random needs key=jax.random.key(seed)")
        keys = sampling.row_keys(key, count)
        if keys.dtype != jax.random.key(0).dtype:
            raise ValueError(
                f"key got one of {keys.dtype}; expected jax.random.key(seed) of the default kind"
            )
        return keys


def _rank(seat: Seat) -> int:
    return seat.request.rank
