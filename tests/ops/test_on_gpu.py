"""The kernels on the GPU that is there: every form, shape and mask against float64."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv import ops
from jkv.ops import dispatch
from tests.ops import calls
from tests.ops.cached import CODECS, Case, close, drawn

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="no GPU here (scripts/gpu_check.sh runs these on one)"
)

BLOCK = 128  # the largest
EDGES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 1000)
LONG = Case(EDGES, kv_heads=2, dim=128, slots=1024)
FORMS = tuple(CODECS)


def check(case: Case, seed: int = 0) -> None:
    """The kernel, asked for by name: not supported is an error."""
    arguments, out, lse = drawn(case, seed)
    run = jax.jit(functools.partial(calls.attention, **case.options, implementation="mosaic_gpu"))
    got = jax.tree.map(np.asarray, run(**arguments))
    close(case, got, out, lse)
    # Once more: nothing is left over from the first call, and no program depends on another.
    again = jax.tree.map(np.asarray, run(**arguments))
    np.testing.assert_array_equal(again.out, got.out)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("new", [1, 5])
def test_forms(form, new):
    check(dataclasses.replace(LONG, form=form, new=new))


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4 by channel"])
@pytest.mark.parametrize(("window", "sinks"), [(100, 0), (130, 4), (1, 0), (2000, 200)])
def test_windows(form, window, sinks):
    check(dataclasses.replace(LONG, form=form, new=3, window=window, sinks=sinks))


@pytest.mark.parametrize("groups", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("new", [1, 16])
def test_query_heads(groups, new):
    check(Case((300, 17), groups=groups, new=new, kv_heads=2, slots=320))


@pytest.mark.parametrize("form", ["bfloat16", "float16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_channels(form, dim):
    if form == "int4" and dim == 80:
        pytest.skip("rows of 40 bytes are not supported")
    check(Case((300, 17, 128), form=form, dim=dim, new=2, slots=320))


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_slots_in_any_order_with_holes(form, window):
    check(Case((300, 17), form=form, has_slot_positions=True, window=window, slots=320))


def test_softcap_and_padding():
    check(dataclasses.replace(LONG, softcap=5.0, new=4, padding=(0, 3)))


@pytest.mark.parametrize("slots", [8, 40, 72, 1000])
def test_buffers_that_are_no_whole_blocks(slots):
    check(Case((slots, 1, 0), slots=slots))


@pytest.mark.parametrize(
    ("form", "page"),
    [("bfloat16", page) for page in (8, 16, 32, 64, 128, 256)]
    + [(form, page) for form in ("int8", "fp8", "int4", "int4 by channel") for page in (64, 128)],
)
@pytest.mark.parametrize("window", [None, 100])
def test_pages(form, page, window):
    check(dataclasses.replace(LONG, form=form, page=page, window=window, new=2))


def test_many_rows_of_uneven_length():
    lengths = np.random.default_rng(0).integers(0, 700, 64)
    lengths[7] = 2048
    check(Case(tuple(int(n) for n in lengths), kv_heads=2, slots=2048))


def test_one_long_row():
    check(Case((60_000,), kv_heads=1, dim=128, slots=65_536))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 40, 129])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_a_chunk_among_itself(dtype, window, dim):
    """By cuDNN, asked for by name: rows of padding, heads that share keys, and an lse unrounded."""
    new, counts = 300, np.array([300, 1, 0, 129])
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (4, n, new, dim)).astype(dtype)
        for key, n in zip(keys, (8, 2, 2), strict=True)
    )
    q = 3 * jnp.swapaxes(q, 1, 2)  # an lse of some size
    at = np.arange(new)[None]
    positions = jnp.asarray(
        np.where(at < counts[:, None], at + np.array([[0], [7], [5], [90]]), -1)
    )
    k, v = (jnp.where((positions >= 0)[:, None, :, None], x, jnp.nan).astype(dtype) for x in (k, v))
    run = functools.partial(calls.attention, positions=positions, window=window, chunk=True)
    got = jax.jit(functools.partial(run, implementation="cudnn"))(q, k, v)
    want = jax.jit(functools.partial(run, implementation="reference"))(q, k, v)
    np.testing.assert_allclose(got.out, want.out, atol=1e-2 * float(jnp.abs(want.out).max()))
    np.testing.assert_array_equal(jnp.isneginf(got.lse), jnp.isneginf(want.lse))
    seen = ~jnp.isneginf(want.lse)
    # Rounded to eight bits, one of 20 would be off by 0.06.
    assert jnp.abs(want.lse)[seen].max() > 8
    np.testing.assert_allclose(got.lse[seen], want.lse[seen], atol=4e-3)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kind", ["dense", "window:200,sinks=4", "int8", "paged"])
def test_chunks_one_after_another(kind, window):
    """Three of them, apart and merged, beside a dense cache that does all at once by XLA."""
    config = types.SimpleNamespace(layers=1, kv_heads=2, head_dim=64, dtype="bfloat16")
    window = None if kind.startswith("window") else window
    if kind.startswith("window"):
        made = jkv.window(200, sinks=4, positions="text")
    else:
        made = {"dense": jkv.dense(), "int8": jkv.quantized(8), "paged": jkv.paged(16)}[kind]
    cache = jkv.init_cache(config, made, batch=3, slots=512)
    plain = jnp.zeros((3, 2, 512, 64), jnp.bfloat16)
    keys, values = plain, plain
    tokens = jnp.zeros((3, 130), jnp.int32)
    for i, counts in enumerate(([130, 3, 0], [7, 130, 20], [130, 130, 130])):
        key = jax.random.split(jax.random.key(i), 3)
        q, k, v = (
            jax.random.normal(one, (3, 130, n, 64)).astype(jnp.bfloat16)
            for one, n in zip(key, (8, 2, 2), strict=True)
        )
        run = cache.begin(tokens, jnp.asarray(counts))
        step = run.step
        with dispatch.record() as names:
            out, layer = run.layers[0].attend(q, k, v, step, ops.AttentionSpec(0.2, window))
        assert "cudnn" in names
        _, cache = run.end(out, [layer])
        keys, values = ops.write(keys, k, step.positions), ops.write(values, v, step.positions)
        options: Any = {"window": window}
        if kind.startswith("window"):
            options = {"window": 200, "sinks": 4}
        want = calls.attention(
            q,
            keys,
            values,
            positions=step.positions,
            lengths=step.stop,
            scale=0.2,
            implementation="xla",
            **options,
        ).out
        real = step.positions >= 0
        bound = 4e-2 if kind == "int8" else 2e-2
        np.testing.assert_allclose(
            np.asarray(out, np.float32)[real], want[real], atol=bound * float(jnp.abs(want).max())
        )
