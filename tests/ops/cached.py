"""Caches with something in them, in every form, and attention over them in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jkv.ops.codecs import Affine, Encoded, Float8

CODECS = {
    "bfloat16": None,
    "float16": None,
    "int8": (Affine(8), Affine(8)),
    "fp8": (Float8(), Float8()),
    "int4": (Affine(4), Affine(4)),
    "int4 by channel": (Affine(4, axis="channel", group=64), Affine(4)),
    "int8 by channel": (Affine(8, axis="channel", group=128), Affine(8)),
    # As the cache of 4 bits has it by default: two steps for a value of 128 channels.
    "int4 in groups": (Affine(4, axis="channel", group=64), Affine(4, group=64)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of some lengths, of which the last `new` tokens are asked for.

    Where rows are `ahead`, those are so many positions further than the last token that is there,
    or, below zero, before it: what is filled and what is asked for are two things.
    """

    lengths: tuple[int, ...]
    form: str = "bfloat16"
    new: int = 1
    kv_heads: int = 1
    groups: int = 4
    dim: int = 64
    slots: int = 192
    window: int | None = None
    sinks: int = 0
    softcap: float | None = None
    has_slot_positions: bool = False  # slots in any order, with holes
    page: int | None = None
    padding: tuple[int, ...] = ()  # rows without queries
    ahead: tuple[int, ...] = ()  # positions, of each row
    bound: float = 1e-2  # of the largest number of the result

    @property
    def options(self) -> dict[str, Any]:
        """Of the operation."""
        names = ("window", "sinks", "softcap")
        return {"scale": self.dim**-0.5} | {name: getattr(self, name) for name in names}

    @property
    def dtype(self) -> Any:
        """Of queries."""
        return jnp.dtype("float16" if self.form == "float16" else "bfloat16")


def drawn(case: Case, seed: int = 0) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Arguments of the operation, output [B, T, N, H] and log-sum-exp [B, T, N] in float64.

    Whatever no query sees, and not only empty slots, is NaN or infinite, or as near to that as the
    form comes.
    """
    rng = np.random.default_rng(seed)
    batch, new, slots = len(case.lengths), case.new, case.slots
    lengths = np.asarray(case.lengths)
    real = np.minimum(lengths, new)
    real[list(case.padding)] = 0
    offsets = np.arange(new)[None]
    first = lengths - real + np.asarray(case.ahead or [0] * batch)
    positions = np.where(offsets < real[:, None], first[:, None] + offsets, -1)
    held = np.broadcast_to(np.arange(slots), (batch, slots))
    if case.has_slot_positions:
        held = np.stack([rng.permutation(slots) for _ in range(batch)])
    held = np.where(held < lengths[:, None], held, -1)

    q = rng.normal(size=(batch, new, case.kv_heads * case.groups, case.dim)) * 2
    keys, values = rng.normal(size=(2, batch, case.kv_heads, slots, case.dim))
    q, keys, values = (jnp.asarray(x, case.dtype) for x in (q, keys, values))
    arguments: dict[str, Any] = {
        "q": q,
        "positions": jnp.asarray(positions, jnp.int32),
        "lengths": None if case.has_slot_positions else jnp.asarray(lengths, jnp.int32),
    }
    stored = [_stored(case, x, i) for i, x in enumerate((keys, values))]
    decoded = [_decoded(x) for x in stored]
    stored = [_poisoned(x, ~_seen(case, positions, held).any(axis=1)) for x in stored]
    if case.page is None:
        slot_positions = jnp.asarray(held, jnp.int32) if case.has_slot_positions else None
        arguments |= {"k": stored[0], "v": stored[1], "slot_positions": slot_positions}
    else:
        table, pages = _paged(case, rng, stored, lengths)
        arguments |= {"k": pages[0], "v": pages[1], "block_table": table}
    return arguments, *_oracle(case, np.asarray(q, np.float64), decoded, positions, held)


def _seen(case: Case, positions: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Which queries see which slots, [B, T, S]."""
    at, held = positions[:, :, None], held[:, None]
    seen = (held >= 0) & (held <= at)
    if case.window is not None:
        seen &= (at - held < case.window) | (held < case.sinks)
    return seen


