"""The engine's parts and the steps over them: scheduler, runner, swap."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable
from typing import Any

from jkv.cache.paged import PagedKind
from jkv.decoding.arguments import DecoderLike, Sampler, TokenizerLike
from jkv.engine.allocator import PageAllocator
from jkv.engine.outputs import OutputProcessor
from jkv.engine.request import Request
from jkv.engine.runner import InFlightStep, Runner, StepError
from jkv.engine.schedule import BatchLimits, Schedule
from jkv.engine.scheduler import Preemption, Scheduler
from jkv.engine.stats import Stats
from jkv.engine.swap import Swap
from jkv.store.policy import Policy
from jkv.store.store import Store

SAMPLED = 16  # steps, of which one is looked at for slots that are held and not filled


class EngineCore:
    """Moves requests on, step by step. Not for several threads at once.

    The host is one step behind the device: a step is dispatched before the tokens of the last one
    are read. After an interrupt, `recover` comes before anything else.

    Args:
        model: a decoder.
        tokenizer: for stop strings, or None.
        kind: of the pages.
        limits: of a step.
        policy: which cached page is evicted first.
        store: for pages that leave the device, or None.
        share: whether equal prefixes share pages.
        preemption: what becomes of a preempted request's pages.
        swap_bytes: of such pages on the host, at most.
    """

    def __init__(
        self,
        model: DecoderLike,
        tokenizer: TokenizerLike | None,
        *,
        kind: PagedKind,
        limits: BatchLimits,
        policy: Policy | None,
        store: Store | None,
        share: bool,
        preemption: Preemption,
        swap_bytes: int,
    ):
        self.runner = Runner(model, kind, limits)
        self.swap = Swap(self.runner, store)
        self.pages = PageAllocator(
            pages=kind.pages or 1, page=kind.page, windows=self.runner.windows, policy=policy
        )
        self.stats = Stats()
        self.scheduler = Scheduler(
            self.pages,
            self.swap,
            self.stats,
            limits=limits,
            context=model.config.context,
            share=share,
            publish_unread=kind.keys is None,  # quantized pages may turn out not to be finite
            preemption=preemption,
            swap_bytes=swap_bytes,
        )
        self._reset_pages()
        self._outputs = OutputProcessor(self.scheduler, tokenizer, self.stats)
        self._in_flight: list[InFlightStep] = []  # dispatched last, and not read yet
        self._abandoned: collections.deque[Request] = collections.deque()

    def step(self) -> bool:
        """Run a step; one that fails ends its own requests, and the others go on."""
        try:
            return self._try_step()
        except StepError as failed:
            self._end_failed(failed)
            return True

    def _try_step(self) -> bool:
        began, waited = time.perf_counter(), self.runner.waited
        self._admit()
        schedule = self._schedule()
        self.swap.save_evicted()
        dispatched = self.runner.execute(schedule)
        self.scheduler.commit(schedule)
        before, self._in_flight = self._in_flight, dispatched
        self._process(before)
        self._flush_store()
        if not before and not dispatched:
            self.stats.record_idle()
            return len(self.scheduler.requests.live) > 0
        prefilled = sum(prefill.stop - prefill.start for prefill in schedule.prefills)
        seconds, waited = time.perf_counter() - began, self.runner.waited - waited
        self.stats.record_step(seconds, waited, prefilled)
        if self.stats.counts["steps"] % SAMPLED == 0:
            self.stats.record_slots(*self.pages.slots(self.scheduler.table))
        return True

    def _admit(self) -> None:
        """Let waiting requests run that have a lane and pages."""
        admitted, failed = self.scheduler.admit()
        for request, error in failed:
            self._end_alone(request, error)
        for sequence in admitted:
            try:
                self.runner.install(sequence)
            except Exception as error:  # what fails one request need not stop the others
                self._end_alone(sequence.request, error)

    def _schedule(self) -> Schedule:
        schedule = self.scheduler.schedule(in_flight=bool(self._in_flight))
        if schedule is None:  # pages are short, and what is in flight may free some
            self._process_in_flight()
            schedule = self.scheduler.schedule(in_flight=False)
        if schedule is None:
            raise RuntimeError("nothing is in flight and outputs are waited for: an error in jkv")
        return schedule

    def _process_in_flight(self) -> None:
        """Read what has been dispatched: then the host knows all tokens there are."""
        before, self._in_flight = self._in_flight, []
        self._process(before)

    def _process(self, steps: list[InFlightStep]) -> None:
        """Read the outputs of steps into their requests.

        Raises:
            StepError: a step failed on the device.
        """
        tokens = lanes = 0
        for step in steps:
            try:
                output = self.runner.read(step)
            except Exception as error:
                requests = self.scheduler.requests_in(step.lane_ids, step.sequence_ids)
                raise StepError(requests, error) from error
            found = self._outputs.process(output)
            tokens, lanes = tokens + found[0], lanes + found[1]
        if tokens:
            self.stats.record_tokens(tokens, lanes, time.perf_counter())

    def _end_alone(self, request: Request, error: Exception) -> None:
        """End a request by an error in what was done for it alone.

        Raises:
            StepError: the device's state went with it.
        """
        if not self.runner.intact():
            raise StepError([request], error) from error
        self.scheduler.finish(request, "error", error)

    def _end_failed(self, failed: StepError) -> None:
        """End the requests of a step that failed; the others go on."""
        for request in failed.requests:
            request.end("error", failed.error)
        self.recover()

    def end_all(self) -> None:
        """Cancel all requests, and store the pages that may be found again."""
        try:
            self._process_in_flight()
        except StepError as failed:
            self._end_failed(failed)
        for request in list(self.scheduler.requests.live.values()):
            self.scheduler.finish(request, "cancelled")
        self.swap.save_all(self.pages.pools[0].cached())
        self._flush_store()

    def _flush_store(self) -> None:
        self.swap.flush(self.pages.page / self.stats.prefill_rate())

    def sweep(self) -> None:
        """Release what belongs to requests that were ended between transactions."""
        for request in self.scheduler.requests.abandoned():
            self._abandoned.append(request)
            request.end("cancelled")
        while self._abandoned:
            # It has not ended yet where an interrupt came first.
            self.scheduler.finish(self._abandoned[0], "cancelled")
            self._abandoned.popleft()

    def recover(self) -> None:
        """Make everything anew from the requests that have not ended, and their tokens.

        After an interrupt or a failed step the device's state is unknown, and the host's may be
        half of one step and half of the next. Generated tokens are kept; running requests are
        queued and prefilled again. If this is interrupted itself, it is repeated.
        """
        self._in_flight = []
        self.runner.reset()
        self.swap.reset()
        self._reset_pages()
        self.scheduler.recover(self._outputs.end_if_complete)

    def _reset_pages(self) -> None:
        on_evict = self.swap.on_evict if self.swap.keeps_evicted else None
        self.pages.reset(self.swap.fingerprint, on_evict)
        self.scheduler.reset()

    # What an engine asks for beside steps.

    def abandon(self, request: Request) -> None:
        """End a request now, and release what it holds with the next `sweep`; at any time."""
        if not request.endings:
            # First the intent: a request that has ended and is not swept would be live for ever.
            self._abandoned.append(request)
            request.end("cancelled")

    def needs_sweep(self) -> bool:
        """Whether a request was ended between steps."""
        return bool(self._abandoned or self.scheduler.requests.abandoned())

    def update(self, model: DecoderLike) -> None:
        """Take new weights; all requests go on from their tokens."""
        self.runner.model = model
        self.recover()

    def warm(self, samplers: Iterable[Sampler]) -> None:
        """Compile all that is needed for requests with these samplers, and greedy ones."""
        for sampler in samplers:
            self.runner.add_sampler(self.runner.bind(sampler, ()))
        if self.scheduler.preemption != "recompute":
            self.swap.warm()
        self.runner.warm()

    def figures(self) -> dict[str, Any]:
        """Return the figures of `Stats.as_dict`."""
        live = list(self.scheduler.requests.live.values())
        return self.stats.as_dict(live=live, pool=self.pages.stats())
