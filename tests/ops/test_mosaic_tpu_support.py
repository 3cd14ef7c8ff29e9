"""What the kernels for TPUs can take, how numbers are split for them, and the two products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkv import ops
from jkv.errors import UnsupportedError
from jkv.ops import dispatch
from jkv.ops.attention import mosaic_tpu
from jkv.ops.attention.weights import attention_weights
from jkv.ops.codecs import Affine, Cast, Float8, Sparse
from jkv.ops.masks import AttentionSpec
from jkv.ops.mosaic_tpu import operands
from jkv.ops.mosaic_tpu import weights as tpu_weights
from tests.ops import calls
from tests.ops.tpu_kernels import (
    INT4,
)

# In the interpreter: once is enough, on one version of JAX.
pytestmark = [pytest.mark.slow, calls.needs("mosaic_tpu")]


def test_parts_of_numbers_are_all_of_them():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 1e3
    parts = jax.jit(operands.split_bf16, static_argnums=1)(x, 3)
    for part in parts:
        np.testing.assert_array_equal(part.astype(jnp.bfloat16).astype(np.float32), part)
    np.testing.assert_array_equal(np.sum(np.asarray(parts, np.float64), 0), x.astype(np.float64))


def test_all_floats_of_8_bits():
    codes = jnp.arange(256, dtype=jnp.uint8)
    want = np.asarray(jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), np.float32)
    real = ~np.isnan(want)  # never stored
    got = np.asarray(operands.from_float8(codes), np.float32)
    np.testing.assert_array_equal(got[real], want[real])


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def form(codec, slots=256, dim=64):
    return jax.eval_shape(lambda: codec.empty(1, 2, slots, dim, "float32"))


KEYS = shape(1, 2, 256, 64)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "why"),
    [
        (shape(1, 17, 2, 64), KEYS, KEYS, {}, "17 new tokens"),
        (shape(1, 1, 34, 64), KEYS, KEYS, {}, "17 query heads"),
        (shape(1, 1, 2, 8), *[shape(1, 2, 256, 8)] * 2, {}, "head dimension of 8"),
        (shape(1, 1, 2, 64), *[shape(1, 2, 100, 64)] * 2, {}, "100 slots"),
        (shape(1, 1, 2, 64, dtype="float16"), KEYS, KEYS, {}, "queries in float16"),
        (shape(1, 1, 2, 64), shape(1, 2, 256, 64, dtype="bfloat16"), KEYS, {}, "for queries"),
        (shape(1, 1, 2, 64), form(Cast("bfloat16")), KEYS, {}, "form of CastArray"),
        (shape(1, 1, 2, 64), KEYS, form(Sparse(0.5)), {}, "form of SparseArray"),
        (shape(1, 1, 2, 64), KEYS, form(INT4[0]), {}, "a scale per channel"),
        (shape(1, 1, 2, 64), form(Affine(4, "channel", 16)), KEYS, {}, "blocks of 16"),
        (shape(1, 1, 2, 64), KEYS, form(Affine(4, "token", 4)), {}, "16 groups"),
    ],
)
def test_what_is_not_for_the_kernel_says_why(q, k, v, options, why):
    chosen = calls.explain(q, k, v, platform="tpu", **options)
    assert chosen.name == "xla"
    assert why in chosen.refused["mosaic_tpu"]


def test_what_is_for_the_kernel():
    q = shape(1, 1, 2, 64)
    for k, v in ((KEYS, KEYS), (form(Affine(8)), form(Float8())), [form(c) for c in INT4]):
        assert calls.explain(q, k, v, platform="tpu").name == "mosaic_tpu"


@pytest.mark.parametrize(
    ("rows", "dim", "slots", "dtype", "bound"),
    [(1, 64, 300, "float32", 1e-5), (4, 128, 700, "bfloat16", 1e-2), (9, 80, 128, "float32", 1e-5)],
)
def test_the_two_products_of_weights(monkeypatch, rows, dim, slots, dtype, bound):
    """Blocks that the slots do not fill, poison where there is no weight."""
    monkeypatch.setattr(tpu_weights, "BYTES", 2**15)  # more than one block
    make = np.random.default_rng(0)
    q, k, v = (make.standard_normal((3, n, dim)) for n in (rows, slots, slots))
    w = make.random((3, rows, slots)) * (np.arange(slots) % 3 > 0)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    got = jax.jit(tpu_weights.products, static_argnames="interpret")(q, k, interpret=True)
    want = np.einsum("zrh,zsh->zrs", *(np.asarray(x, np.float64) for x in (q, k)))
    np.testing.assert_allclose(got, want, atol=bound * np.abs(want).max())
    held = jnp.where((jnp.arange(slots) % 3 > 0)[None, :, None], v, jnp.asarray(np.nan, dtype))
    summed = jax.jit(tpu_weights.sums, static_argnames="interpret")
    got = summed(jnp.asarray(w, jnp.float32), held, interpret=True)
    want = np.einsum("zrs,zsh->zrh", w, np.asarray(v, np.float64))
    np.testing.assert_allclose(got, want, atol=bound * np.abs(want).max())


def test_weights_are_by_kernels_where_there_are_some():
    def names(new, dim, slots):
        q, held = shape(1, new, 4, dim), shape(1, 2, slots, dim)
        at = shape(1, new, dtype="int32"), shape(1, 2, slots, dtype="int32")

        def call(q, held, positions, places):
            part = (held, held, places)
            return attention_weights(q, [part], positions, AttentionSpec(1.0))

        with dispatch.target("tpu"), dispatch.record() as found:
            jax.eval_shape(call, q, held, *at)
        return found

    assert names(1, 64, 256) == ["mosaic_tpu"]
    assert names(1, 64, 96) == names(1, 32, 256) == ["xla"]


@pytest.mark.parametrize(
    ("codecs", "least"), [((Affine(8), Affine(8)), 128), ((Float8(), Float8()), 128), (INT4, 128)]
)
def test_pages_of_codes(codecs, least):
    """Pages below the size that the reason names are refused, and pages of that size are read."""

    def chosen(page):
        pages = [form(codec, page) for codec in codecs]
        where: Any = {"lengths": shape(1), "platform": "tpu"}
        return calls.explain(shape(1, 1, 2, 64), *pages, shape(1, 8), **where)

    assert f"in pages of multiples of {least}" in chosen(least // 2).refused["mosaic_tpu"]
    assert chosen(least).name == "mosaic_tpu"


@pytest.mark.parametrize(
    ("page", "dim", "table", "why"),
    [(16, 64, 8, "multiples of 128"), (4, 128, 8, "multiples of 8"), (16, 128, 2**18, "a block")],
)
def test_pages_that_are_not_for_the_kernel(page, dim, table, why):
    pages = shape(9, 2, page, dim)
    call = calls.operands(
        shape(1, 1, 2, dim), pages, pages, shape(1, table), positions=shape(1, 1), lengths=shape(1)
    )
    assert why in str(mosaic_tpu.unsupported(*call))
    with pytest.raises(UnsupportedError, match="mosaic_tpu"):
        ops.attention(*call, implementation="mosaic_tpu")
