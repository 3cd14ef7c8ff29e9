"""The kernels for TPUs where what is filled and what is asked for are two things."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jkv.ops.codecs import Affine
from jkv.ops.masks import AttentionSpec
from jkv.ops.mosaic_tpu import flash
from tests.ops import calls
from tests.ops.calls import cut
from tests.ops.tpu_kernels import (
    BLOCK,
    NAN,
    SLOTS,
    attention,
    check,
    draw,
    encoded,
    held_by,
    paged,
    poisoned,
    unseen,
)

# In the interpreter: once is enough, on one version of JAX.
pytestmark = [pytest.mark.slow, calls.needs("mosaic_tpu")]

# Lengths of two rows, and positions of two queries in each: past the last token that is there, in
# its block and in a later one, and so far before it that whole blocks follow.
CASES = [
    ([5, SLOTS], [[6, 7], [138, 139]]),
    ([BLOCK, 300], [[BLOCK, 300], [2, 60]]),
    ([BLOCK + 2, BLOCK - 1], [[BLOCK + 1, BLOCK + 2], [BLOCK - 1, BLOCK]]),
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setitem(flash.BLOCK, "bytes", 1)


@pytest.mark.parametrize("options", [{}, {"window": 100, "sinks": 3}], ids=["all", "window"])
@pytest.mark.parametrize(("lengths", "at"), CASES)
def test_dense(lengths, at, options):
    q, k, v = draw(2, 2, 64)
    positions, held = np.asarray(at, np.int32), held_by(lengths)
    none = unseen(positions, held, **options)[:, None, :, None]
    got = attention(
        q,
        np.where(none, NAN, k),
        np.where(none, np.inf, v),
        positions=positions,
        slot_positions=None,
        lengths=np.asarray(lengths, np.int32),
        scale=0.1,
        interpret=True,
        **options,
    )
    check(got, q, k, v, positions, held, 1e-5, scale=0.1, **options)


@pytest.mark.parametrize(("lengths", "at"), CASES)
def test_codes(lengths, at):
    q, k, v = draw(2, 2, 64)
    positions, held = np.asarray(at, np.int32), held_by(lengths)
    k, v = (encoded(Affine(8), x) for x in (k, v))
    # One query sees what lies before it, and no query more than is there.
    seen = np.minimum(lengths, positions.max(axis=1) + 1)
    got = attention(
        q,
        poisoned(k, seen),
        poisoned(v, seen),
        positions=positions,
        slot_positions=None,
        lengths=np.asarray(lengths, np.int32),
        scale=0.1,
        interpret=True,
    )
    check(got, q, k.decode(), v.decode(), positions, held, 1e-5, scale=0.1)


@pytest.mark.parametrize(("lengths", "at"), CASES)
def test_pages(lengths, at):
    page = 16
    q, k, v = draw(2, 2, 128)
    positions, held = np.asarray(at, np.int32), held_by(lengths)
    none = unseen(positions, held)[:, None, :, None]
    kp, table = cut(np.where(none, NAN, k), page)
    vp, _ = cut(np.where(none, np.inf, v), page)
    for b, n in enumerate(lengths):
        table[b, -(-n // page) :] = -1
    got = paged(
        jnp.asarray(q),
        kp,
        vp,
        table,
        positions=positions,
        lengths=np.asarray(lengths, np.int32),
        scale=0.1,
        interpret=True,
    )
    check(got, q, k, v, positions, held, 1e-5, scale=0.1)


@pytest.mark.parametrize(("lengths", "at"), CASES)
def test_blocks_past_what_is_filled_or_asked_for_are_not_fetched(lengths, at):
    tiling = flash.Tiling(2, 1, 1, BLOCK, first=0, pages=1)
    positions = jnp.asarray(at, jnp.int32)
    spec = AttentionSpec(1.0)
    info, steps = flash.scalars_of(tiling, spec, positions, jnp.asarray(lengths), in_order=True)
    for b, (length, last) in enumerate(zip(lengths, np.max(at, axis=1), strict=True)):
        visited = {int(flash._block_of(tiling, b, i, info)) for i in range(int(steps))}
        assert visited == {s // BLOCK for s in range(min(length, last + 1))}
