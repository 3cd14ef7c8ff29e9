"""The model on its devices: its pages, the state of the lanes, and steps over both."""

from __future__ import annotations

import dataclasses
import functools
import operator
import time
from collections.abc import Hashable, Sequence

import jax
import numpy as np

from jkv._axes import Array
from jkv._pytree import nbytes
from jkv._text import brief
from jkv.cache import sharding
from jkv.cache.base import Cache
from jkv.cache.block_table import pools, tables_of
from jkv.cache.paged import PagedKind, paged
from jkv.cache.protocol import as_kind
from jkv.decoding import programs
from jkv.decoding.arguments import DecoderLike, Sampler
from jkv.decoding.capacity import bucket
from jkv.decoding.prompts import PAD
from jkv.decoding.transform import Transform
from jkv.engine import decode_state as device
from jkv.engine.page_transfer import PageForm, gather_jit, pad, scatter_jit
from jkv.engine.request import Contents, Request
from jkv.engine.samplers import as_arrays, bind_sampler, structure_of
from jkv.engine.schedule import BatchLimits, Schedule
from jkv.engine.sequence import RunningSequence
from jkv.errors import StaleError

STOP_IDS = 16  # of a request beside the checkpoint's, at most


class StepError(Exception):
    """A step failed: what it raised, and the requests that were in it."""

    def __init__(self, requests: Sequence[Request], error: Exception):
        super().__init__(str(error))
        self.requests, self.error = requests, error


