"""The kernels on the GPU that is there: every form, shape and mask against float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jkv import ops
from jkv.ops.paged_attention import paged_attention
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
    run = ops.attention if case.page is None else paged_attention
    run = jax.jit(functools.partial(run, **case.options, implementation="mosaic_gpu"))
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
    check(Case((300, 17), form=form, told=True, window=window, slots=320))


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
