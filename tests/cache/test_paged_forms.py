"""Pages that the caller assigns, rounded pages, and pages in the layout of a TPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv._pytree import replace
from jkv.cache import BlockTables, Cache, copy_pages
from jkv.errors import NonFiniteError, UnsupportedError
from jkv.ops import AttentionSpec, dispatch
from jkv.ops.codecs import Affine, Sparse
from jkv.ops.pages import TpuPages
from tests.cache.pages import PAGE, holds, new, numbered, put, used, written
from tests.ops.calls import needs

# Managed: the caller assigns the pages.


def managed(table, lengths):
    cache = new(rows=1, pages=12, managed=True)
    return given(cache, table, lengths)


def given(cache, table, lengths):
    return replace(
        cache,
        shared=(BlockTables((jnp.asarray(table, jnp.int32),)),),
        lengths=jnp.asarray(lengths, jnp.int32),
        overflowed=jnp.zeros(len(lengths), bool),
    )


def test_managed_pages_are_written_where_the_table_says(compiles):
    a, b, c = [[7, 2, -1, -1, -1], [5, -1, -1, -1, -1], [9, 0, 3, -1, -1]]
    cache, rows = written(managed([a, b, c], [0, 0, 0]), [[], [], []], numbered([6, 3, 11]))
    np.testing.assert_array_equal(cache.shared[0].tables[0], [a, b, c])
    holds(cache, rows)
    # Other rows, in another order, and then as many again.
    two, more = written(given(cache, [c, a], [11, 6]), [rows[2], rows[0]], [[70], [71]])
    holds(two, more)
    back, rows = given(two, [a, b, c], [7, 3, 12]), [more[1], rows[1], more[0]]
    holds(back, rows)
    back, rows = written(back, rows, [[], [72], []])
    with compiles:
        for table, order in (([b, a, c], [1, 0, 2]), ([c, b, a], [2, 0, 1])):
            rows = [rows[i] for i in order]
            lengths = np.array([len(row) for row in rows], np.int32)
            back = given(back, table, lengths)
            put(back, np.zeros((3, 1), np.int32), np.zeros(3, np.int32))
        assert compiles.count == 0


def test_managed_rows_without_a_page_are_refused():
    cache, rows = written(managed([[4, -1], [6, 1]], [0, 0]), [[], []], numbered([4, 4]))
    cache, _ = written(cache, rows, [[80], [81]])
    assert np.asarray(cache.overflowed).tolist() == [True, False]
    holds(cache, [rows[0], [*rows[1], 81]])
    np.testing.assert_array_equal(cache.shared[0].tables[0], [[4, -1], [6, 1]])
    long, _ = written(given(cache, [[4, 6]], [8]), [[]], [[1]])
    assert np.asarray(long.overflowed).tolist() == [True]
    # Shared pages are not copied: the caller that manages them does.
    cache, rows = written(managed([[4, 8], [4, 9]], [0, 0]), [[], []], [[1, 2], []])
    copied = copy_pages(cache, jnp.array([4, -1, 4]), jnp.array([7, 3, 2]))
    holds(given(copied, [[4, 8], [7, 9], [2, 0]], [2, 2, 2]), [[1, 2]] * 3)
    forks, rows = given(copied, [[4, 8], [7, 9]], [2, 2]), [[1, 2], [1, 2]]
    holds(*written(forks, rows, [[3], [4]]))


# Rounded pages.


def test_each_token_is_rounded_once():
    """A copied page has its codes, not the codes of what they stand for."""
    cache = new(bits=8)
    cache, rows = written(cache, [[], [], []], numbered([6, 0, 0], 100))
    at = np.asarray(cache.shared[0].tables[0])[0, 1]
    before = jax.tree.map(lambda leaf: np.asarray(leaf[at]), cache.layers[0].k_pages)
    cache, rows = cache.take([0, 0, 0]), [rows[0]] * 3
    cache, rows = written(cache, rows, [[50], [51], [52]])
    for b in range(3):
        at = np.asarray(cache.shared[0].tables[0])[b, 1]
        after = jax.tree.map(lambda leaf, at=at: np.asarray(leaf[at]), cache.layers[0].k_pages)
        np.testing.assert_array_equal(after.codes[:, :2], before.codes[:, :2])
        np.testing.assert_array_equal(after.scales[..., :2], before.scales[..., :2])
    keys, _ = cache.to_legacy()[0]
    np.testing.assert_allclose(keys[:, 0, 6, 0], [50, 51, 52], rtol=0.01)


def test_nan_is_told_and_leaves_with_its_page():
    kind = jkv.paged(PAGE, codec=jkv.fp8())
    cache = new(kind=kind)

    @jax.jit
    def put_numbers(cache, numbers):
        run = cache.begin(jnp.zeros(numbers.shape, jnp.int32))
        k = jnp.broadcast_to(numbers[:, :, None, None], (*numbers.shape, 1, 2))
        layers = [layer.append(k, k, run.step) for layer in run.layers]
        return run.end(jnp.zeros((*numbers.shape, 1)), layers)[1]

    numbers = np.ones((3, 5), np.float32)
    put_numbers(cache, numbers).check()
    numbers[1, 4] = np.nan
    bad = put_numbers(cache, numbers)
    with pytest.raises(NonFiniteError, match=r"rows \[1\]"):
        bad.check()
    with pytest.raises(NonFiniteError, match=r"rows \[0, 1\]"):  # a copy of it is as bad
        put_numbers(bad.take([1, 1, 0]), np.ones((3, 5), np.float32)).check()
    bad.crop(4).check()


def test_requantise_keeps_the_pages():
    cache, rows = written(new(bits=8), [[], [], []], numbered([9, 4, 11], 5))
    fewer = cache.take([0, 0, 2]).requantise(jkv.paged(PAGE, bits=4))
    assert fewer.nbytes < cache.nbytes
    assert used(fewer) == 3 + 3
    keys, _ = fewer.to_legacy()[0]
    np.testing.assert_allclose(keys[2, 0, :11, 0], rows[2], atol=1.0)
    with pytest.raises(TypeError, match="pages that rounds"):
        cache.requantise(jkv.quantized(bits=4))
    with pytest.raises(ValueError, match="pages of 3 tokens"):
        cache.requantise(jkv.paged(3, bits=4))
    with pytest.raises(UnsupportedError, match="no layer rounds"):
        new().requantise(jkv.paged(PAGE, bits=4))


def test_what_is_no_kind():
    assert jkv.paged(8, codec=jkv.quantized(8)) == jkv.paged(8, 8)
    token = jkv.quantized(bits=4, key_axis="token", residual=0)
    assert jkv.paged(codec=token) == jkv.paged(codec=Affine(4, "token", 64))
    # One step per token: two make TPUs copy the pool, and no kernel for GPUs takes them.
    assert jkv.paged(16, 4) == jkv.paged(codec=Affine(4, "token", None))
    assert jkv.paged(codec=Sparse(0.5)).keys == Sparse(0.5)
    for options, error, message in (
        ({"page": 0}, ValueError, "page=0"),
        ({"page": 1.5}, ValueError, r"page=1\.5"),
        ({"pages": 0}, ValueError, "pages=0"),
        ({"bits": 3}, ValueError, "bits=3"),
        ({"bits": 8, "codec": jkv.fp8()}, ValueError, "one of them"),
        ({"codec": jkv.quantized(4)}, ValueError, "64 tokens together and keeps 128"),
        ({"codec": 8}, TypeError, "codec=8"),
        ({"codec": jkv.dense()}, TypeError, "expected a kind that rounds"),
        ({"managed": 1}, TypeError, "managed=1"),
    ):
        with pytest.raises(error, match=message):
            jkv.paged(**options)
    layer = new().layers[0]
    with pytest.raises(UnsupportedError, match="no table of its own"):
        layer.to_legacy(jnp.zeros(3, jnp.int32))


@needs("mosaic_tpu")
@pytest.mark.parametrize(("bits", "dim"), [(None, 48), (4, 64)])
def test_pages_as_they_lie_on_a_tpu(bits, dim):
    """Another arrangement of the same numbers, through all that is done to a cache."""

    def life(kind, again):
        cache = Cache.empty([kind.init(2, 64, 3, dim, jnp.float32)], 2, 64)
        rng, found = np.random.default_rng(0), []

        @jax.jit
        def more(cache, q, k, v, counts):
            run = cache.begin(jnp.zeros(q.shape[:2], jnp.int32), counts)
            out, layer = run.layers[0].attend(q, k, v, run.step, AttentionSpec(dim**-0.5))
            return run.end(out, [layer])

        for size, counts in ((19, [19, 7]), (1, [1, 1]), (19, [4, 0])):
            q, k, v = rng.normal(size=(3, 2, size, 3, dim)).astype(np.float32)
            out, cache = more(cache, q, k, v, np.asarray(counts, np.int32))
            cache = cache.take(np.asarray([1, 0]))
            real = np.arange(size)[None] < np.asarray(counts)[:, None]
            found.append(np.where(real[:, :, None, None], out, 0))
        cache = cache.fork(2).resize(80)
        cache = cache.crop(np.maximum(cache.lengths - 3, 0))
        if bits is not None:
            layer = cache.layers[0].requantise(again, cache.lengths)
            cache = replace(cache, layers=(layer,))
        return [*found, *jax.tree.leaves(cache.to_legacy())], cache

    kind, again = jkv.paged(16, bits=bits), jkv.paged(16, bits=8)
    want, plain = life(kind, again)
    with dispatch.target("tpu"):
        got, held = life(kind, again)
        assert isinstance(held.layers[0].k_pages, TpuPages)
    assert held.layers[0].k_pages.shape == plain.layers[0].k_pages.shape
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
