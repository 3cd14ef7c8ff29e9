"""The division of one call's work among programs, by how many slots are filled.

A line is a row's key/value head with as many of its queries as fit into one program's registers.
The blocks of all lines, one after another, are divided into equal parts, one for each program: at
the end of a line a program goes on with the next. The result of a program for line z is stored as
partial result number ``program + z``: from one partial result to the next one of the two numbers
grows, so no two share a place, and those of a line are contiguous.
(Stream-K, Osama et al. 2023, arXiv:2301.03598; split KV, Dao et al. 2023, "Flash-Decoding".)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jkv._axes import Array
from jkv.ops.masks import AttentionSpec

LOG2E = math.log2(math.e)
LANES = 8  # columns of the matrix instruction come in eights
WORDS = 32  # 32-bit words that a copy at least has: a byte for each thread of a warpgroup


@functools.cache
def tuning() -> dict[str, Any]:
    """Return measured block sizes and the resources of the chip, from tuning.json."""
    return json.loads(Path(__file__).with_name("tuning.json").read_text())


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static sizes of one call."""

    batch: int
    new: int  # tokens
    kv_heads: int
    groups: int  # query heads of a key/value head
    dim: int
    slots: int  # of a row
    page: int | None  # slots of a page; None where a row is one piece
    chunks: int  # parts that the queries of a key/value head are in
    columns: int  # queries of a part, with padding
    block: int  # slots that are read at once
    stages: int  # blocks in flight
    programs: int

    @property
    def lines(self) -> int:
        """Key/value heads of all rows, times the parts of their queries."""
        return self.batch * self.kv_heads * self.chunks

    @property
    def words(self) -> int:
        """Columns of what is copied per line, 32 bits each."""
        return -(-self.columns // WORDS) * WORDS

    @property
    def height(self) -> int:
        """Channels, padded to the rows of the matrix instruction."""
        return -(-self.dim // 64) * 64


def parts(rows: int, dim: int) -> tuple[int, int]:
    """Return into how many chunks `rows` queries are split, and the columns of each."""
    most = max(tuning()["accumulator"] // (-(-dim // 64) * 64) // LANES * LANES, LANES)
    chunks = -(-rows // most)
    return chunks, -(-rows // (chunks * LANES)) * LANES


def fit(layout: Layout, chosen: dict[str, int], size: Callable[[Layout], int]) -> Layout:
    """Return the layout with the blocks in flight and programs that were measured best and fit.

    The programs are reduced before there are fewer than two blocks; stages is 0 where nothing fits.

    Args:
        layout: the other sizes.
        chosen: "stages" and "programs" of tuning.json.
        size: bytes of shared memory that a program takes.
    """
    # More than two need no more than 160 registers each.
    small = layout.columns <= LANES and layout.dim <= 128
    for programs in range(chosen["programs"] if small else min(chosen["programs"], 2), 0, -1):
        # A kilobyte of each program's shared memory is the system's.
        room = tuning()["shared_memory"] // programs - 1024
        for stages in range(chosen["stages"], 1, -1):
            wanted = dataclasses.replace(layout, stages=stages)
            if size(wanted) <= room:
                return dataclasses.replace(wanted, programs=programs * multiprocessors())
    return dataclasses.replace(layout, stages=0)


@functools.cache
def multiprocessors() -> int:
    """Return the number of multiprocessors of this GPU, or of the one compiled for."""
    if jax.default_backend() == "gpu":
        return jax.local_devices()[0].core_count
    return tuning()["multiprocessors"]


def rows(
    layout: Layout,
    spec: AttentionSpec,
    positions: Array,
    lengths: Array | None,
    in_order: bool,
) -> Array:
    """Return for each row [B, 4]: blocks, skipped blocks, filled slots and the last position.

    A row has at least one block, even if it sees nothing there: its result is written too. With a
    window and slots in order, blocks between those of the sinks and the window are skipped.
    """
    filled = jnp.full((layout.batch,), layout.slots, jnp.int32)
    if lengths is not None:
        filled = jnp.minimum(filled, lengths.astype(jnp.int32))
    last = jnp.max(positions, axis=1).astype(jnp.int32)
    skip = jnp.zeros_like(filled)
    if in_order:
        filled = jnp.minimum(filled, last + 1)
    count = -(-jnp.maximum(filled, 1) // layout.block)
    if in_order and spec.window is not None:
        early = jnp.min(jnp.where(positions < 0, layout.slots, positions), axis=1)
        first = jnp.maximum(early.astype(jnp.int32) - spec.window + 1, 0) // layout.block
        sinks = min(-(-spec.sinks // layout.block), -(-layout.slots // layout.block))
        skip = jnp.maximum(jnp.minimum(first, count - 1) - sinks, 0)
        count -= skip
    return jnp.stack([count, skip, filled, last], axis=1)


def shares(layout: Layout, counts: Array) -> tuple[Array, Array]:
    """Return where each program begins, and which programs work on each line.

    Args:
        layout: sizes.
        counts: blocks of each row, [B].

    Returns:
        starts [programs, 4]: line, block of that line, how many blocks, how many lines;
        spans [lines, 2]: the first and the last program.
    """
    per_row = layout.kv_heads * layout.chunks
    # A sum for each row: a cumulative one compiles to several programs, and rows are few.
    numbers = jnp.arange(layout.batch, dtype=jnp.int32)
    before = numbers[None, :] <= numbers[:, None]
    ends = jnp.sum(jnp.where(before, counts[None, :], 0), axis=1) * per_row
    total = ends[-1]
    share, extra = total // layout.programs, total % layout.programs

    def place(block: Array) -> tuple[Array, Array]:
        block = jnp.minimum(block, total - 1)  # a program without blocks
        row = jnp.sum(ends[None, :] <= block[:, None], axis=1)
        row = jnp.minimum(row, layout.batch - 1)
        inside = block - (ends - counts * per_row)[row]
        return row * per_row + inside // counts[row], inside % counts[row]

    numbers = jnp.arange(layout.programs, dtype=jnp.int32)
    first = numbers * share + jnp.minimum(numbers, extra)
    many = share + (numbers < extra).astype(jnp.int32)
    line, block = place(first)
    until, _ = place(first + jnp.maximum(many, 1) - 1)
    starts = jnp.stack([line, block, many, jnp.where(many > 0, until - line + 1, 0)], axis=1)

    def program(block: Array) -> Array:
        larger = extra * (share + 1)
        rest = extra + (block - larger) // jnp.maximum(share, 1)
        return jnp.where(block < larger, block // (share + 1), rest)

    lines = jnp.arange(layout.lines, dtype=jnp.int32)
    row = lines // per_row
    begin = (ends - counts * per_row)[row] + lines % per_row * counts[row]
    spans = jnp.stack([program(begin), program(begin + counts[row] - 1)], axis=1)
    return starts.astype(jnp.int32), spans.astype(jnp.int32)


def queries(layout: Layout, q: Array) -> Array:
    """Arrange queries [B, T, N, H] as [lines, columns, H], padded with zeros."""
    batch, new, _, dim = q.shape
    q = q.reshape(batch, new, layout.kv_heads, layout.groups, dim).transpose(0, 2, 1, 3, 4)
    q = q.reshape(batch, layout.kv_heads, new * layout.groups, dim)
    room = layout.chunks * layout.columns - new * layout.groups
    q = jnp.pad(q, ((0, 0), (0, 0), (0, room), (0, 0)))
    return q.reshape(layout.lines, layout.columns, dim)


def positions_of_lines(layout: Layout, positions: Array) -> Array:
    """Arrange positions [B, T] as [lines, columns], -1 where there is no query."""
    at = jnp.repeat(positions.astype(jnp.int32), layout.groups, axis=1)
    room = layout.chunks * layout.columns - at.shape[1]
    at = jnp.pad(at, ((0, 0), (0, room)), constant_values=-1)
    at = at.reshape(layout.batch, 1, layout.chunks, layout.columns)
    at = jnp.broadcast_to(at, (layout.batch, layout.kv_heads, *at.shape[2:]))
    return at.reshape(layout.lines, layout.columns)


def results(layout: Layout, out: Array, lse: Array) -> tuple[Array, Array]:
    """Arrange results [lines, H, columns], [lines, columns] as [B, T, N, H], [B, T, N]."""
    lead = (layout.batch, layout.kv_heads, layout.chunks)
    many = layout.new * layout.groups
    out = out.reshape(*lead, layout.dim, layout.columns)
    out = jnp.moveaxis(out, 3, 4).reshape(*lead[:2], -1, layout.dim)[:, :, :many]
    lse = lse.reshape(*lead[:2], -1)[:, :, :many]
    split = (layout.batch, layout.kv_heads, layout.new, layout.groups)
    out = out.reshape(*split, layout.dim).transpose(0, 2, 1, 3, 4)
    lse = lse.reshape(split).transpose(0, 2, 1, 3)
    flat = (layout.batch, layout.new, layout.kv_heads * layout.groups)
    return out.reshape(*flat, layout.dim), lse.reshape(flat)
