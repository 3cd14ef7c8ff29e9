"""Which requests run, what each step computes of them, and which pages they hold. No JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from jkv.engine.allocator import PageAllocator
from jkv.engine.page_pool import PageSequence
from jkv.engine.request import Contents, PageLeaves, Request, SwappedPages
from jkv.engine.request_queue import RequestQueue
from jkv.engine.schedule import BatchLimits, Prefill, Schedule
from jkv.engine.sequence import RunningSequence, SequenceTable
from jkv.engine.stats import Stats
from jkv.errors import PoolFullError

Preemption = Literal["auto", "recompute", "swap"]


@runtime_checkable
class PageSwap(Protocol):
    """Where pages go that leave the device, and come back from: `jkv.engine.swap.Swap`."""

    rate: float  # bytes per second between device and host, as measured

    def find_pages(self, table: PageSequence, ids: list[int], most: int) -> list[PageLeaves]:
        """Return stored pages that continue a page table over the tokens `ids`."""
        ...

    def load(self, pages: Sequence[int], contents: list[PageLeaves]) -> None:
        """Write what `find_pages` returned into these pages."""
        ...

    def saved(self, request: Request) -> SwappedPages | None:
        """Return the request's pages on the host, if it can go on from them."""
        ...

    def save(self, sequence: RunningSequence) -> bool:
        """Copy a sequence's pages to the host; False if there is no room for them."""
        ...

    def fetch(self, request: Request) -> Contents | None:
        """Take the request's pages from the host; None if they were lost."""
        ...

    def restore(self, sequence: RunningSequence, contents: Contents) -> None:
        """Write what `fetch` returned into the sequence's pages."""
        ...

    def discard(self, request: Request) -> None:
        """Delete the request's pages on the host."""
        ...

    def nbytes(self, tokens: int) -> int:
        """Return the bytes of the pages of so many tokens."""
        ...


class _OutputsPending(Exception):
    """Pages are short, and steps in flight may still free some."""


