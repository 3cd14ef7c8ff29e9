"""The kernels: one walks over the blocks of each program's share, one merges what programs found.

A program is one warpgroup that fetches `stages` blocks ahead of the one that it works on, across
the ends of lines, so that the memory never waits. What it knows of a line is the running maximum
of the scores, the sum of the weights and the weighted sum of values, transposed: the online
softmax of Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jkv._axes import Array
from jkv.ops.masks import AttentionSpec
from jkv.ops.mosaic_gpu.forms import (
    COLUMN,
    ROW,
    TILE,
    Keys,
    Piece,
    Values,
    across,
    down,
    load,
    shared,
    store,
)
from jkv.ops.mosaic_gpu.plan import LOG2E, Layout, tuning

REDUCTIONS = 2048  # bytes of shared memory in which warps meet
FAR = 2**30  # a position that nobody has come to


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in one call."""

    layout: Layout
    spec: AttentionSpec
    keys: Keys
    values: Values
    told: bool  # whether positions of slots are given

    @property
    def pieces(self) -> int:
        """Copies that bring a block's slots, for each array."""
        page = self.layout.page
        return 1 if page is None else max(self.layout.block // page, 1)

    @property
    def shares(self) -> bool:
        """Whether values are converted where keys were: their product is known by then."""
        one, other = self.keys.work(self.layout, True), self.values.work(self.layout, False)
        return bool(one and other) and one[0] == other[0]

    def scratch(self) -> dict[str, Any]:
        """Shared memory, and barriers of what is copied into it."""
        at, keys, values = self.layout, self.keys, self.values
        bar = functools.partial(plgpu.Barrier, num_barriers=at.stages)
        weights = shared((values.groups, at.columns, at.block), values.factor, values.permuted(at))
        return {
            "q": shared((at.stages, at.columns, at.dim), keys.factor, keys.permuted(at)),
            "about": plgpu.SMEM((at.stages, 2, at.words), jnp.int32),
            "keys": keys.stage(at),
            "values": values.stage(at),
            "keys_work": keys.work(at, True),
            "values_work": [] if self.shares else values.work(at, False),
            "weights": weights,
            "slots": [plgpu.SMEM((at.stages, at.block), jnp.int32)] if self.told else [],
            "q_here": bar(num_arrivals=2),
            "keys_here": bar(num_arrivals=keys.copies * self.pieces + self.told),
            "values_here": bar(num_arrivals=values.copies * self.pieces),
        }


@dataclasses.dataclass(frozen=True)
class _State:
    """How far the copies are."""

    step: Any  # blocks begun
    line: Any
    block: Any  # of the line
    blocks: Any  # that the line has
    lines: Any  # begun before this one
    first: Any  # 1 where the line has just begun


jax.tree_util.register_dataclass(_State, [field.name for field in dataclasses.fields(_State)], [])


class _Program:
    """One program's view of a call, while it is traced."""

    def __init__(self, call: Call, refs: dict[str, Any], scratch: dict[str, Any]) -> None:
        self.call, self.at, self.refs, self.on = call, call.layout, refs, scratch
        self.number = lax.axis_index("program")
        starts = refs["starts"]
        self.line, self.block = starts[self.number, 0], starts[self.number, 1]
        self.steps, self.lines = starts[self.number, 2], starts[self.number, 3]

    def row(self, line: Any) -> Any:
        return lax.div(line, jnp.int32(self.at.kv_heads * self.at.chunks))

    def slot(self, number: Any) -> Any:
        return lax.rem(number, jnp.int32(self.at.stages))

    def start(self, row: Any, block: Any) -> Any:
        """The first slot of a row's block, counted without those that are left out."""
        spec, size = self.call.spec, self.at.block
        if spec.window is None or self.call.told:
            return block * size
        sinks = min(-(-spec.sinks // size), -(-self.at.slots // size))
        skip = self.refs["rows"][row, 1]
        return (block + jnp.where(block >= sinks, skip, 0)) * size

    def pages(self, row: Any, start: Any) -> list[tuple[Any, Any]]:
        """The pages that hold a block, -1 where there is none, and where in them it begins."""
        page, table = self.at.page or 1, self.refs["table"]
        if page >= self.at.block:
            inside = lax.rem(start, jnp.int32(page))
            return [(table[row, lax.div(start, jnp.int32(page))], inside)]
        first, last = lax.div(start, jnp.int32(page)), self.at.slots // page - 1
        return [
            (table[row, jnp.minimum(first + i, last)], jnp.int32(0))
            for i in range(self.call.pieces)
        ]

    def pieces(self, row: Any, head: Any, start: Any) -> list[Piece]:
        if self.at.page is None:
            return [Piece(row, head, start, self.at.block, 0)]
        size = min(self.at.page, self.at.block)
        return [
            Piece(jnp.maximum(page, 0), head, inside, size, i * size)
            for i, (page, inside) in enumerate(self.pages(row, start))
        ]

    def fetch(self, state: _State) -> _State:
        """Begin to copy the next block, if there is one."""
        at, on, refs = self.at, self.on, self.refs

        @pl.when(state.step < self.steps)
        def _() -> None:
            row = self.row(state.line)
            slot = self.slot(state.step)

            @pl.when(state.first != 0)
            def _() -> None:
                mine = self.slot(state.lines)
                here = on["q_here"].at[mine]
                plgpu.copy_gmem_to_smem(refs["q"].at[state.line], on["q"].at[mine], here)
                plgpu.copy_gmem_to_smem(refs["about"].at[state.line], on["about"].at[mine], here)

            head = lax.rem(lax.div(state.line, jnp.int32(at.chunks)), jnp.int32(at.kv_heads))
            start = self.start(row, state.block)
            pieces = self.pieces(row, head, start)
            here = on["keys_here"].at[slot]
            if self.call.told:
                slots = refs["slots"].at[row, pl.ds(start, at.block)]
                plgpu.copy_gmem_to_smem(slots, on["slots"][0].at[slot], here)
            for piece in pieces:
                self.call.keys.fetch(at, refs["keys"], on["keys"], slot, piece, here)
            here = on["values_here"].at[slot]
            for piece in pieces:
                self.call.values.fetch(at, refs["values"], on["values"], slot, piece, here)

        more = state.block + 1 < state.blocks
        line = jnp.minimum(state.line + 1, at.lines - 1)
        return _State(
            step=state.step + 1,
            line=jnp.where(more, state.line, line),
            block=jnp.where(more, state.block + 1, 0),
            blocks=jnp.where(more, state.blocks, refs["rows"][self.row(line), 0]),
            lines=jnp.where(more, state.lines, state.lines + 1),
            first=jnp.where(more, 0, 1),
        )

    def seen(self, row: Any, block: Any, slot: Any, positions: Array) -> tuple[Array, Any]:
        """Which columns see which slots of a block, and whether each slot is seen by some.

        The latter is None where that is not known beforehand.
        """
        at, spec, size = self.at, self.call.spec, self.at.block
        shape = (size, at.columns)
        filled, last = self.refs["rows"][row, 2], self.refs["rows"][row, 3]
        start = self.start(row, block)
        held = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=ROW)
        inside = held + start < filled
        clean = start + size <= filled
        if at.page is not None and self.call.pieces == 1:
            ((page, _),) = self.pages(row, start)
            inside, clean = inside & (page >= 0), clean & (page >= 0)
        elif at.page is not None:
            size_of = at.page
            for i, (page, _) in enumerate(self.pages(row, start)):
                here = (held >= i * size_of) & (held < (i + 1) * size_of)
                inside, clean = inside & ~(here & (page < 0)), clean & (page >= 0)
        if self.call.told:
            told = load(self.on["slots"][0].at[slot], ROW)
            held, clean = jnp.where(inside & (told >= 0), told, FAR), None
        else:
            held = jnp.where(inside, held + start, FAR)
        held, positions = down(held, shape), across(positions, shape)
        seen = held <= positions
        if spec.window is not None:
            near = positions - held < spec.window
            whole = start > last - spec.window
            if spec.sinks:
                near = near | (held < spec.sinks)
                whole = whole | (start + size <= spec.sinks)
            seen, clean = seen & near, None if clean is None else clean & whole
        return seen, clean

    def scores(self, slot: Any, mine: Any, sums: Array, seen: Array) -> Array:
        """Scores [block, columns] in powers of two, -inf for what is not seen."""
        spec, on = self.call.spec, self.on
        queries = on["q"].at[mine]
        scores = self.call.keys.scores(self.at, on["keys"], slot, on["keys_work"], queries, sums)
        if spec.softcap is None:
            scores = scores * (spec.scale * LOG2E)
        else:
            # The hardware's tanh is right to three digits only.
            grown = jnp.exp2(scores * (2 * LOG2E * spec.scale / spec.softcap))
            scores = (1.0 - 2.0 / (grown + 1.0)) * (spec.softcap * LOG2E)
        return jnp.where(seen, scores, -jnp.inf)

    def walk(self) -> None:
        """All blocks of the program's share."""
        state = _State(
            step=jnp.int32(0),
            line=self.line,
            block=self.block,
            blocks=self.refs["rows"][self.row(self.line), 0],
            lines=jnp.int32(0),
            first=jnp.int32(1),
        )
        for _ in range(self.at.stages):
            state = self.fetch(state)

        def line(i: Any, carry: Any) -> Any:
            done, number, block, state = carry
            left = self.refs["rows"][self.row(number), 0] - block
            count = jnp.minimum(left, self.steps - done)
            state = self.one_line(i, number, block, done, count, state)
            return done + count, number + 1, jnp.int32(0), state

        lax.fori_loop(0, self.lines, line, (jnp.int32(0), self.line, self.block, state))

    def one_line(self, i: Any, line: Any, block: Any, done: Any, count: Any, state: Any) -> Any:
        """`count` blocks of a line, of which the program has done `i`, from the one given."""
        at, on, refs = self.at, self.on, self.refs
        shape, tall = (at.block, at.columns), (at.height, at.columns)
        work = on["keys_work"] if self.call.shares else on["values_work"]
        row, mine = self.row(line), self.slot(i)
        plgpu.barrier_wait(on["q_here"].at[mine])
        about = on["about"].at[mine]
        positions = load(about.at[0, pl.ds(0, at.columns)], COLUMN)
        bits = load(about.at[1, pl.ds(0, at.columns)], COLUMN)
        sums = lax.bitcast_convert_type(bits, jnp.float32)

        def step(t: Any, carry: Any) -> Any:
            top, total, out, state = carry
            slot = self.slot(done + t)
            plgpu.barrier_wait(on["keys_here"].at[slot])
            seen, clean = self.seen(row, block + t, slot, positions)
            scores = self.scores(slot, mine, sums, seen)
            higher = jnp.maximum(top, jnp.max(scores, axis=0))
            shift = jnp.where(higher == -jnp.inf, 0.0, higher)
            faded = jnp.exp2(top - shift)
            weights = jnp.exp2(scores - across(shift, shape))
            total = total * across(faded, shape) + weights
            plgpu.barrier_wait(on["values_here"].at[slot])
            multiply = self.call.values.weighted_sum(
                at, on["values"], slot, work, on["weights"], weights, seen, clean
            )
            plgpu.commit_smem()
            out = out * across(faded, tall) + multiply()
            return higher, total, out, self.fetch(state)

        nothing = plgpu.layout_cast(jnp.full((at.columns,), -jnp.inf, jnp.float32), COLUMN)
        total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE)
        out = plgpu.layout_cast(jnp.zeros(tall, jnp.float32), TILE)
        top, total, out, state = lax.fori_loop(0, count, step, (nothing, total, out, state))
        place = self.number + line
        store(refs["out"].at[place], out)
        store(refs["top"].at[place], top)
        store(refs["total"].at[place], jnp.sum(total, axis=0))
        return state


def _params() -> Any:
    return plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        reduction_scratch_bytes=REDUCTIONS,
    )


