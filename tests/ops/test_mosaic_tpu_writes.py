"""Writes in place by kernels for TPUs: runs of tokens, and whole pages."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkv.ops import dispatch
from jkv.ops.codecs import Affine
from jkv.ops.mosaic_tpu import write as mosaic_write
from jkv.ops.pages import _write_by_kernel, empty, write_pages
from jkv.ops.write import write, write_last, write_runs
from tests.ops import calls
from tests.ops.tpu_kernels import (
    RACES,
    B,
    encoded,
)

# In the interpreter: once is enough, on one version of JAX.
pytestmark = [pytest.mark.slow, calls.needs("mosaic_tpu")]


@pytest.mark.usefixtures("interpreted")
def test_pages_are_written_by_the_kernel():
    """Into their places, and into none where there is none."""
    with dispatch.target("tpu"):
        pool, _ = empty((Affine(4), Affine(4)), 5, 2, 16, 64, "float32")
    x = np.random.default_rng(0).normal(size=(3, 2, 16, 64)).astype(np.float32)
    new, at = pool.to_layout(encoded(Affine(4), x)), jnp.asarray([3, -1, 0])
    got, want = _write_by_kernel(pool, new, at), write_pages(pool, new, at)
    for a, b, c in zip(*map(jax.tree.leaves, (got, want, pool)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.any(a != c)


BUFFERS = [
    ((B, 2, 64, 150), 1, "float32"),
    ((B, 9, 80, 130), 1, "bfloat16"),
    ((B, 16, 2, 200), 1, "uint16"),
    ((B, 8, 300), 1, "int16"),
    ((B, 4, 16, 256), 64, "uint8"),
    ((B, 4, 800), 80, "uint16"),
]


@pytest.mark.parametrize(("shape", "run", "dtype"), BUFFERS)
def test_writes(shape, run, dtype):
    """One run of each row, none where there is none; the rest keeps every bit."""
    rng = np.random.default_rng(0)
    held, new = (
        jnp.asarray(rng.normal(size=(*shape[:-1], n)) * 50, dtype) for n in (shape[-1], run)
    )
    runs = shape[-1] // run
    put = jax.jit(functools.partial(mosaic_write.write_run, interpret=True))
    for at in ([runs - 1, -1], [runs, 1]):
        want = np.array(held)
        for b, i in enumerate(at):
            if 0 <= i < runs:
                want[b, ..., i * run : (i + 1) * run] = new[b]
        got = put(held, new, jnp.asarray(at, jnp.int32))
        np.testing.assert_array_equal(np.asarray(got), want)


def test_writes_do_not_race():
    held, new = jnp.zeros((B, 2, 64, 256)), jnp.ones((B, 2, 64, 1))
    got = mosaic_write.write_run(held, new, jnp.asarray([255, 3]), interpret=RACES)
    assert np.asarray(got).sum() == B * 2 * 64


@pytest.mark.usefixtures("interpreted")
def test_writes_are_those_of_the_cpu(monkeypatch):
    """What `write` makes of its kernels is what it makes without them."""
    rng = np.random.default_rng(0)
    k, steps, packed, new = (
        jnp.asarray(rng.normal(size=s) * 50, jnp.float32)
        for s in ((B, 2, 192, 64), (B, 2, 1, 192), (B, 2, 8, 192), (B, 128, 2, 64))
    )
    at = jnp.asarray([[2, 0], [-1, 1]])

    def both():
        turned = jnp.moveaxis(new.reshape(B, 2, 64, 2, 64)[..., :8], 2, -1)
        return (
            write(k, new[:, :2], at),
            write(k, new, at, 64),
            write_last(steps, new[:, :2, :, :1], at),
            write_runs(packed, turned, at),
        )

    want = both()
    monkeypatch.setattr(dispatch, "platforms", lambda: ("tpu", "cpu"))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, tpu, **_: tpu(*a))
    for got, wanted in zip(both(), want, strict=True):
        np.testing.assert_array_equal(got, wanted)
