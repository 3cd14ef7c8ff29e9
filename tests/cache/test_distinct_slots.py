"""No pass writes a slot twice: XLA is told so, and may do anything where it is not true."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv.testing import _Config
from tests.cache.kinds import KINDS

MODULES = ("jkv.ops.write", "jkv.ops.pages")  # jkv.ops.write is the function in it
SLOTS = 160  # more than any ring has


@pytest.fixture
def repeated(monkeypatch) -> list[int]:
    """How many places each update of a buffer names again; those past the end count as well."""
    found: list[int] = []
    scatter = importlib.import_module("jkv.ops.write").scatter

    def count(*indices: Any) -> None:
        places = np.stack([x.reshape(-1) for x in np.broadcast_arrays(*indices)], 1)
        found.append(len(places) - len(np.unique(places, axis=0)))

    def watched(buffer: Any, at: Any, new: Any) -> Any:
        at_each = at if isinstance(at, tuple) else (at,)
        jax.debug.callback(count, *(x for x in at_each if not isinstance(x, slice)))
        return scatter(buffer, at, new)

    for name in MODULES:
        monkeypatch.setattr(importlib.import_module(name), "scatter", watched)
    return found


@pytest.mark.parametrize("case", [c for c in KINDS if c.layered], ids=lambda case: case.name)
def test_slots_are_distinct(case, repeated):
    """A chunk longer than any ring, in a row that fills it, one of half of it, and an empty one."""
    lengths = np.asarray([SLOTS, SLOTS // 2, 0], np.int32)
    full = jkv.from_legacy([tuple(jnp.ones((2, 3, 2, SLOTS, 16)))]).crop(lengths)

    @jax.jit
    def converted(cache: Any) -> Any:
        return cache.convert(case.kind, config=_Config(), slots=SLOTS)

    jax.block_until_ready(converted(full))
    jax.effects_barrier()
    assert repeated, "nothing was written"
    assert not any(repeated)