def walk(call: Call, arrays: dict[str, Any], interpret: Any) -> tuple[Array, Array, Array]:
    """Partial results of all programs: weighted sums, highest scores, sums of weights."""
    at = call.layout
    places = at.programs + at.lines
    wide = jax.ShapeDtypeStruct((places, at.height, at.columns), jnp.float32)
    narrow = jax.ShapeDtypeStruct((places, at.columns), jnp.float32)
    leaves, tree = jax.tree.flatten(arrays)
    held, shelf = jax.tree.flatten(call.scratch())

    def body(*refs: Any) -> None:
        given, rest = refs[: len(leaves)], refs[len(leaves) :]
        out, top, total, *memory = rest
        named = jax.tree.unflatten(tree, given) | {"out": out, "top": top, "total": total}
        _Program(call, named, jax.tree.unflatten(shelf, memory)).walk()

    return plgpu.kernel(
        body,
        out_type=(wide, narrow, narrow),
        grid=(at.programs,),
        grid_names=("program",),
        scratch_types=held,
        compiler_params=_params(),
        interpret=interpret,
    )(*leaves)


def join(layout: Layout, parts: Any, spans: Array, interpret: Any) -> tuple[Array, Array]:
    """Merge the partial results of each line: output [lines, height, columns] and log-sum-exp."""
    tall = (layout.height, layout.columns)
    # Several at once: one waits for the memory as long as all of them.
    beside = min(max(tuning()["merge"] // (layout.height * layout.columns), 1), 8)

    def body(spans: Any, outs: Any, tops: Any, totals: Any, out: Any, lse: Any) -> None:
        line = lax.axis_index("line")
        first, last = spans[line, 0], spans[line, 1]

        def some(i: Any, carry: Any) -> Any:
            top, total, sums = carry
            found = []
            for j in range(beside):
                number = first + i * beside + j
                place = jnp.minimum(number, last) + line
                here = jnp.where(number <= last, load(tops.at[place], COLUMN), -jnp.inf)
                found.append((here, load(totals.at[place], COLUMN), load(outs.at[place], TILE)))
            higher = functools.reduce(jnp.maximum, [here for here, _, _ in found], top)
            shift = jnp.where(higher == -jnp.inf, 0.0, higher)
            faded = jnp.exp2(top - shift)
            total, sums = total * faded, sums * across(faded, tall)
            for j, (here, many, part) in enumerate(found):
                weight = jnp.exp2(here - shift)
                there = first + i * beside + j <= last
                total = total + jnp.where(there, many * weight, 0.0)
                # A result that is not there repeats the last, which may not be finite.
                sums = sums + jnp.where(there, part * across(weight, tall), 0.0)
            return higher, total, sums

        nothing = plgpu.layout_cast(jnp.full(tall[1:], -jnp.inf, jnp.float32), COLUMN)
        zero = plgpu.layout_cast(jnp.zeros(tall[1:], jnp.float32), COLUMN)
        sums = plgpu.layout_cast(jnp.zeros(tall, jnp.float32), TILE)
        rounds = lax.div(last - first + beside, jnp.int32(beside))
        top, total, sums = lax.fori_loop(0, rounds, some, (nothing, zero, sums))
        some_seen = jnp.where(total == 0, 1.0, total)
        store(out.at[line], sums / across(some_seen, tall))
        found = jnp.where(total == 0, -jnp.inf, (top + jnp.log2(some_seen)) * (1 / LOG2E))
        store(lse.at[line], found)

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((layout.lines, *tall), jnp.float32),
            jax.ShapeDtypeStruct((layout.lines, layout.columns), jnp.float32),
        ),
        grid=(layout.lines,),
        grid_names=("line",),
        compiler_params=_params(),
        interpret=interpret,
    )(spans, *parts)
