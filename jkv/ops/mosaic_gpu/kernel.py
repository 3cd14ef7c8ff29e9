"""The kernels: one walks over the blocks of each program, one merges their partial results.

A program is one warpgroup that fetches `stages` blocks ahead of the one that it works on, across
the ends of lines, so that the memory never waits. Its state of a line is that of the online softmax
(Milakov and Gimelshein 2018, arXiv:1805.02867): m, the running maximum of the scores, l, the sum of
the weights, and the weighted sum of values, transposed; alpha rescales both sums to a new maximum.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jkv._axes import Array, Index, Ref
from jkv._compat import gpu_store
from jkv.ops.masks import AttentionSpec
from jkv.ops.mosaic_gpu.operands import (
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
)
from jkv.ops.mosaic_gpu.tiling import LOG2E, Layout, tuning

REDUCTIONS = 2048  # bytes of shared memory in which warps meet
FAR = 2**30  # a position past all queries


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of one call."""

    layout: Layout
    spec: AttentionSpec
    keys: Keys
    values: Values
    has_slot_positions: bool

    @property
    def pieces(self) -> int:
        """Copies of each array that fetch the slots of a block."""
        page = self.layout.page
        return 1 if page is None else max(self.layout.block // page, 1)

    @property
    def shares(self) -> bool:
        """Whether values are converted in the memory of keys, whose product is known by then."""
        one, other = self.keys.work(self.layout, True), self.values.work(self.layout, False)
        return bool(one and other) and one[0] == other[0]

    def scratch(self) -> dict[str, Ref]:
        """Return the shared memory, and the barriers of copies into it."""
        at, keys, values = self.layout, self.keys, self.values
        bar = functools.partial(plgpu.Barrier, num_barriers=at.stages)
        weights = shared(
            (values.groups, at.columns, at.block), values.factor_dtype, values.memory_swizzle(at)
        )
        return {
            "q": shared(
                (at.stages, at.columns, at.dim), keys.factor_dtype, keys.memory_swizzle(at)
            ),
            "about": plgpu.SMEM((at.stages, 2, at.words), jnp.int32),
            "keys": keys.stage(at),
            "values": values.stage(at),
            "keys_work": keys.work(at, True),
            "values_work": [] if self.shares else values.work(at, False),
            "weights": weights,
            "slots": [plgpu.SMEM((at.stages, at.block), jnp.int32)]
            if self.has_slot_positions
            else [],
            "q_here": bar(num_arrivals=2),
            "keys_here": bar(num_arrivals=keys.copies * self.pieces + self.has_slot_positions),
            "values_here": bar(num_arrivals=values.copies * self.pieces),
        }


@dataclasses.dataclass(frozen=True)
class _State:
    """How far the copies have come."""

    step: Index  # blocks begun
    line: Index
    block: Index  # of the line
    blocks: Index  # that the line has
    lines: Index  # begun before this one
    first: Index  # 1 where the line has just begun


_Carry: TypeAlias = tuple[Array, Array, Array, _State]  # three arrays, and the copies

jax.tree_util.register_dataclass(_State, [field.name for field in dataclasses.fields(_State)], [])


class _Program:
    """One program's view of a call, while it is traced."""

    def __init__(self, call: Call, refs: dict[str, Ref], scratch: dict[str, Ref]) -> None:
        self.call, self.at, self.refs, self.on = call, call.layout, refs, scratch
        self.number = lax.axis_index("program")
        starts = refs["starts"]
        self.line, self.block = starts[self.number, 0], starts[self.number, 1]
        self.steps, self.lines = starts[self.number, 2], starts[self.number, 3]

    def row(self, line: Index) -> Array:
        return lax.div(line, jnp.int32(self.at.kv_heads * self.at.chunks))

    def slot(self, number: Index) -> Array:
        return lax.rem(number, jnp.int32(self.at.stages))

    def start(self, row: Index, block: Index) -> Index:
        """Return the first slot of a block; `block` does not count skipped ones."""
        spec, size = self.call.spec, self.at.block
        if spec.window is None or self.call.has_slot_positions:
            return block * size
        sinks = min(-(-spec.sinks // size), -(-self.at.slots // size))
        skip = self.refs["rows"][row, 1]
        return (block + jnp.where(block >= sinks, skip, 0)) * size

    def pages(self, row: Index, start: Index) -> list[tuple[Array, Array]]:
        """Return the pages of a block, -1 where there is none, and the block's offset in them."""
        page, table = self.at.page or 1, self.refs["table"]
        if page >= self.at.block:
            inside = lax.rem(start, jnp.int32(page))
            return [(table[row, lax.div(start, jnp.int32(page))], inside)]
        first, last = lax.div(start, jnp.int32(page)), self.at.slots // page - 1
        return [
            (table[row, jnp.minimum(first + i, last)], jnp.int32(0))
            for i in range(self.call.pieces)
        ]

    def pieces(self, row: Index, head: Index, start: Index) -> list[Piece]:
        if self.at.page is None:
            return [Piece(row, head, start, self.at.block, 0)]
        size = min(self.at.page, self.at.block)
        return [
            Piece(jnp.maximum(page, 0), head, inside, size, i * size)
            for i, (page, inside) in enumerate(self.pages(row, start))
        ]

    def fetch(self, state: _State) -> _State:
        """Start to copy the next block, if there is one."""
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
            if self.call.has_slot_positions:
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

    def visible(
        self, row: Index, block: Index, slot: Index, positions: Array
    ) -> tuple[Array, Array | None]:
        """Return which columns see which slots of a block, and whether every slot is seen.

        The latter is None where it is not known before the block is read.
        """
        at, spec, size = self.at, self.call.spec, self.at.block
        shape = (size, at.columns)
        filled, last = self.refs["rows"][row, 2], self.refs["rows"][row, 3]
        start = self.start(row, block)
        slots = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=ROW)
        inside = slots + start < filled
        all_visible = start + size <= filled
        if at.page is not None and self.call.pieces == 1:
            ((page, _),) = self.pages(row, start)
            inside, all_visible = inside & (page >= 0), all_visible & (page >= 0)
        elif at.page is not None:
            size_of = at.page
            for i, (page, _) in enumerate(self.pages(row, start)):
                here = (slots >= i * size_of) & (slots < (i + 1) * size_of)
                inside, all_visible = inside & ~(here & (page < 0)), all_visible & (page >= 0)
        if self.call.has_slot_positions:
            slot_positions = load(self.on["slots"][0].at[slot], ROW)
            slots = jnp.where(inside & (slot_positions >= 0), slot_positions, FAR)
            all_visible = None
        else:
            slots = jnp.where(inside, slots + start, FAR)
        slots, positions = down(slots, shape), across(positions, shape)
        seen = slots <= positions
        if spec.window is not None:
            near = positions - slots < spec.window
            whole = start > last - spec.window
            if spec.sinks:
                near = near | (slots < spec.sinks)
                whole = whole | (start + size <= spec.sinks)
            seen, all_visible = seen & near, None if all_visible is None else all_visible & whole
        return seen, all_visible

    def scores(self, slot: Index, mine: Index, sums: Array, seen: Array) -> Array:
        """Compute scores [block, columns] in powers of two, -inf where a slot is not seen."""
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
        """Process all blocks of the program."""
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

        def line(
            i: Array, carry: tuple[Array, Array, Array, _State]
        ) -> tuple[Array, Array, Array, _State]:
            done, number, block, state = carry
            left = self.refs["rows"][self.row(number), 0] - block
            count = jnp.minimum(left, self.steps - done)
            state = self.one_line(i, number, block, done, count, state)
            return done + count, number + 1, jnp.int32(0), state

        lax.fori_loop(0, self.lines, line, (jnp.int32(0), self.line, self.block, state))

    def one_line(
        self, i: Index, line: Index, block: Index, done: Index, count: Index, state: _State
    ) -> _State:
        """Process `count` blocks of a line from `block` on; `i` counts the program's lines."""
        at, on, refs = self.at, self.on, self.refs
        shape, tall = (at.block, at.columns), (at.height, at.columns)
        work = on["keys_work"] if self.call.shares else on["values_work"]
        row, mine = self.row(line), self.slot(i)
        plgpu.barrier_wait(on["q_here"].at[mine])
        about = on["about"].at[mine]
        positions = load(about.at[0, pl.ds(0, at.columns)], COLUMN)
        bits = load(about.at[1, pl.ds(0, at.columns)], COLUMN)
        sums = lax.bitcast_convert_type(bits, jnp.float32)

        def step(t: Array, carry: _Carry) -> _Carry:
            m, l, out, state = carry
            slot = self.slot(done + t)
            plgpu.barrier_wait(on["keys_here"].at[slot])
            seen, all_visible = self.visible(row, block + t, slot, positions)
            scores = self.scores(slot, mine, sums, seen)
            new_m = jnp.maximum(m, jnp.max(scores, axis=0))
            shift = jnp.where(new_m == -jnp.inf, 0.0, new_m)
            alpha = jnp.exp2(m - shift)
            weights = jnp.exp2(scores - across(shift, shape))
            l = l * across(alpha, shape) + weights
            plgpu.barrier_wait(on["values_here"].at[slot])
            multiply = self.call.values.weighted_sum(
                at, on["values"], slot, work, on["weights"], weights, seen, all_visible
            )
            plgpu.commit_smem()
            out = out * across(alpha, tall) + multiply()
            return new_m, l, out, self.fetch(state)

        nothing = plgpu.layout_cast(jnp.full((at.columns,), -jnp.inf, jnp.float32), COLUMN)
        l = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE)
        out = plgpu.layout_cast(jnp.zeros(tall, jnp.float32), TILE)
        m, l, out, state = lax.fori_loop(0, count, step, (nothing, l, out, state))
        place = self.number + line
        gpu_store(refs["out"].at[place], out)
        gpu_store(refs["m"].at[place], m)
        gpu_store(refs["l"].at[place], jnp.sum(l, axis=0))
        return state


def _params() -> plgpu.CompilerParams:
    return plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        reduction_scratch_bytes=REDUCTIONS,
    )


