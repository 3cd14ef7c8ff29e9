"""One step of an engine: who gets in, what is dispatched, and what was heard."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from jkv.decoding import faults
from jkv.decoding.request import PAD
from jkv.decoding.stopping import first_stop
from jkv.engine import lanes as device
from jkv.engine.batch import Batch, Part
from jkv.engine.request import FINISHED, RUNNING, WAITING, Request
from jkv.engine.scheduler import Queue, Seat, Tally, shared_ahead
from jkv.engine.stats import Stats
from jkv.errors import NonFiniteError, PoolFullError

SAMPLED = 16  # steps, of which one is looked at for slots that are held and not filled


class Steps:
    """Requests on their way, and how a step moves them on. Not for several threads at once.

    Args:
        batch: pages and lanes.
        tokenizer: for stop strings, or None.
        share: whether equal prefixes share pages.
        preemption: "recompute", "swap" or "auto".
        swap_bytes: on the host, at most.
    """

    def __init__(
        self, batch: Batch, tokenizer: Any, *, share: bool, preemption: str, swap_bytes: int
    ):
        self.batch, self.tokenizer = batch, tokenizer
        self.share, self.preemption, self.swap_bytes = share, preemption, swap_bytes
        self.waiting = Queue()
        self.seats: list[Seat | None] = [None] * batch.lanes
        self.tally = Tally(batch.lanes, batch.config.context)
        self._reading: list[Seat] = []  # those who are at their prompts, and some who were
        self._seatings = 0
        self.figures = Stats()
        self._sent: list[Part] = []  # what was dispatched last and has not been read
        self._popped: list[Request] = []  # neither waiting nor in a seat, for a moment

    def _recover(self) -> None:
        """After a step that was interrupted: nobody knows what the device has, so begin anew.

        What has been said stays said. Those who were running wait, and are read once more.
        """
        self._sent = []
        self.batch.reset()
        seated = [seat.request for seat in self.seats if seat]
        self.seats = [None] * self.batch.lanes
        self.tally = Tally(self.batch.lanes, self.batch.config.context)
        for request in dict.fromkeys([*seated, *self._popped]):
            if request.seat is not None:
                request.seat.part()
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
            self.figures.filled(*self.batch.filled(self.tally))
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
            self.seats[seat.lane] = request.seat = seat
            request.state = RUNNING
            self._reading.append(seat)
        while later:
            self.waiting.push(later.pop())

    def _seated(self, request: Request) -> Seat | None:
        """The request in the first free lane, None if there are too few pages to go on with."""
        batch, saved = self.batch, request.swapped
        running = sum(seat is not None for seat in self.seats)
        held = batch.sequences(request.tenant)
        lane = self.seats.index(None)
        seat = Seat(request, lane, self.tally, held, target=len(request.history))
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
            limit = request.max_new_tokens - len(request.tokens)
            batch.install(seat, limit)
            self._seatings += 1
            seat.sit(self._seatings, limit)
            seated = True
        finally:
            if not seated:
                batch.close(held)
                self.tally.clear(lane)
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
        if len(saying):
            parts.append(self.batch.decode(saying, self.tally, self.seats))
        if self.batch.windowed:
            for seat in [*map(self._at, saying), *(seat for seat, _ in prompts)]:
                self.batch.let_go(seat)
        return parts

    def _show(self, seat: Seat, upto: int) -> None:
        self.batch.publish(seat, upto)
        seat.shown = upto

    def _sits(self, seat: Seat) -> bool:
        return self.seats[seat.lane] is seat

    def _at(self, lane: Any) -> Seat:
        """Who sits there."""
        seat = self.seats[lane]
        if seat is None:
            raise RuntimeError(f"nobody sits in lane {lane}: an error in jkv")
        return seat

    def _prompts(self) -> list[tuple[Seat, int]]:
        """Seats that read their prompts, the first in rank, and up to where."""
        if not self._reading:
            return []
        reading = sorted((s for s in self._reading if s.reading and self._sits(s)), key=_rank)
        self._reading = reading
        alone = len(reading) == 1 or self.batch.rows == 1
        most = self.batch.chunk if alone else self.batch.part
        chosen = []
        for seat in reading[: self.batch.rows]:
            upto = min(seat.cached + most, seat.target)
            if self._sits(seat) and self._reserve(seat, upto):
                chosen.append((seat, upto))
        return chosen

    def _saying(self) -> np.ndarray:
        """Lanes that say tokens, with pages for them; the first in rank get theirs first."""
        tally = self.tally
        upto = tally.bounds(self.batch.block)
        short = (upto > tally.reserved).nonzero()[0]
        if self.batch.free_pages() >= len(short) * self.batch.pages_for(self.batch.block):
            self.batch.extend(short, upto[short], tally, self.seats)
        else:
            for seat in sorted(map(self._at, short.tolist()), key=_rank):
                if self._sits(seat):
                    self._reserve(seat, int(upto[seat.lane]))
        return tally.ask(self.batch.block)  # who got no pages has left its lane

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
        # Whatever interrupts this, the request is in one place at least.
        request.state = WAITING
        self.waiting.push(request)
        self._vacate(seat)

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
        said = speakers = 0
        tally = self.tally
        for part in parts:
            told, lanes = self.batch.read(part), part.lanes
            tokens, marks = told[:, :-1], told[:, -1]
            heed = marks | (tally.quiet[lanes] != part.numbers)
            odd = heed.nonzero()[0].tolist()
            # Most of them go on in silence, and have said as many as they could.
            plain = (heed == 0).nonzero()[0] if odd else slice(None)
            new = tokens[plain]
            tally.hear(lanes[plain], new)
            said, speakers = said + new.size, speakers + len(new)
            for row in odd:
                lane, mark = lanes[row], marks[row]
                if tally.number[lane] != part.numbers[row]:
                    continue  # it has left since
                new = tokens[row][tokens[row] != PAD].tolist()
                if mark & device.REFUSED:
                    raise RuntimeError(f"lane {lane} had no page for a token: an error in jkv")
                seat = self._at(lane)
                if mark & device.BROKEN:
                    self._broke(seat)
                    continue
                undrawable = bool(mark & (device.NONFINITE | device.MASKED))
                if new:
                    said, speakers = said + len(new), speakers + 1
                    self._heard(seat, new, undrawable or not mark & device.ENDED)
                if undrawable and self._sits(seat):
                    self._undrawable(seat, by_sampler=bool(mark & device.MASKED))
        if said:
            self.figures.said(said, speakers, time.perf_counter())

    def _broke(self, seat: Seat) -> None:
        """End a request whose pages were given what no code can hold; they are not reused."""
        seat.request.error = NonFiniteError(
            "the model made NaN or infinity of this request's tokens, which no code of these pages "
            "can hold; jkv.paged() keeps them as they are"
        )
        self.batch.withdraw(seat)
        self._free(seat)
        self._close(seat.request, "error")

    def _undrawable(self, seat: Seat, *, by_sampler: bool) -> None:
        """End a request that had nothing to draw its next token from.

        Where it is the model's fault its pages may hold NaN, so they are not reused.
        """
        step = len(seat.request.tokens)
        cause = faults.SAMPLER if by_sampler else faults.MODEL
        seat.request.error = NonFiniteError(
            f"a token could not be drawn, at step {step} (step 0 is the first new token): {cause}"
        )
        if by_sampler:
            self._leave(seat, "error")
            return
        self.batch.withdraw(seat)
        self._free(seat)
        self._close(seat.request, "error")

    def _heard(self, seat: Seat, tokens: list[int], active: bool) -> None:
        request = seat.request
        if not request.watched:
            self.tally.quiet[seat.lane] = self.tally.number[seat.lane]
        if self.share and seat.shown < seat.target:
            self._show(seat, seat.target)
        if request.first_token is None:
            request.first_token = time.perf_counter()
            self.figures.first.append(request.first_token - request.submitted)
        request.tokens.extend(tokens)
        self.tally.said[seat.lane] += len(tokens)
        if request.watched:
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
            match = first_stop(
                self.tokenizer, request.stop_strings, request.prompt, request.tokens, fresh
            )
            cut = None if match is None else match.kept
        if cut is not None:
            gone = len(request.tokens) - cut
            fresh -= gone
            self.figures.counts["tokens"] -= gone
            request.seat.part()  # who would bring them back
            del request.tokens[cut:]
        if request.on_token is not None:
            for token in request.tokens[len(request.tokens) - fresh :]:
                request.on_token(request, token)
                if request.state != RUNNING:
                    break
        return cut is not None

    def _leave(self, seat: Seat, reason: str) -> None:
        """A request's end: its pages go back, the full ones to be found again."""
        self._popped.append(seat.request)
        self._vacate(seat)
        self._close(seat.request, reason)
        self._popped.remove(seat.request)

    def _vacate(self, seat: Seat) -> None:
        """Pages back and the lane free; what they hold may still be found."""
        if self.share:
            self.batch.publish(seat, seat.written())
        self._free(seat)

    def _free(self, seat: Seat) -> None:
        self.batch.close(seat.held)
        seat.part()
        self.tally.clear(seat.lane)
        self.seats[seat.lane] = None

    def _close(self, request: Request, reason: str) -> None:
        request.state, request.finish_reason = FINISHED, reason
        request.finished = time.perf_counter()
        self.figures.counts["finished"] += 1
        self.figures.counts[reason] += 1
        if request.swapped is not None:
            saved = request.swapped
            self._forget_swapped(request)
            self.batch.forget(saved)

    def _forget_swapped(self, request: Request) -> None:
        self.figures.swapped_bytes -= request.swapped.nbytes
        request.swapped = None


def _rank(seat: Seat) -> int:
    return seat.request.rank