@dataclasses.dataclass(frozen=True, slots=True)
class InFlightStep:
    """A compiled step that has been dispatched, and whose output has not been read.

    Attributes:
        lane_ids: ``[R]`` lanes that take part.
        sequence_ids: ``[R]`` of the sequences in them.
        rows: those of the R that yield tokens.
        output: ``[>= R, n + 1]``, see `decode_state.decode_jit`.
    """

    lane_ids: np.ndarray
    sequence_ids: np.ndarray
    rows: np.ndarray | slice
    output: Array


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step has yielded, on the host.

    Attributes:
        lane_ids: ``[N]`` lanes that yielded tokens.
        sequence_ids: ``[N]`` of the sequences that were in them.
        tokens: ``[N, n]``, PAD for none.
        flags: ``[N]``, see `decode_state`.
    """

    lane_ids: np.ndarray
    sequence_ids: np.ndarray
    tokens: np.ndarray
    flags: np.ndarray


class Runner:
    """A decoder, its pages and the state of the lanes on the device.

    Args:
        model: a decoder.
        kind: of its pages.
        limits: of a step.

    Attributes:
        weights: that the compiled steps are given; new ones after `reset`.
        columns: of each group's block table.
        windows: of each group of layers, None where they see all tokens.
        page_bytes: of one page in all layers.
        waited: seconds that were waited for the device, in all.
    """

    def __init__(self, model: DecoderLike, kind: PagedKind, limits: BatchLimits):
        self.model, self.config, self.kind, self.limits = model, model.config, kind, limits
        self.stop_ids = STOP_IDS + len(self.config.end_ids)
        self.waited = 0.0
        self._uploaded = np.zeros(limits.lanes, np.int64)  # slots that the block tables know
        self.reset()
        self.page_bytes = nbytes(self.layers) / (kind.pages or 1)

    def reset(self) -> None:
        """Make pages and lanes anew, empty, for the model as it is now."""
        # The old pages go first: there may be no room for both.
        self.layers = ()
        self.graphdef, self.weights = device.split_weights(self.model)
        cache = self._empty_cache()
        self.layers = cache.layers
        self.columns = tuple(table.shape[1] for table in tables_of(cache.shared))
        self.windows = tuple(pool.window for pool in pools(cache.layers))
        self._sampler_groups: dict[Hashable, int] = {}
        self._uploaded[:] = 0
        self.state = device.empty_state_jit(
            self.limits.lanes, self.columns, self.stop_ids, sharding.mesh_of(self.model)
        )

    def _empty_cache(self) -> Cache:
        config, mesh = self.config, sharding.mesh_of(self.model)
        return programs.init_cache_jit(config, self.kind, 1, config.context, config.dtype, mesh)

    def intact(self) -> bool:
        """Whether the device's state is there: a step that failed may have taken it along."""
        return not any(x.is_deleted() for x in jax.tree.leaves((self.layers, self.state)))

    def check_weights(self) -> None:
        """Refuse to go on with weights that the model does not have any more.

        Raises:
            StaleError: they were changed in place.
        """
        now = jax.tree.leaves(self.model)
        if len(now) != len(self.weights) or any(map(operator.is_not, now, self.weights)):
            raise StaleError(
                "the model's weights were changed after this engine had taken them; call "
                "engine.update(lm), which drops what was cached of the old ones"
            )

    def check_stop_ids(self, stop_ids: tuple[int, ...]) -> None:
        """Refuse more stop ids than a lane has room for.

        Raises:
            ValueError: too many.
        """
        if len(stop_ids) > self.stop_ids:
            raise ValueError(
                f"stop got {len(stop_ids)} ids with the checkpoint's own; an engine takes at most "
                f"{STOP_IDS} beside those"
            )

    # Requests in lanes.

    def bind(self, sampler: Sampler | None, stop_ids: tuple[int, ...]) -> Transform | None:
        """Make a user's sampler one that lanes can run; see `bind_sampler`."""
        if sampler is None:
            return None
        ends = pad(stop_ids, self.stop_ids, -2)
        return bind_sampler(sampler, self.config.vocab, self._context, ends)

    def add_sampler(self, sampler: Transform | None) -> int:
        """Return the place of a sampler's structure in the decode state; a new one is added."""
        if sampler is None:
            return -1
        sampler = as_arrays(sampler)
        structure = structure_of(sampler)
        if structure not in self._sampler_groups:
            self.state = device.add_sampler_jit(
                self.state, sampler, self.config.vocab, self._context
            )
            self._sampler_groups[structure] = len(self._sampler_groups)
        return self._sampler_groups[structure]

    def install(self, sequence: RunningSequence) -> None:
        """Write a sequence's state into its lane."""
        request, history, start = sequence.request, sequence.request.history, None
        if request.sampler is not None:
            # The sampler's state is that of a row which was never preempted: of the prompt, and one
            # update for each token but the last, which the next step gives it.
            generated = history[len(request.prompt) : -1]
            start = self._sampler_start(
                as_arrays(request.sampler), request.prompt, generated, len(request.tokens)
            )
        tables = zip(sequence.page_tables, self.columns, strict=True)
        lane = device.LaneStart(
            tables=tuple(pad(pages.table, width) for pages, width in tables),
            lengths=np.int32(sequence.cached),
            # A request that begins has none; one that was preempted goes on after its last.
            token=np.int32(history[-1] if request.tokens else PAD),
            active=np.bool_(not sequence.in_prefill),
            remaining=np.int32(sequence.limit),
            stop_ids=pad(request.stop_ids, self.stop_ids, -2),
            keys=np.zeros(2, np.uint32) if request.key is None else request.key,
            sampler=start,
        )
        self._uploaded[sequence.lane] = len(sequence.page_tables[0].table) * self.kind.page
        self._install(sequence.lane, self.add_sampler(request.sampler), lane)

    def _sampler_start(
        self, sampler: Transform, prompt: np.ndarray, generated: np.ndarray, updates: int
    ) -> device.SamplerStart:
        return device.SamplerStart(
            sampler=sampler,
            prompt=pad(prompt, self._context, PAD),
            generated=pad(generated, self._context, PAD),
            updates=np.int32(updates),
        )

    def _install(self, lane: int, group: int, start: device.LaneStart) -> None:
        vocab = self.config.vocab
        self.state = device.install_jit(self.state, group, vocab, np.int32(lane), start)

    # Steps.

    def execute(self, schedule: Schedule) -> list[InFlightStep]:
        """Dispatch a schedule, without waiting for anything.

        Raises:
            StepError: it could not be dispatched.
        """
        steps = []
        if schedule.prefills:
            try:
                steps.append(self._prefill(schedule))
            except Exception as error:
                requests = [prefill.sequence.request for prefill in schedule.prefills]
                raise StepError(requests, error) from error
        if len(schedule.decodes):
            try:
                steps.append(self._decode(schedule))
            except Exception as error:
                there = (schedule.running[lane] for lane in schedule.decodes.tolist())
                raise StepError([s.request for s in there if s], error) from error
        return steps

    def _prefill(self, schedule: Schedule) -> InFlightStep:
        prefills = schedule.prefills
        most = max(prefill.stop - prefill.start for prefill in prefills)
        rows, size = next(s for s in self.shapes if s[0] >= len(prefills) and s[1] >= most)
        tokens = np.zeros((rows, size), np.int32)
        counts, last = np.zeros(rows, np.int32), np.zeros(rows, bool)
        for i, prefill in enumerate(prefills):
            sequence = prefill.sequence
            counts[i] = prefill.stop - prefill.start
            tokens[i, : counts[i]] = sequence.request.history[prefill.start : prefill.stop]
            last[i] = prefill.stop == sequence.target
        lanes = np.asarray([prefill.sequence.lane for prefill in prefills])
        batch = self._batch(lanes, rows, size, schedule)
        output = self._run_prefill(batch, tokens, counts, last)
        return InFlightStep(lanes, schedule.table.ids[lanes], np.flatnonzero(last), output)

    def _decode(self, schedule: Schedule) -> InFlightStep:
        lanes = schedule.decodes
        width = next(w for w in self.widths if w >= len(lanes))
        output = self._run_decode(self._batch(lanes, width, self.limits.block, schedule))
        return InFlightStep(lanes, schedule.table.ids[lanes], slice(len(lanes)), output)

    def _run_prefill(
        self, batch: np.ndarray, tokens: np.ndarray, counts: np.ndarray, last: np.ndarray
    ) -> Array:
        self.layers, self.state, output = device.prefill_jit(
            self.graphdef, self.weights, self.layers, self.state, batch, tokens, counts, last
        )
        return output

    def _run_decode(self, batch: np.ndarray) -> Array:
        block = self.limits.block
        self.layers, self.state, output = device.decode_jit(
            block, self.graphdef, self.weights, self.layers, self.state, batch
        )
        return output

    def _batch(
        self, lanes: np.ndarray, rows: int, tokens: int, schedule: Schedule | None
    ) -> np.ndarray:
        """Return lanes and the pages that the device does not know yet, as of `decode_jit`."""
        page = self.kind.page
        groups, wide = len(self.columns), tokens // page + 3
        batch = np.empty((rows, 1 + groups * wide), np.int32)
        batch.fill(-1)
        new_pages = batch[:, 1:].reshape(rows, groups, wide)
        batch[: len(lanes), 0], batch[len(lanes) :, 0] = lanes, self.limits.lanes
        if schedule is None:
            return batch
        reserved, uploaded = schedule.table.reserved, self._uploaded
        grown = (reserved > uploaded)[lanes].nonzero()[0]
        at = lanes[grown]
        known = uploaded[at] // page
        new_pages[grown, :, 0] = known[:, None]
        for row, lane, first in zip(grown.tolist(), at.tolist(), known.tolist(), strict=True):
            sequence = schedule.running[lane]
            for group, pages in enumerate(sequence.page_tables if sequence else ()):
                for i, number in enumerate(pages.table[first:], 1):
                    new_pages[row, group, i] = number
        uploaded[at] = reserved[at]
        return batch

    def read(self, step: InFlightStep) -> StepOutput:
        """Wait for a step's output."""
        began = time.perf_counter()
        output = np.asarray(step.output)[: len(step.lane_ids)][step.rows]
        self.waited += time.perf_counter() - began
        lanes, ids = step.lane_ids[step.rows], step.sequence_ids[step.rows]
        return StepOutput(lanes, ids, output[:, :-1], output[:, -1])

    @functools.cached_property
    def widths(self) -> tuple[int, ...]:
        """Lanes that a decode step may have: 1, 2, 4, ..., and all."""
        widths = [1]
        while widths[-1] < self.limits.lanes:
            widths.append(min(2 * widths[-1], self.limits.lanes))
        return tuple(widths)

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and tokens of each that a prefill may have."""
        limits = self.limits
        part, chunk = limits.shared_chunk, limits.chunk
        alone = (min(size, chunk) for size in (part, 2 * part, chunk))
        return tuple(sorted({(limits.rows, part), *((1, size) for size in alone)}))

    @property
    def _context(self) -> int:
        """Slots of a lane's history."""
        return bucket(self.config.context)

    # Pages.

    def gather(self, tables: tuple[np.ndarray, ...]) -> Contents:
        """Copy pages, on the device; see `gather_jit`."""
        return gather_jit(self.layers, tables)

    def scatter(self, tables: tuple[np.ndarray, ...], contents: Contents) -> None:
        """Write pages; see `scatter_jit`."""
        self.layers = scatter_jit(self.layers, tables, contents)

    def contents_from(self, leaves: Sequence[np.ndarray]) -> Contents:
        """Make what `scatter` takes of its leaves."""
        return jax.tree.unflatten(jax.tree.structure(self._gathered(1)), leaves)

    def page_form(self, count: int) -> PageForm:
        """Return shapes and dtypes of the leaves of so many pages."""
        leaves = jax.tree.leaves(self._gathered(count))
        return [(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves]

    def _gathered(self, count: int) -> Contents:
        tables = tuple(pad((), count) for _ in self.columns)
        return jax.eval_shape(gather_jit, self.layers, tables)

    def warm(self) -> None:
        """Compile every step; no request takes part."""
        no_tokens = np.zeros(0, np.int32)
        for group in range(-1, len(self.state.samplers)):
            start = None
            if group >= 0:
                sampler = self.state.samplers[group]
                sampler = jax.tree.map(lambda leaf: np.asarray(leaf[0]), sampler)
                start = self._sampler_start(sampler, no_tokens, no_tokens, 0)
            lane = device.LaneStart(
                tables=tuple(pad((), width) for width in self.columns),
                lengths=np.int32(0),
                token=np.int32(PAD),
                active=np.bool_(False),
                remaining=np.int32(0),
                stop_ids=pad((), self.stop_ids, -2),
                keys=np.zeros(2, np.uint32),
                sampler=start,
            )
            self._install(self.limits.lanes, group, lane)  # past the last: nothing changes
        no_lanes = np.zeros(0, np.int64)
        for width in self.widths:
            self._run_decode(self._batch(no_lanes, width, self.limits.block, None))
        for rows, size in self.shapes:
            self._run_prefill(
                self._batch(no_lanes, rows, size, None),
                np.zeros((rows, size), np.int32),
                np.zeros(rows, np.int32),
                np.zeros(rows, bool),
            )


def managed_kind(kind: PagedKind | str | None, page: int | None, pages: int) -> PagedKind:
    """Return the kind with the engine's pages.

    Raises:
        TypeError: a kind without pages.
        ValueError: pages of two sizes.
    """
    if kind is None:
        kind = paged() if page is None else paged(page)
    made = as_kind(kind)
    if not isinstance(made, PagedKind):
        raise TypeError(f"cache got {brief(made)}; expected a kind of pages, such as jkv.paged()")
    if page not in (None, made.page):
        raise ValueError(
            f"page={page} and a cache with pages of {made.page}; expected one of them, or the same"
        )
    return dataclasses.replace(made, pages=pages, managed=True)