def walk(call: Call, arrays: dict[str, Any], interpret: object) -> tuple[Array, Array, Array]:
    """Return the partial results of all programs: weighted sums, m and l."""
    at = call.layout
    places = at.programs + at.lines
    wide = jax.ShapeDtypeStruct((places, at.height, at.columns), jnp.float32)
    narrow = jax.ShapeDtypeStruct((places, at.columns), jnp.float32)
    leaves, tree = jax.tree.flatten(arrays)
    scratch, scratch_tree = jax.tree.flatten(call.scratch())

    def body(*refs: Ref) -> None:
        given, rest = refs[: len(leaves)], refs[len(leaves) :]
        out, m, l, *memory = rest
        named = jax.tree.unflatten(tree, given) | {"out": out, "m": m, "l": l}
        _Program(call, named, jax.tree.unflatten(scratch_tree, memory)).walk()

    return plgpu.kernel(
        body,
        out_type=(wide, narrow, narrow),
        grid=(at.programs,),
        grid_names=("program",),
        scratch_types=scratch,
        compiler_params=_params(),
        interpret=interpret,
    )(*leaves)


def join(
    layout: Layout, parts: Sequence[Array], spans: Array, interpret: object
) -> tuple[Array, Array]:
    """Merge the partial results of each line to [lines, height, columns] and log-sum-exp."""
    tall = (layout.height, layout.columns)
    # Several at once: one alone waits for the memory as long as all of them do.
    unroll = min(max(tuning()["merge"] // (layout.height * layout.columns), 1), 8)

    def body(spans: Ref, outs: Ref, ms: Ref, ls: Ref, out: Ref, lse: Ref) -> None:
        line = lax.axis_index("line")
        first, last = spans[line, 0], spans[line, 1]

        def some(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            m, l, sums = carry
            found = []
            for j in range(unroll):
                number = first + i * unroll + j
                place = jnp.minimum(number, last) + line
                here = jnp.where(number <= last, load(ms.at[place], COLUMN), -jnp.inf)
                found.append((here, load(ls.at[place], COLUMN), load(outs.at[place], TILE)))
            new_m = functools.reduce(jnp.maximum, [here for here, _, _ in found], m)
            shift = jnp.where(new_m == -jnp.inf, 0.0, new_m)
            alpha = jnp.exp2(m - shift)
            l, sums = l * alpha, sums * across(alpha, tall)
            for j, (here, many, part) in enumerate(found):
                weight = jnp.exp2(here - shift)
                there = first + i * unroll + j <= last
                l = l + jnp.where(there, many * weight, 0.0)
                # Past the last result the last one is read again, which may not be finite.
                sums = sums + jnp.where(there, part * across(weight, tall), 0.0)
            return new_m, l, sums

        nothing = plgpu.layout_cast(jnp.full(tall[1:], -jnp.inf, jnp.float32), COLUMN)
        zero = plgpu.layout_cast(jnp.zeros(tall[1:], jnp.float32), COLUMN)
        sums = plgpu.layout_cast(jnp.zeros(tall, jnp.float32), TILE)
        rounds = lax.div(last - first + unroll, jnp.int32(unroll))
        m, l, sums = lax.fori_loop(0, rounds, some, (nothing, zero, sums))
        some_seen = jnp.where(l == 0, 1.0, l)
        gpu_store(out.at[line], sums / across(some_seen, tall))
        found = jnp.where(l == 0, -jnp.inf, (m + jnp.log2(some_seen)) * (1 / LOG2E))
        gpu_store(lse.at[line], found)

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
