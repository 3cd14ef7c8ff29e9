"""A scheduler over a device in plain Python: pages are lists, and a token is a sum of others."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jkv.decoding.prompts import PAD
from jkv.engine.allocator import PageAllocator
from jkv.engine.decode_state import ENDED
from jkv.engine.outputs import OutputProcessor
from jkv.engine.page_pool import PageSequence
from jkv.engine.request import Request, SwappedPages
from jkv.engine.runner import StepOutput
from jkv.engine.schedule import BatchLimits, Schedule
from jkv.engine.scheduler import Scheduler
from jkv.engine.sequence import RunningSequence
from jkv.engine.stats import Stats


def next_token(ids: list[int]) -> int:
    """Return the token after these; it depends on each of them."""
    return (sum(i * token for i, token in enumerate(ids, 1)) + 7) % 97


def answer(prompt: list[int], new: int) -> list[int]:
    """Return what a request generates."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


class FakeRunner:
    """Pages with tokens in them, and the state of each lane."""

    def __init__(self, pages: int, page: int, windows: tuple[int | None, ...], block: int):
        self.page, self.windows, self.block = page, windows, block
        empty: list[int | None] = [None] * page
        self.contents = [[list(empty) for _ in range(pages)] for _ in windows]
        self.ids: dict[int, list[int]] = {}  # by lane: all tokens, the pending one too
        self.remaining: dict[int, int] = {}

    def install(self, sequence: RunningSequence) -> None:
        self.ids[sequence.lane] = sequence.request.history.tolist()
        self.remaining[sequence.lane] = sequence.limit

    def execute(self, schedule: Schedule) -> list[StepOutput]:
        outputs = []
        if schedule.prefills:
            outputs.append(self.prefill(schedule))
        if len(schedule.decodes):
            rows = [self.decode(schedule.running[lane]) for lane in schedule.decodes.tolist()]
            outputs.append(self.output(schedule, schedule.decodes, rows))
        return outputs

    def prefill(self, schedule: Schedule) -> StepOutput:
        lanes, rows = [], []
        for prefill in schedule.prefills:
            sequence = prefill.sequence
            ids = self.ids[sequence.lane]
            self.write(sequence, ids, prefill.start, prefill.stop)
            if prefill.stop == sequence.target:
                lanes.append(sequence.lane)
                rows.append(self.generate(sequence, 1))
        return self.output(schedule, np.asarray(lanes, int), rows)

    def decode(self, sequence: RunningSequence | None) -> list[int]:
        assert sequence is not None
        assert self.remaining[sequence.lane] > 0
        tokens = []
        for _ in range(min(self.block, self.remaining[sequence.lane])):
            ids = self.ids[sequence.lane]
            self.write(sequence, ids, len(ids) - 1, len(ids))
            tokens += self.generate(sequence, 1)
        return tokens + [PAD] * (self.block - len(tokens))

    def write(self, sequence: RunningSequence, ids: list[int], start: int, stop: int) -> None:
        for contents, pages in zip(self.contents, sequence.page_tables, strict=True):
            for at in range(start, stop):
                page = pages.table[at // self.page]
                assert page >= 0
                contents[page][at % self.page] = ids[at]

    def generate(self, sequence: RunningSequence, count: int) -> list[int]:
        """Return a sequence's next token; all its tokens must be where its tables say."""
        ids = self.ids[sequence.lane]
        for contents, pages, window in zip(
            self.contents, sequence.page_tables, self.windows, strict=True
        ):
            for at in range(0 if window is None else max(0, len(ids) - window), len(ids)):
                page = pages.table[at // self.page]
                assert page >= 0
                assert contents[page][at % self.page] == ids[at]
        ids.append(next_token(ids))
        self.remaining[sequence.lane] -= 1
        return ids[-1:]

    def output(self, schedule: Schedule, lanes: np.ndarray, rows: list[list[int]]) -> StepOutput:
        flags = [0 if self.remaining[lane] else ENDED for lane in lanes.tolist()]
        tokens = np.asarray(rows, np.int32) if rows else np.zeros((0, 1), np.int32)
        return StepOutput(lanes, schedule.table.ids[lanes], tokens, np.asarray(flags, np.int32))


class FakeSwap:
    """Copies of pages: of swapped requests as long as there is room, and of all evicted ones."""

    rate = 1e9

    def __init__(self, runner: FakeRunner, room: bool = True):
        self.runner, self.room = runner, room
        self.stored: dict[bytes, np.ndarray] = {}
        self._evicted: list[tuple[bytes, int]] = []

    def on_evict(self, name: bytes, page: int) -> None:
        self._evicted.append((name, page))

    def save_evicted(self) -> None:
        for name, page in self._evicted:
            self.stored[name] = np.asarray(self.runner.contents[0][page])
        self._evicted.clear()

    def find_pages(self, table: PageSequence, ids: list[int], most: int) -> list[list[np.ndarray]]:
        names = table.names(ids)[len(table.table) :][:most]
        there = itertools.takewhile(self.stored.__contains__, names)
        return [[self.stored[name]] for name in there]

    def load(self, pages: Sequence[int], contents: list[list[np.ndarray]]) -> None:
        self.save_evicted()
        for page, (tokens,) in zip(pages, contents, strict=True):
            self.runner.contents[0][page] = tokens.tolist()

    def saved(self, request: Request) -> SwappedPages | None:
        assert request.swapped is None or request.swapped.length == len(request.history) - 1
        return request.swapped

    def save(self, sequence: RunningSequence) -> bool:
        if self.room:
            pages = [
                ([copy.copy(contents[page]) for page in table.table], None)
                for contents, table in zip(self.runner.contents, sequence.page_tables, strict=True)
            ]
            request = sequence.request
            request.swapped = SwappedPages(sequence.written, [], contents=pages, nbytes=1)
        return self.room

    def fetch(self, request: Request) -> Any:
        saved, request.swapped = request.swapped, None
        return None if saved is None else saved.contents

    def restore(self, sequence: RunningSequence, contents: Any) -> None:
        self.save_evicted()
        groups = zip(self.runner.contents, sequence.page_tables, contents, strict=True)
        for group, table, (pages, _) in groups:
            for page, saved in zip(table.table, pages, strict=False):
                group[page] = list(saved)

    def discard(self, request: Request) -> None:
        request.swapped = None

    def nbytes(self, tokens: int) -> int:
        return tokens


class Machine:
    """A scheduler driven as by an engine, one step behind the device."""

    def __init__(
        self,
        pages: int = 64,
        page: int = 4,
        lanes: int = 3,
        block: int = 2,
        chunk: int = 8,
        windows: tuple[int | None, ...] = (None,),
        room: bool = True,
        store: bool = False,
        **how: Any,
    ):
        self.runner = FakeRunner(pages, page, windows, block)
        self.swap = FakeSwap(self.runner, room)
        self.pages = PageAllocator(pages=pages, page=page, windows=windows, policy=None)
        self.stats = Stats()
        limits = BatchLimits(lanes=lanes, block=block, chunk=chunk, rows=2)
        how = {"preemption": "recompute"} | how
        self.scheduler = Scheduler(
            self.pages, self.swap, self.stats, limits=limits, context=256, **how
        )
        self.outputs = OutputProcessor(self.scheduler, None, self.stats)
        self.pages.reset(b"", self.swap.on_evict if store else None)
        self.in_flight: list[StepOutput] = []
        self.numbers = itertools.count(1)
        self.schedules: list[Schedule] = []

    def submit(self, prompt: list[int], new: int, tenant: str = "", rank: int = 0) -> Request:
        number = next(self.numbers)
        request = Request(
            number=number,
            prompt=np.asarray(prompt, np.int32),
            max_new_tokens=new,
            sampler=None,
            key=None,
            stop_ids=(),
            stop_strings=(),
            priority=0,
            tenant=tenant,
            on_token=None,
            engine=self,
            rank=number + rank,
            submitted=time.perf_counter(),
        )
        self.scheduler.requests.add([request])
        return request

    def step(self) -> bool:
        """One step; whether there is more to do."""
        admitted, failed = self.scheduler.admit()
        assert not failed
        for sequence in admitted:
            self.runner.install(sequence)
        schedule = self.scheduler.schedule(in_flight=bool(self.in_flight))
        if schedule is None:
            self.process()
            schedule = self.scheduler.schedule(in_flight=False)
        assert schedule is not None
        self.schedules.append(schedule)
        self.swap.save_evicted()
        dispatched = self.runner.execute(schedule)
        self.scheduler.commit(schedule)
        self.process()
        self.in_flight = dispatched
        for sequence in self.scheduler.running:
            if sequence is not None and not sequence.in_prefill:
                # All but the latest token, which no step has written yet.
                assert sequence.written == len(sequence.request.history) - 1
        return bool(self.in_flight or self.scheduler.requests.live)

    def process(self) -> None:
        before, self.in_flight = self.in_flight, []
        for output in before:
            self.outputs.process(output)

    def run(self) -> None:
        assert any(not self.step() for _ in range(1000)), "the scheduler never rests"
        assert self.pages.stats()["used"] == 0
        for pool in self.pages.pools:
            pool.check()

    # What requests ask of an engine.

    def advance(self, request: Any, seen: int) -> None: ...
    def cancel(self, request: Any) -> None: ...
    def abandon(self, request: Any) -> None: ...
    def text(self, request: Any) -> str: ...
    def watch(self, reader: Any, request: Any) -> None: ...
