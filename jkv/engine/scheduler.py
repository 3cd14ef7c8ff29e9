"""One step of an engine: who gets in, what is dispatched, and what was heard."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from jkv.decoding import faults
from jkv.decoding.prompts import PAD
from jkv.decoding.stopping import StopMatch, first_stop
from jkv.engine import decode_state as device
from jkv.engine.pages import SwappedPages
from jkv.engine.request import Request
from jkv.engine.runner import InFlightStep, Runner
from jkv.engine.sequence import RequestQueue, RunningSequence, SequenceTable, shared_ahead
from jkv.engine.stats import Stats
from jkv.errors import NonFiniteError, PoolFullError


class StepError(Exception):
    """A pass failed: what it raised, and the requests that were in it."""

    def __init__(self, requests: list[Request], error: Exception):
        super().__init__(str(error))
        self.requests, self.error = requests, error


SAMPLED = 16  # steps, of which one is looked at for slots that are held and not filled


class Scheduler:
    """Requests on their way, and how a step moves them on. Not for several threads at once.

    Args:
        batch: pages and lanes.
        tokenizer: for stop strings, or None.
        share: whether equal prefixes share pages.
        preemption: "recompute", "swap" or "auto".
        swap_bytes: on the host, at most.
    """

    def __init__(
        self, batch: Runner, tokenizer: Any, *, share: bool, preemption: str, swap_bytes: int
    ):
        self.batch, self.tokenizer = batch, tokenizer
        self.share, self.preemption, self.swap_bytes = share, preemption, swap_bytes
        self.requests = RequestQueue()
        self.seats: list[RunningSequence | None] = [None] * batch.lanes
        self.tally = SequenceTable(batch.lanes, batch.config.context)
        self._reading: list[
            RunningSequence
        ] = []  # those who are at their prompts, and some who were
        self._seatings = 0
        self.figures = Stats()
        self._sent: list[InFlightStep] = []  # what was dispatched last and has not been read
        self._abandoned: collections.deque[Request] = collections.deque()

    def _recover(self) -> None:
        """Make everything anew of the requests that have not ended, and of their tokens.

        For a step that was interrupted or has failed: the device's state is unknown then, and the
        host's may be half of one step and half of the next. Generated tokens are kept; requests
        that ran are queued and prefilled again. Interrupted itself, it is done once more.
        """
        self._sent, self._reading = [], []
        self.batch.reset()
        self.seats = [None] * self.batch.lanes
        self.tally = SequenceTable(self.batch.lanes, self.batch.config.context)
        self.requests.discard(self.figures.ended.number)  # counted, and maybe still there
        for request in list(self.requests.live.values()):
            if request.seat is not None:
                request.preemptions += 1
                request.seat.part()
            if not request.endings:
                self._end_by_tokens(request)
            if request.endings:
                self._dismiss(request)
        self.requests.rebuild()

    def _end_by_tokens(self, request: Request) -> None:
        """End a request whose tokens say that it has ended."""
        tokens = request.tokens
        if not tokens:
            return
        try:
            match = self._match(request, tokens, len(tokens)) if request.stop_strings else None
        except Exception as error:  # a tokenizer that cannot say what these tokens mean
            request.end("error", error)
            return
        if match is not None or tokens[-1] in request.stop_ids:
            request.end("stop")
        elif len(tokens) >= request.max_new_tokens:
            request.end("length")

    def _charge(self, failed: StepError) -> None:
        """End the requests of a pass that failed; the others go on."""
        for request in failed.requests:
            request.end("error", failed.error)
        self._recover()

    def _sweep(self) -> None:
        """Let go of the requests that were ended between steps, wherever that was."""
        for request in self.requests.deserted():
            self._abandoned.append(request)
            request.end("cancelled")
        while self._abandoned:
            request = self._abandoned[0]
            request.end("cancelled")  # where an interrupt came before
            if request.seat is not None and self._sits(request.seat):
                self._vacate(request.seat)
            self._dismiss(request)
            self._abandoned.popleft()

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
            return len(self.requests.live) > 0
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
        later = []
        while None in self.seats and len(later) < 2 * len(self.seats):
            request = self.requests.pop()
            if request is None:
                break
            if self.share and request.swapped is None:
                page = self.batch.page
                if shared_ahead(request.history, request.tenant, self.seats, page):
                    later.append(request)
                    continue
            try:
                seat = self._seated(request)
            except Exception as error:
                # Of a store, or of a sampler: what keeps this one out need not stop the others.
                self._failed_alone(request, error)
                continue
            if seat is None:
                later.append(request)
                break
            self.seats[seat.lane] = request.seat = seat
            self._reading.append(seat)
        for request in later:
            self.requests.push(request)

    def _failed_alone(self, request: Request, error: Exception) -> None:
        """End a request by an error in what was done for it alone.

        Raises:
            PassError: the device's state went with it.
        """
        if not self.batch.intact():
            raise StepError([request], error) from error
        if request.seat is not None:
            self._leave(request.seat, "error", error)
        else:
            self._finish(request, "error", error)

    def _seated(self, request: Request) -> RunningSequence | None:
        """The request in the first free lane, None if there are too few pages to go on with."""
        lane, held = self.seats.index(None), self.batch.sequences(request.tenant)
        seat = RunningSequence(request, lane, self.tally, held, target=len(request.history))
        try:
            fits = self._take_pages(seat)
            if fits:
                limit = request.max_new_tokens - len(request.tokens)
                self.batch.install(seat, limit)
                self._seatings += 1
                seat.sit(self._seatings, limit)
        except Exception:  # not after an interrupt: what it has left half done is made anew
            self._unseat(seat)
            raise
        if not fits:
            self._unseat(seat)
            return None
        if not request.preemptions:
            request.cached_tokens = seat.cached
            self.figures.counts["hit_tokens"] += seat.cached
            self.figures.counts["asked_tokens"] += seat.target
        return seat

    def _unseat(self, seat: RunningSequence) -> None:
        self.batch.close(seat.held)
        self.tally.clear(seat.lane)

    def _take_pages(self, seat: RunningSequence) -> bool:
        """Find or restore what is known of a request; False where there are too few pages."""
        batch, request, saved = self.batch, seat.request, self._saved(seat.request)
        running = sum(seat is not None for seat in self.seats)
        if saved is not None:
            seat.ahead, seat.target = 0, saved.length
        elif self.share:
            seat.cached = batch.match(seat.held, request.history)
        # Each of those that run will soon want a page more.
        missing = batch.pages_for(seat.target + 1) - seat.cached // batch.page
        if running and missing > batch.free_pages() - running:
            return False
        if saved is not None:
            pages = batch.fetch(saved)
            request.swapped = None
            if pages is None:  # the store has lost them: as if they had not been saved
                seat.ahead, seat.target = 1, len(request.history)
            else:
                batch.restore(seat, saved.length, pages)
                seat.cached = seat.shown = saved.length
        return True

    def _saved(self, request: Request) -> SwappedPages | None:
        """Its pages on the host, where they are of all its tokens but the last, and of this model.

        They need not be: an interrupt or new weights may have come between.
        """
        saved = request.swapped
        if saved is None:
            return None
        if saved.weights is self.batch.weights and saved.length == len(request.history) - 1:
            return saved
        self._forget_swapped(request)
        return None

    def _dispatch(self) -> list[InFlightStep]:
        """Start the next piece of prompts and the next tokens; nothing is waited for."""
        prompts, saying = self._prompts(), self._saying()
        # One that was chosen may have made room for another since.
        prompts = [(seat, upto) for seat, upto in prompts if self._sits(seat)]
        parts = []
        if prompts:
            self.figures.counts["prefill_tokens"] += sum(u - seat.cached for seat, u in prompts)
            try:
                parts.append(self.batch.absorb(prompts))
            except Exception as error:
                raise StepError([seat.request for seat, _ in prompts], error) from error
            for seat, upto in prompts:
                # Whether pages that round could hold it is known once it has been read.
                if self.share and not self.batch.rounds:
                    self._show(seat, upto)
        if len(saying):
            try:
                parts.append(self.batch.decode(saying, self.tally, self.seats))
            except Exception as error:
                raise StepError([self._at(lane).request for lane in saying], error) from error
        if self.batch.windowed:
            for seat in [*map(self._at, saying), *(seat for seat, _ in prompts)]:
                self.batch.let_go(seat)
        return parts

    def _show(self, seat: RunningSequence, upto: int) -> None:
        self.batch.publish(seat, upto)
        seat.shown = upto

    def _sits(self, seat: RunningSequence) -> bool:
        return self.seats[seat.lane] is seat

    def _at(self, lane: Any) -> RunningSequence:
        """Who sits there."""
        seat = self.seats[lane]
        if seat is None:
            raise RuntimeError(f"nobody sits in lane {lane}: an error in jkv")
        return seat

    def _prompts(self) -> list[tuple[RunningSequence, int]]:
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

    def _reserve(self, seat: RunningSequence, upto: int) -> bool:
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
                    try:
                        self._preempt(last)
                    except Exception as error:  # of a store, or of the copy to the host
                        self._failed_alone(last.request, error)
                    if last is seat:
                        return False

    def _preempt(self, seat: RunningSequence) -> None:
        """Back to the queue, to go on with the same tokens; nothing is under way."""
        request = seat.request
        how = self._how(seat)
        if how == "swap" and not self._swap(seat):
            how = "recompute"
        request.preemptions += 1
        self.figures.counts[how] += 1
        self._vacate(seat)
        self.requests.push(request)

    def _swap(self, seat: RunningSequence) -> bool:
        """Its pages to the host; whether there was room for them."""
        request = seat.request
        saved = self.batch.saved(seat)
        # First the name, so that whatever interrupts this leaves nothing in a store for good.
        request.swapped = saved
        if not self.batch.save(seat, saved):
            request.swapped = None
        return request.swapped is not None

    def _how(self, seat: RunningSequence) -> str:
        """What becomes of its pages."""
        size = self.batch.bytes_of(seat)
        swapped = (r.swapped for r in self.requests.live.values())
        held = sum(saved.nbytes for saved in swapped if saved is not None)
        if seat.reading or held + size > self.swap_bytes:
            return "recompute"
        if self.preemption != "auto":
            return self.preemption
        # There and back, against the prefill of as much if the prefix index has lost it all.
        swap = 2 * size / self.batch.rate
        return "swap" if swap < seat.written() / self.figures.prefill_rate() else "recompute"

    def _accept(self, parts: list[InFlightStep]) -> None:
        """Read what passes said into their requests."""
        said = speakers = 0
        tally = self.tally
        for part in parts:
            try:
                told, lanes = self.batch.read(part), part.lanes
            except Exception as error:
                raise StepError(list(self._those_in(part)), error) from error
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

    def _those_in(self, part: InFlightStep) -> Iterable[Request]:
        """Requests of a pass that still are where they were."""
        for lane, number in zip(part.lanes.tolist(), part.numbers.tolist(), strict=True):
            if self.tally.number[lane] == number:
                yield self._at(lane).request
        yield from (seat.request for seat in part.reading if self._sits(seat))

    def _broke(self, seat: RunningSequence) -> None:
        """End a request whose pages were given what no code can hold; they are not reused."""
        self._poisoned(
            seat,
            f"the model made NaN or infinity of this request's tokens, at step "
            f"{len(seat.request.tokens)} or soon after (step 0 is the first new token), which no "
            "code of these pages can hold; look for such values in the weights",
        )

    def _undrawable(self, seat: RunningSequence, *, by_sampler: bool) -> None:
        """End a request that had nothing to draw its next token from.

        Where it is the model's fault its pages may hold NaN, so they are not reused.
        """
        step = len(seat.request.tokens)
        cause = faults.SAMPLER if by_sampler else faults.MODEL
        message = (
            f"a token could not be drawn, at step {step} (step 0 is the first new token): {cause}"
        )
        if by_sampler:
            self._leave(seat, "error", NonFiniteError(message))
        else:
            self._poisoned(seat, message)

    def _poisoned(self, seat: RunningSequence, message: str) -> None:
        """End a request and let nothing find its pages."""
        seat.request.end("error", NonFiniteError(message))
        self.batch.withdraw(seat)
        self._free(seat)
        self._dismiss(seat.request)

    def _heard(self, seat: RunningSequence, tokens: list[int], active: bool) -> None:
        request = seat.request
        if not request.watched:
            self.tally.quiet[seat.lane] = self.tally.number[seat.lane]
        if self.share and seat.shown < seat.target:
            self._show(seat, seat.target)
        if request.first_token is None:
            request.first_token = time.perf_counter()
            self.figures.first.append(request.first_token - request.submitted)
        ended = False
        if request.watched:
            try:
                ended = self._told(request, tokens)
            except Exception as error:
                # A user's function, or a tokenizer that cannot say what these tokens mean: this
                # request's affair, and no other's.
                request.end("error", error)
            if not self._sits(seat):
                return  # cancelled by its own callback
        self.tally.hear(np.asarray([seat.lane]), np.asarray([tokens], np.int32))
        if request.endings:
            self._leave(seat)
        elif ended:
            self._leave(seat, "stop")
        elif not active:
            stopped = request.tokens[-1] in request.stop_ids
            self._leave(seat, "stop" if stopped else "length")

    def _told(self, request: Request, tokens: list[int]) -> bool:
        """Give a watched request its tokens one by one, up to a stop string; whether there is one.

        A token that is in the request has been told to its callback, or is being told: after an
        interrupt it is not told again.
        """
        heard = request.heard
        match = None
        if request.stop_strings:
            match = self._match(request, heard + tokens, len(tokens))
        for token in tokens if match is None else tokens[: match.kept - len(heard)]:
            heard.append(token)
            if request.on_token is not None:
                request.on_token(request, token)
                if request.endings:
                    break
        return match is not None

    def _match(self, request: Request, tokens: list[int], fresh: int) -> StopMatch | None:
        """Where a stop string is complete in one of the last `fresh` tokens of a request."""
        return first_stop(self.tokenizer, request.stop_strings, request.prompt, tokens, fresh)

    def _leave(
        self, seat: RunningSequence, reason: str = "", error: Exception | None = None
    ) -> None:
        """End a request that runs, if it has not ended; its pages go back, to be found again."""
        if reason:
            seat.request.end(reason, error)
        self._vacate(seat)
        self._dismiss(seat.request)

    def _vacate(self, seat: RunningSequence) -> None:
        """Give pages and lane back; what the pages hold may still be found."""
        if self.share:
            self.batch.publish(seat, seat.written())
        self._free(seat)

    def _free(self, seat: RunningSequence) -> None:
        self.batch.close(seat.held)
        seat.part()
        self.tally.clear(seat.lane)
        self.seats[seat.lane] = None

    def _finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """End a request that has no lane."""
        request.end(reason, error)
        self._dismiss(request)

    def _dismiss(self, request: Request) -> None:
        """Count a request that has ended, and let go of it; done again it changes nothing."""
        if request.number not in self.requests.live:
            return
        if request.swapped is not None:
            self._forget_swapped(request)
        self.figures.count(request.number, request.finish_reason or "", len(request.tokens))
        self.requests.discard(request.number)

    def _forget_swapped(self, request: Request) -> None:
        self.batch.forget(request.swapped)
        request.swapped = None


def _rank(seat: RunningSequence) -> int:
    return seat.request.rank