def close(case: Case, got: Any, out: np.ndarray, lse: np.ndarray) -> None:
    """Compare a `Partial` with what `drawn` gave."""
    empty = np.isneginf(lse)
    np.testing.assert_array_equal(np.isneginf(got.lse), empty)
    np.testing.assert_array_equal(np.asarray(got.out)[empty], 0)
    off = np.abs(np.asarray(got.out, np.float64) - out).max()
    assert off <= case.bound * np.abs(out).max(), f"out is off by {off:.3g}"
    off = np.abs(np.where(empty, 0, got.lse) - np.where(empty, 0, lse)).max()
    assert off <= case.bound, f"lse is off by {off:.3g}"


def _stored(case: Case, x: Any, which: int) -> Any:
    codecs = CODECS[case.form]
    if codecs is None:
        return x
    batch, heads, slots, dim = x.shape
    empty = codecs[which].empty(batch, heads, slots, dim, case.dtype)
    blocks = jnp.broadcast_to(
        jnp.arange(slots // empty.block_size), (batch, slots // empty.block_size)
    )
    return empty.write_blocks(jnp.swapaxes(x, 1, 2), blocks)


def _decoded(x: Any) -> np.ndarray:
    return np.asarray(x.decode() if isinstance(x, Encoded) else x, np.float64)


def _poisoned(x: Any, unused: np.ndarray) -> Any:
    """With NaN, infinity and the largest bits there are in unused slots, [B, S]."""
    if not isinstance(x, Encoded):
        bad = jnp.where(jnp.arange(x.shape[-1]) % 3 == 0, jnp.inf, jnp.nan).astype(x.dtype)
        return jnp.where(jnp.asarray(unused)[:, None, :, None], bad, x)
    whole = unused.reshape(len(unused), -1, x.block_size).all(axis=2)
    worst = {"uint8": 0x7F, "uint16": 0x7FC0, "int16": 0x7FFF}  # NaN as e4m3 and as bfloat16

    def change(leaf: Any, axis: int) -> Any:
        marks = unused if leaf.shape[axis] == unused.shape[1] else whole
        shape = [len(marks), *(marks.shape[1] if i == axis else 1 for i in range(1, leaf.ndim))]
        bad = jnp.asarray(worst[leaf.dtype.name], leaf.dtype)
        return jnp.where(jnp.asarray(marks).reshape(shape), bad, leaf)

    return x.map_slots(change)


def _paged(case: Case, rng: Any, stored: list[Any], lengths: np.ndarray) -> tuple[Any, list[Any]]:
    """A table, and pages in any order of which the first belongs to nobody."""
    page = case.page or 1
    batch, columns = len(lengths), case.slots // page
    order = rng.permutation(batch * columns) + 1
    table = order.reshape(batch, columns)
    used = np.arange(columns)[None] * page < lengths[:, None]
    back = np.zeros(batch * columns + 1, np.int64)
    back[order] = np.arange(batch * columns)

    def split(leaf: Any, axis: int) -> Any:
        shape = (*leaf.shape[:axis], columns, -1, *leaf.shape[axis + 1 :])
        leaf = jnp.moveaxis(leaf.reshape(shape), axis, 1)
        leaf = leaf.reshape(-1, *leaf.shape[2:])[back]
        worst = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 0x7F
        return leaf.at[0].set(worst)

    pages = [x.map_slots(split) if isinstance(x, Encoded) else split(x, 2) for x in stored]
    return jnp.asarray(np.where(used, table, -1), jnp.int32), pages


def _oracle(
    case: Case, q: np.ndarray, kv: list[np.ndarray], positions: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    keys, values = kv
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b, t in np.ndindex(q.shape[:2]):
        seen = _seen(case, positions, held)[b, t]
        if not seen.any():
            continue
        for n in range(q.shape[2]):
            scores = keys[b, n // case.groups, seen] @ q[b, t, n] * case.dim**-0.5
            if case.softcap is not None:
                scores = case.softcap * np.tanh(scores / case.softcap)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ values[b, n // case.groups, seen] / weights.sum()
            lse[b, t, n] = scores.max() + np.log(weights.sum())
    return out, lse