class Scheduler:
    """Moves requests between waiting and running; not for several threads at once.

    Waiting requests are admitted by rank while there are lanes and pages. When running ones need
    more pages than are free, those that come last in rank are preempted: they wait again, and go
    on later with the same tokens.

    Args:
        pages: of all sequences.
        swap: where preempted requests' pages may go.
        stats: counts what happens.
        limits: of each step.
        context: tokens of the longest sequence.
        share: whether equal prefixes of one tenant's prompts share pages.
        publish_unread: whether pages may be found as soon as they are dispatched; else once the
            step was read and its values are known to be finite.
        preemption: what becomes of a preempted request's pages; see `jkv.Engine`.
        swap_bytes: on the host, at most.

    Attributes:
        requests: all that have not ended.
        running: by lane.
        table: counts of the lanes.
    """

    def __init__(
        self,
        pages: PageAllocator,
        swap: PageSwap,
        stats: Stats,
        *,
        limits: BatchLimits,
        context: int,
        share: bool = True,
        publish_unread: bool = True,
        preemption: Preemption = "auto",
        swap_bytes: int = 1 << 30,
    ):
        self.pages, self.swap, self.stats = pages, swap, stats
        self.limits, self.context = limits, context
        self.share, self.publish_unread = share, publish_unread
        self.preemption, self.swap_bytes = preemption, swap_bytes
        self.requests = RequestQueue()
        self._sequences = 0  # that ever ran
        self.reset()

    def reset(self) -> None:
        """Forget which requests run; they stay, each still with its sequence."""
        self.running: list[RunningSequence | None] = [None] * self.limits.lanes
        self.table = SequenceTable(self.limits.lanes, self.context)
        self._prefilling: list[RunningSequence] = []  # and some that have left

    # From waiting to running.

    def admit(self) -> tuple[list[RunningSequence], list[tuple[Request, Exception]]]:
        """Give lanes and pages to waiting requests, by rank, as long as there are both.

        Returns:
            The new sequences; and requests that failed, such as by a store, with the reason.
        """
        admitted: list[RunningSequence] = []
        failed: list[tuple[Request, Exception]] = []
        deferred: list[Request] = []
        while None in self.running and len(deferred) < 2 * len(self.running):
            request = self.requests.pop()
            if request is None:
                break
            if self._prefix_in_prefill(request):
                deferred.append(request)
                continue
            try:
                sequence = self._start(request)
            except Exception as error:  # what fails one request need not stop the others
                failed.append((request, error))
                continue
            if sequence is None:
                deferred.append(request)
                break
            self.running[sequence.lane] = request.sequence = sequence
            self._prefilling.append(sequence)
            admitted.append(sequence)
        for request in deferred:
            self.requests.push(request)
        return admitted, failed

    def _start(self, request: Request) -> RunningSequence | None:
        """Give a request the first free lane; None if too few pages are free to go on with."""
        lane, page_tables = self.running.index(None), self.pages.open(request.tenant)
        sequence = RunningSequence(
            request, lane, self.table, page_tables, target=len(request.history)
        )
        try:
            fits = self._allocate(sequence)
        except Exception:  # an interrupt is recovered from elsewhere
            self._free(sequence)
            raise
        if not fits:
            self._free(sequence)
            return None
        self._sequences += 1
        sequence.start(self._sequences)
        self.pages.count_slots(sequence)
        if not request.preemptions:
            request.cached_tokens = sequence.cached
            self.stats.counts["hit_tokens"] += sequence.cached
            self.stats.counts["asked_tokens"] += sequence.target
        return sequence

    def _allocate(self, sequence: RunningSequence) -> bool:
        """Find or restore a request's known tokens; False if too few pages are free."""
        pages, request = self.pages, sequence.request
        saved = self.swap.saved(request)
        if saved is not None:
            sequence.pending, sequence.target = 0, saved.length
        elif self.share:
            self._match_prefix(sequence)
        # Each running sequence will soon want one more page.
        running = sum(other is not None for other in self.running)
        missing = pages.pages_for(sequence.target + 1) - sequence.cached // pages.page
        if running and missing > pages.free_pages - running:
            return False
        if saved is not None:
            contents = self.swap.fetch(request)
            if contents is None:  # lost: as if they had not been saved
                sequence.pending, sequence.target = 1, len(request.history)
            else:
                pages.reserve(sequence, saved.length)
                self.swap.restore(sequence, contents)
                # What had left a window when it was saved holds anything: nothing may find it.
                pages.release_windows(sequence, saved.length)
                sequence.cached = sequence.published = saved.length
        return True

    def _match_prefix(self, sequence: RunningSequence) -> None:
        """Take cached pages of the sequence's tokens, and then those that a store has."""
        ids, tables = sequence.request.history.tolist(), sequence.page_tables
        sequence.cached = self.pages.match(tables, ids)
        if len(tables) > 1:  # the store has pages of single groups, and a prefix needs all of them
            return
        (table,) = tables
        contents = self.swap.find_pages(table, ids[:-1], self.pages.free_pages)
        if contents:
            first = len(table.table)
            table.reserve((first + len(contents)) * self.pages.page)
            self.swap.load(table.table[first:], contents)
            table.publish(ids[: table.length])
            sequence.cached = table.length

    def _prefix_in_prefill(self, request: Request) -> bool:
        """Whether a running sequence is computing pages that this prompt begins with too.

        That is worth waiting a few steps for: the pages are then found instead of computed again.
        """
        if not self.share or request.swapped is not None:
            return False
        page, history = self.pages.page, request.history
        for other in self.running:
            if other is None or other.published == other.target:
                continue
            if other.request.tenant != request.tenant:
                continue
            ids = other.request.history[: other.target]
            most = min(len(history) - 1, len(ids))
            same = history[:most] == ids[:most]
            common = most if same.all() else int(np.argmin(same))
            if other.published < common // page * page:
                return True
        return False

    # What a step computes.

    def schedule(self, *, in_flight: bool) -> Schedule | None:
        """Choose what the next step computes, and reserve the pages for it.

        Call `commit` with the result once it is dispatched.

        Args:
            in_flight: whether a step has been dispatched and its outputs have not been processed.

        Returns:
            None if pages are short while a step is in flight. Its outputs may free pages, and a
            request is preempted only once all its tokens are known: process them, and call again.
        """
        try:
            prefills = self._prefills(in_flight)
            self._reserve_decodes(in_flight)
        except _OutputsPending:
            return None
        decodes = self.table.advance(self.limits.block)
        # A chosen prefill may have been preempted since.
        prefills = [prefill for prefill in prefills if self.is_running(prefill.sequence)]
        return Schedule(prefills, decodes, self.running, self.table)

    def commit(self, schedule: Schedule) -> None:
        """Take a schedule as dispatched: publish its prefills, release pages outside windows."""
        for prefill in schedule.prefills:
            prefill.sequence.advance_prefill(prefill.stop)
            if self.share and self.publish_unread:
                self.publish(prefill.sequence, prefill.stop)
        if self.pages.windowed:
            decoding = [self.sequence_in(lane) for lane in schedule.decodes.tolist()]
            for sequence in [*decoding, *(p.sequence for p in schedule.prefills)]:
                self.pages.release_windows(sequence, sequence.written)

    def publish(self, sequence: RunningSequence, length: int) -> None:
        """Let other requests find the pages of the first `length` tokens of its target."""
        self.pages.publish(sequence, length)
        sequence.published = length

    def _prefills(self, in_flight: bool) -> list[Prefill]:
        """Choose pieces of prompts, the first in rank, and reserve their pages."""
        if not self._prefilling:
            return []
        prefilling = sorted(
            (s for s in self._prefilling if s.in_prefill and self.is_running(s)), key=_rank
        )
        self._prefilling, limits = prefilling, self.limits
        alone = len(prefilling) == 1 or limits.rows == 1
        most = limits.chunk if alone else limits.shared_chunk
        chosen = []
        for sequence in prefilling[: limits.rows]:
            stop = min(sequence.cached + most, sequence.target)
            if self.is_running(sequence) and self._reserve(sequence, stop, in_flight):
                chosen.append(Prefill(sequence, sequence.cached, stop))
        return chosen

    def _reserve_decodes(self, in_flight: bool) -> None:
        """Reserve pages for the next tokens of all lanes; the first in rank get theirs first."""
        table, pages, block = self.table, self.pages, self.limits.block
        lengths = table.lengths_after(block)
        short = (lengths > table.reserved).nonzero()[0]
        if pages.free_pages >= len(short) * pages.pages_for(block):
            pages.extend(table, self.running, short, lengths[short])
            return
        for sequence in sorted(map(self.sequence_in, short.tolist()), key=_rank):
            if self.is_running(sequence):
                self._reserve(sequence, int(lengths[sequence.lane]), in_flight)

    def _reserve(self, sequence: RunningSequence, length: int, in_flight: bool) -> bool:
        """Reserve pages for `length` tokens; False if the sequence was preempted itself."""
        while True:
            try:
                self.pages.reserve(sequence, length)
                return True
            except PoolFullError:
                if in_flight:
                    raise _OutputsPending from None
                last = max((s for s in self.running if s), key=_rank)
                try:
                    self._preempt(last)
                except Exception as error:  # of a store, or of the copy to the host
                    self.finish(last.request, "error", error)
                if last is sequence:
                    return False

    # From running to waiting, or to the end.

    def _preempt(self, sequence: RunningSequence) -> None:
        """Let a sequence's request wait again; all its tokens are known."""
        request = sequence.request
        how = self._preemption_of(sequence)
        if how == "swap" and not self.swap.save(sequence):
            how = "recompute"
        request.preemptions += 1
        self.stats.counts[how] += 1
        self._release(sequence)
        self.requests.push(request)

    def _preemption_of(self, sequence: RunningSequence) -> str:
        """Return "swap" or "recompute"."""
        size = self.swap.nbytes(sequence.written)
        swapped = (request.swapped for request in self.requests.live.values())
        held = sum(saved.nbytes for saved in swapped if saved is not None)
        if sequence.in_prefill or held + size > self.swap_bytes:
            return "recompute"
        if self.preemption != "auto":
            return self.preemption
        # There and back, against a prefill of all of it: the prefix index may lose every page.
        seconds = 2 * size / self.swap.rate
        return "swap" if seconds < sequence.written / self.stats.prefill_rate() else "recompute"

    def finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """End a request that has not ended, and take back all that it holds."""
        request.end(reason, error)
        sequence = request.sequence
        if sequence is not None and self.is_running(sequence):
            self._release(sequence)
        self.forget(request)

    def finish_unusable(self, sequence: RunningSequence, error: Exception) -> None:
        """End a request whose pages must not be reused: none of them is found again."""
        sequence.request.end("error", error)
        self.pages.withdraw(sequence)
        self._leave(sequence)
        self.forget(sequence.request)

    def forget(self, request: Request) -> None:
        """Count a request that has ended, and drop it; repeated, this changes nothing."""
        if request.number not in self.requests.live:
            return
        if request.swapped is not None:
            self.swap.discard(request)
        reason = request.finish_reason or ""
        self.stats.record_finished(request.number, reason, len(request.tokens))
        self.requests.discard(request.number)

    def _release(self, sequence: RunningSequence) -> None:
        """Take back pages and lane; what the pages hold may still be found."""
        if self.share:
            self.pages.publish(sequence, sequence.written)
        self._leave(sequence)

    def _leave(self, sequence: RunningSequence) -> None:
        self.pages.close(sequence.page_tables)
        sequence.detach()
        self.table.clear(sequence.lane)
        self.running[sequence.lane] = None

    def _free(self, sequence: RunningSequence) -> None:
        """Undo what was done for a sequence that never ran."""
        self.pages.close(sequence.page_tables)
        self.table.clear(sequence.lane)

    def recover(self, end_if_complete: Callable[[Request], None]) -> None:
        """Let all requests wait that have not ended, after a `reset` in the middle of a step.

        Args:
            end_if_complete: ends a request whose tokens show that it is complete.
        """
        self.requests.discard(self.stats.finished.number)  # counted, and maybe still there
        for request in list(self.requests.live.values()):
            if request.sequence is not None:
                request.preemptions += 1
                request.sequence.detach()
            if not request.endings:
                end_if_complete(request)
            if request.endings:
                self.forget(request)
        self.requests.rebuild()

    # Which sequences run.

    def is_running(self, sequence: RunningSequence) -> bool:
        """Whether a sequence still has its lane."""
        return self.running[sequence.lane] is sequence

    def sequence_in(self, lane: int) -> RunningSequence:
        """Return the sequence in a lane."""
        sequence = self.running[lane]
        if sequence is None:
            raise RuntimeError(f"lane {lane} has no sequence: an error in jkv")
        return sequence

    def requests_in(self, lanes: np.ndarray, ids: np.ndarray) -> list[Request]:
        """Return the requests of the sequences of these ids that still are in these lanes."""
        there = lanes[self.table.ids[lanes] == ids]
        return [self.sequence_in(lane).request for lane in there.tolist()]


def _rank(sequence: RunningSequence) -> int:
    return sequence.request.rank
