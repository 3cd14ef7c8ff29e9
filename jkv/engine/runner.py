"""What the engine has on the device: the pages, lanes, and passes over both."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkv._axes import Array
from jkv.cache import heads
from jkv.decoding import sampling
from jkv.decoding.apply import apply, init_state
from jkv.decoding.capacity import bucket
from jkv.decoding.prompts import PAD
from jkv.engine import decode_state as device
from jkv.engine.pages import Pages, filled
from jkv.engine.sequence import RunningSequence, SequenceTable

ENDS = 16  # stop ids of a request beside the checkpoint's, at most


@dataclasses.dataclass
class InFlightStep:
    """One pass that has been dispatched, and those of its rows that say something."""

    rows: Any  # [N], or a slice
    lanes: np.ndarray  # [N], of these rows
    numbers: np.ndarray  # [N], of who sat there
    told: Array  # [R, n + 1], see `device.decode_jit`
    reading: tuple[RunningSequence, ...] = ()  # those of the pass that are still at their prompts


class Runner(Pages):
    """Pages, the lanes that requests run in, and passes over both; see `Pages` for the pages.

    Args:
        model: a decoder.
        lanes: requests at once.
        block: tokens of each lane per pass, at most.
        chunk: tokens of prompts per pass, of one or of several.
        rows: prompts per pass.
        how: as of `Pages`.
    """

    def __init__(self, model: Any, *, lanes: int, block: int, chunk: int, rows: int, **how: Any):
        super().__init__(model, **how)
        self.lanes, self.block = lanes, block
        self.chunk, self.rows = min(chunk, self.config.context), rows
        self.part = -(-self.chunk // rows)  # tokens of each where there are several
        self.ends = ENDS + len(self.config.end_ids)
        self.state = device.empty(lanes, self.columns, self.ends, heads.mesh_of(model))
        self.groups: dict[Any, int] = {}
        self.waited = 0.0  # seconds for the device, in all

    def reset(self) -> None:
        """Make pages and lanes anew, empty."""
        super().reset()
        self.groups = {}
        self.state = device.empty(self.lanes, self.columns, self.ends, heads.mesh_of(self.model))

    def intact(self) -> bool:
        """As of `Pages`."""
        return super().intact() and not any(x.is_deleted() for x in jax.tree.leaves(self.state))

    def check_ends(self, ends: tuple[int, ...]) -> None:
        """Refuse more stop ids than a lane has room for.

        Raises:
            ValueError: too many.
        """
        if len(ends) > self.ends:
            raise ValueError(
                f"stop got {len(ends)} ids with the checkpoint's own; an engine takes at most "
                f"{ENDS} beside those"
            )

    def group_of(self, sampler: Any) -> int:
        """The sampler's place among the structures that the lanes know."""
        if sampler is None:
            return -1
        signature = _signature(_plain(sampler))
        if signature not in self.groups:
            vocab, room = self.config.vocab, bucket(self.config.context)
            self.state = device.with_sampler(self.state, _plain(sampler), vocab, room)
            self.groups[signature] = len(self.groups)
        return self.groups[signature]

    def bound(self, sampler: Any, ends: tuple[int, ...]) -> Any:
        """A user's sampler as the lanes take it, for a request that ends at these ids.

        Its parameters are on the host. Refused here, it is in no program that others share.

        Raises:
            Exception: whatever it raises, and what `jkv.decoding.apply` does.
        """
        if sampler is None:
            return None
        sampler = sampling.bind(sampler, self.config.vocab, filled(ends, self.ends, -2)[None])
        plain = _plain(sampler)
        lane = jax.tree.map(lambda leaf: leaf[None], plain)
        _lane_step.eval_shape(self.config.vocab, bucket(self.config.context), lane)
        return plain

    def install(self, seat: RunningSequence, limit: int) -> None:
        """The request's state in its lane, where it may say so many tokens."""
        request = seat.request
        group = self.group_of(request.sampler)
        history = request.history
        what = {
            "tables": tuple(
                filled(seq.table, width) for seq, width in zip(seat.held, self.columns, strict=True)
            ),
            "lengths": np.int32(seat.cached),
            # A request that begins has none; one that was preempted goes on after its last.
            "token": np.int32(history[-1] if request.tokens else PAD),
            "active": np.bool_(not seat.reading),
            "left": np.int32(limit),
            "ends": filled(request.stop_ids, self.ends, -2),
            "keys": np.zeros(2, np.uint32) if request.key is None else request.key,
        }
        if group >= 0:
            # The sampler's state is that of a row which was never preempted: of the prompt, and one
            # update for each token but the last, which the next pass tells it.
            room, told = bucket(self.config.context), history[len(request.prompt) : -1]
            what["prompt"] = filled(request.prompt, room, PAD)
            what["generated"] = filled(told, room, PAD)
            what["updates"] = np.int32(len(request.tokens))
            what["sampler"] = _plain(request.sampler)
        slots = len(seat.held[0].table) * self.page
        seat.tally.reserved[seat.lane] = seat.tally.known[seat.lane] = slots
        self.state = device.install_jit(
            self.state, group, self.config.vocab, np.int32(seat.lane), what
        )

    # Passes.

    def absorb(self, prompts: list[tuple[RunningSequence, int]]) -> InFlightStep:
        """Dispatch the tokens of each seat from where it is, up to the given one."""
        most = max(upto - seat.cached for seat, upto in prompts)
        rows, size = next(s for s in self.shapes if s[0] >= len(prompts) and s[1] >= most)
        tokens = np.zeros((rows, size), np.int32)
        counts, last = np.zeros(rows, np.int32), np.zeros(rows, bool)
        for i, (seat, upto) in enumerate(prompts):
            counts[i] = upto - seat.cached
            tokens[i, : counts[i]] = seat.request.history[seat.cached : upto]
            last[i] = upto == seat.target
        seats = [seat for seat, _ in prompts]
        tally, lanes = seats[0].tally, np.asarray([seat.lane for seat in seats])
        who = self._who(lanes, rows, size, tally, dict(zip(lanes.tolist(), seats, strict=True)))
        self.layers, self.state, told = device.prefill_jit(
            self.frame, self.weights, self.layers, self.state, who, tokens, counts, last
        )
        for seat, upto in prompts:
            seat.absorbed(upto)
        speaking = np.flatnonzero(last)
        lanes = lanes[speaking]
        reading = tuple(seat for seat in seats if seat.reading)
        return InFlightStep(speaking, lanes, tally.number[lanes], told, reading)

    def decode(self, lanes: np.ndarray, tally: SequenceTable, seats: Any) -> InFlightStep:
        """Dispatch the next block of tokens of these lanes, those that may say more."""
        width = next(w for w in self.widths if w >= len(lanes))
        who = self._who(lanes, width, self.block, tally, seats)
        self.layers, self.state, told = device.decode_jit(
            self.block, self.frame, self.weights, self.layers, self.state, who
        )
        return InFlightStep(slice(len(lanes)), lanes, tally.number[lanes], told)

    @functools.cached_property
    def widths(self) -> tuple[int, ...]:
        """How many lanes a pass may have: 1, 2, 4, ..., and all. Half of them sit at least."""
        widths = [1]
        while widths[-1] < self.lanes:
            widths.append(min(2 * widths[-1], self.lanes))
        return tuple(widths)

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and tokens of each that a pass over prompts may have."""
        part = self.part
        alone = (min(size, self.chunk) for size in (part, 2 * part, self.chunk))
        return tuple(sorted({(self.rows, part), *((1, size) for size in alone)}))

    def _who(
        self, lanes: np.ndarray, rows: int, tokens: int, tally: SequenceTable, seats: Any
    ) -> np.ndarray:
        """Lanes of a pass, and the pages that they got since the device last heard of them.

        In the form of `device.decode_jit`; `seats` has those who sit in the lanes.
        """
        groups, wide = len(self.columns), tokens // self.page + 3
        who = np.empty((rows, 1 + groups * wide), np.int32)
        who.fill(-1)
        grown = who[:, 1:].reshape(rows, groups, wide)
        who[: len(lanes), 0], who[len(lanes) :, 0] = lanes, self.lanes
        there = (tally.reserved > tally.known)[lanes].nonzero()[0]
        at = lanes[there]
        known = tally.known[at] // self.page
        grown[there, :, 0] = known[:, None]
        for row, lane, first in zip(there.tolist(), at.tolist(), known.tolist(), strict=True):
            for group, seq in enumerate(seats[lane].held):
                for i, page in enumerate(seq.table[first:], 1):
                    grown[row, group, i] = page
        tally.known[at] = tally.reserved[at]
        return who

    def read(self, part: InFlightStep) -> np.ndarray:
        """What its rows said, ``[N, n + 1]``, as of `device.decode_jit`."""
        began = time.perf_counter()
        told = np.asarray(part.told)[part.rows]
        self.waited += time.perf_counter() - began
        return told

    def warm(self, swaps: bool) -> None:
        """Compile every pass, and what moves pages where `swaps`; no request takes part."""
        context = bucket(self.config.context)
        for group in range(-1, len(self.state.samplers)):
            what = {
                "tables": tuple(filled((), width) for width in self.columns),
                "lengths": np.int32(0),
                "token": np.int32(PAD),
                "active": np.bool_(False),
                "left": np.int32(0),
                "ends": filled((), self.ends, -2),
                "keys": np.zeros(2, np.uint32),
            }
            if group >= 0:
                some = jax.tree.map(lambda leaf: np.asarray(leaf[0]), self.state.samplers[group])
                nothing = filled((), context, PAD)
                what |= {"prompt": nothing, "generated": nothing, "updates": np.int32(0)}
                what["sampler"] = some
            # A lane past the last is nobody's.
            self.state = device.install_jit(
                self.state, group, self.config.vocab, np.int32(self.lanes), what
            )
        if swaps:
            self.warm_moves()
        nobody, tally = np.zeros(0, np.int64), SequenceTable(self.lanes, 0)
        for width in self.widths:
            who = self._who(nobody, width, self.block, tally, ())
            self.layers, self.state, _ = device.decode_jit(
                self.block, self.frame, self.weights, self.layers, self.state, who
            )
        for rows, size in self.shapes:
            self.layers, self.state, _ = device.prefill_jit(
                self.frame,
                self.weights,
                self.layers,
                self.state,
                self._who(nobody, rows, size, tally, ()),
                np.zeros((rows, size), np.int32),
                np.zeros(rows, np.int32),
                np.zeros(rows, bool),
            )


# Compiled never; `jit` remembers what it has traced.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _lane_step(vocab: int, tokens: int, sampler: Any) -> Any:
    """One step of a transform as passes take it: `vmap` goes over the lanes.

    What `vmap` does not take, such as a callback to the host without a rule for it, would fail in
    a pass that others share.
    """

    def one(sampler: Any, logits: Array, token: Array) -> Any:
        state = init_state(sampler, jnp.full((1, tokens), PAD, jnp.int32), vocab)
        return apply(sampler, logits[None], state, token[None])

    return jax.vmap(one)(sampler, jnp.zeros((1, vocab)), jnp.full((1,), PAD, jnp.int32))


def _plain(sampler: Any) -> Any:
    """A sampler whose parameters are arrays of 32 bits."""

    def array(leaf: Any) -> Any:
        if isinstance(leaf, int):
            return np.asarray(leaf, np.int32)
        return np.asarray(leaf, np.float32) if isinstance(leaf, float) else np.asarray(leaf)

    return jax.tree.map(array, sampler)


def _signature(sampler: Any) -> Any:
    leaves, tree = jax.tree.flatten(sampler)
    return (tree, *((leaf.shape, leaf.dtype) for leaf in leaves))
