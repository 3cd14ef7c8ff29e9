"""Pages: what is in them, whose they are, and when they are given back."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv._pytree import replace
from jkv.cache import BlockTables, Cache, Paged
from jkv.errors import CacheFullError, UnsupportedError
from jkv.models import Decoder
from jkv.ops import AttentionSpec
from jkv.testing import check_kind
from tests.cache.pages import PAGE, SLOTS, holds, new, numbered, used, written


# Rounded kinds and pages of 4 are in the list of all kinds, and go through this by it.
@pytest.mark.parametrize("page", [1, 3, 16])
def test_any_page_size(page):
    sizes = (1, 5, 2, page - 1, page, page + 1, 2 * page + 3, 1)
    check_kind(jkv.paged(page), slots=160, chunks=[n for n in sizes if n])


def test_tokens_are_those_of_a_dense_cache(tiny_model):
    prompts = [[1, 2, 3, 4, 5, 6, 7], [3], [(7 * i + i * i) % 11 for i in range(20)]]
    options = {"max_new_tokens": 20, "stop": ()}
    want = jkv.generate(tiny_model, prompts, **options)
    got = jkv.generate(tiny_model, prompts, cache=jkv.paged(3), **options)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    # Held: what was filled, and no more.
    assert used(got.cache) == sum(-(-(len(p) + 19) // 3) for p in prompts)


def test_pages_are_taken_as_they_are_needed():
    cache, rows = written(new(), [[], [], []], numbered([4, 5, 0]))
    assert used(cache) == 1 + 2
    cache, rows = written(cache, rows, [[90], [], []])
    assert used(cache) == 2 + 2
    for token in range(3):
        cache, rows = written(cache, rows, [[token], [token], []])
    assert used(cache) == 2 + 2
    holds(cache, rows)


def test_forks_share_until_they_write():
    cache, (row, _, _) = written(new(), [[], [], []], numbered([10, 0, 0]))
    cache, rows = cache.take([0, 0, 0]), [row] * 3
    assert used(cache) == 3  # two full pages and a part of one
    full = np.asarray(cache.shared[0].tables[0])[:, :2]
    cache, rows = written(cache, rows, [[50], [], []])
    assert used(cache) == 4
    holds(cache, rows)
    cache, rows = written(cache, rows, [[60], [61], [62]])
    assert used(cache) == 5  # of rows that all write to a page that they share, one keeps it
    holds(cache, rows)
    for _ in range(3):
        cache, rows = written(cache, rows, [[70], [71], [72]])
    np.testing.assert_array_equal(np.asarray(cache.shared[0].tables[0])[:, :2], full)
    assert used(cache) == 2 + 2 * 3
    holds(cache, rows)
    assert cache.fork(2).layers[0].k_pages.shape == cache.layers[0].k_pages.shape


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_forks_written_and_dropped_in_any_order(order):
    """What one of them writes into a partly filled page, or into one that another gave back, is
    nobody else's."""
    cache, (row, _, _) = written(new(pages=8), [[], [], []], numbered([6, 0, 0]))
    cache, rows = cache.take([0, 0, 0]), [row] * 3
    for first in order:
        cache, rows = written(cache, rows, [[100 + b] if b == first else [] for b in range(3)])
        holds(cache, rows)
    left = [0, 1, 2]
    for number, gone in enumerate(order[:2]):
        before = used(cache)
        keep = [i for i, b in enumerate(left) if b != gone]
        cache, rows = cache.take(keep), [rows[i] for i in keep]
        left = [left[i] for i in keep]
        assert used(cache) < before
        holds(cache, rows)
        more = [[200 + 10 * number + b] * 4 for b in left]
        cache, rows = written(cache, rows, more)
        holds(cache, rows)
    cache.check()


def test_crop_gives_pages_back():
    cache, rows = written(new(pages=5), [[], [], []], numbered([9, 4, 0]))
    assert used(cache) == 4
    full, _ = written(cache, rows, [[], [], list(range(8))])
    assert np.asarray(full.overflowed).tolist() == [False, False, True]
    shorter = cache.crop([4, 4, 0])
    assert used(shorter) == 2
    assert np.asarray(shorter.shared[0].tables[0])[0].tolist()[1:] == [-1] * 4
    rows = [rows[0][:4], rows[1], []]
    again, rows = written(shorter, rows, [[], [], list(range(8))])
    holds(again, rows)
    assert used(again.crop(0)) == 0
    holds(cache, numbered([9, 4, 0]))  # a value, and still there


def test_a_pool_that_is_too_small_refuses_rows_and_hurts_none():
    cache, rows = written(new(pages=6), [[], [], []], numbered([7, 3, 4]))
    before, more = cache, [numbered([9], 50)[0], [60], [61, 62]]
    cache, _ = written(cache, rows, more)
    # Two pages are free: one token needs none, two need one, and nine need two.
    assert np.asarray(cache.overflowed).tolist() == [True, False, False]
    holds(cache, [rows[0], [*rows[1], 60], [*rows[2], 61, 62]])
    np.testing.assert_array_equal(before.shared[0].tables[0][0], cache.shared[0].tables[0][0])
    with pytest.raises(CacheFullError, match=r"rows \[0\].*no page was free"):
        cache.check()
    # And with the pages that it wants, all have theirs.
    enough, _ = written(before.take([0, 1, 2]).resize(SLOTS), rows, more)
    assert np.asarray(enough.overflowed).tolist() == [True, False, False]  # pages=6 is what it is
    elastic, rows = written(new(), [[], [], []], numbered([7, 3, 4]))
    holds(*written(elastic, rows, more))


def test_a_shared_page_is_not_lost_to_a_row_that_is_refused():
    """A refused row keeps its page as it is: nobody writes to it because all but that one did."""
    cache, (row, _, _) = written(new(pages=3), [[], [], []], numbered([6, 0, 0]))
    cache, rows = cache.take([0, 0, 0]).crop([5, 6, 6]), [row[:5], row, row]
    cache, _ = written(cache, rows, [[50], [51, 52, 53, 54], [55, 56, 57, 58]])
    assert np.asarray(cache.overflowed).tolist() == [False, True, True]
    holds(cache, [[*row[:5], 50], row, row])


def test_the_first_of_those_that_write_keeps_the_page():
    """With a copy for each of them there would have to be four pages for three rows."""
    cache, rows = written(new(slots=PAGE), [[], [], []], numbered([2, 2, 2]))
    cache, rows = cache.take([1, 1, 1]), [rows[1]] * 3
    cache, rows = written(cache, rows, [[50], [51], [52]])
    assert used(cache.check()) == cache.layers[0].k_pages.shape[0] == 3
    holds(cache, rows)


def test_as_many_pages_as_rows_and_columns_always_suffice():
    """Random lives in a pool without a page to spare, beams that are reordered at each step among
    them: nobody is refused, and everybody has their tokens."""
    rng, cache, rows = np.random.default_rng(0), new(slots=12), [[], [], []]
    shared = 0
    for step in range(120):
        if rng.random() < 0.5:
            order = rng.integers(0, 3, 3)
            cache, rows = cache.take(order), [rows[r] for r in order]
        if rng.random() < 0.15:
            keep = [int(rng.integers(0, len(row) + 1)) for row in rows]
            cache, rows = cache.crop(keep), [row[:n] for row, n in zip(rows, keep, strict=True)]
        most = 11 if rng.random() < 0.1 else 1
        counts = [min(int(rng.integers(0, most + 1)), 12 - len(row)) for row in rows]
        cache, rows = written(cache, rows, numbered(counts, 20 * step), width=most)
        numbers = np.asarray(cache.shared[0].tables[0])
        shared += np.sum(numbers >= 0) - used(cache)
        assert not np.any(np.asarray(cache.overflowed))
        holds(cache, rows)
    assert shared > 100


def test_what_nobody_has_is_seen_by_nobody():
    """Pages of NaN, in any order, in place of the empty ones: the same bits."""
    rng = np.random.default_rng(0)
    kinds = {"dense": jkv.dense(), "paged": jkv.paged(PAGE), "window": jkv.paged(PAGE)}
    q = rng.normal(size=(6, 3, 2, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 6, 3, 1, 8)).astype(np.float32)

    @jax.jit
    def steps(cache):
        def one(cache, qkv):
            run, spec = cache.begin(jnp.zeros((3, 1), jnp.int32)), AttentionSpec(0.3)
            out, layer = run.layers[0].attend(*(x[:, None] for x in qkv), run.step, spec)
            out, cache = run.end(out.reshape(3, 1, -1), [layer])
            return cache, out

        return jax.lax.scan(one, cache, (q, k, v))[1]

    def cache_of(kind):
        return Cache.empty([kind.init(3, SLOTS, 1, 8, jnp.float32)], 3, SLOTS)

    clean = cache_of(kinds["paged"])
    dirty = replace(clean, layers=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), clean.layers))
    want = np.asarray(steps(clean))
    np.testing.assert_array_equal(np.asarray(steps(dirty)), want)
    np.testing.assert_allclose(want, np.asarray(steps(cache_of(kinds["dense"]))), atol=1e-6)


def test_the_order_of_pages_is_nothing():
    cache, rows = written(new(), [[], [], []], numbered([9, 4, 11]))
    order = np.random.default_rng(1).permutation(cache.layers[0].k_pages.shape[0])
    table = np.asarray(cache.shared[0].tables[0])
    back = np.argsort(order)
    shuffled = replace(
        cache,
        layers=jax.tree.map(lambda leaf: leaf[order], cache.layers),
        shared=(BlockTables((jnp.asarray(np.where(table < 0, -1, back[table]), jnp.int32),)),),
    )
    holds(shuffled, rows)
    holds(*written(shuffled, rows, numbered([2, 1, 3], 50)))


def test_resize_makes_pages_for_all():
    cache, rows = written(new(), [[], [], []], numbered([9, 4, 11]))
    forks, rows = cache.fork(2), [row for row in rows for _ in range(2)]
    assert forks.layers[0].k_pages.shape[0] == 3 * 5
    bigger = forks.resize(24)
    assert bigger.layers[0].k_pages.shape[0] == 6 * 6
    assert used(bigger) == used(cache) == 7
    holds(bigger, rows)
    # Fewer, and those that are used move together.
    one = bigger.take([5]).resize(16)
    assert (one.layers[0].k_pages.shape[0], one.capacity) == (4, 16)
    holds(one, [rows[5]])


def test_concat_and_convert():
    cache, rows = written(new(), [[], [], []], numbered([9, 4, 11]))
    joined = jkv.concat([cache.take([2]), cache.take([0, 0])])
    holds(joined, [rows[2], rows[0], rows[0]])
    layer = joined.layers[0]
    assert isinstance(layer, Paged)
    assert layer.k_pages.shape[0] == 3 * 5
    dense = cache.convert(jkv.dense())
    assert dense.shared == ()
    back = dense.convert(jkv.paged(3), slots=SLOTS)
    holds(back, rows)
    assert back.capacity == 21
    few = dense.convert(jkv.paged(PAGE, pages=4), slots=SLOTS)
    with pytest.raises(CacheFullError, match=r"rows \[2\]"):
        few.check()
    holds(few, [rows[0], rows[1], []])
    with pytest.raises(UnsupportedError, match="managed"):
        dense.convert(jkv.paged(PAGE, managed=True))


# Windows of the model's own.


def test_pages_leave_a_window(tiny_model):
    """Layers that see 7 tokens, beside layers that see all: a table for each."""
    config = dataclasses.replace(tiny_model.config, windows=(7, None))
    model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    nnx.update(model, nnx.state(tiny_model))
    tokens = np.random.default_rng(7).integers(0, 11, (2, 64), np.int32)
    want = np.asarray(jax.jit(lambda model, tokens: model(tokens)[0])(model, tokens))
    run = jax.jit(lambda model, tokens, cache, counts: model(tokens, cache, counts))
    cache = jkv.init_cache(config, jkv.paged(3), batch=2, slots=60)
    layer, whole = cache.layers
    assert (layer.group, whole.group) == (0, 1)
    # Seven tokens lie in three pages at most; there are no more.
    assert (layer.k_pages.shape[0], whole.k_pages.shape[0]) == (2 * 3, 2 * 20)
    at = np.zeros(2, int)
    # A chunk that is longer than the window; rows that are not equally long; one without tokens.
    for counts in ([16, 3], [9, 0], *[[1, 1]] * 9, [2, 16], *[[1, 0]] * 4):
        size = 1 if max(counts) == 1 else 16
        new = np.stack([tokens[b, at[b] : at[b] + size] for b in range(2)])
        logits, cache = run(model, new, cache, np.array(counts, np.int32))
        for b, count in enumerate(counts):
            got, there = np.asarray(logits[b, :count]), want[b, at[b] : at[b] + count]
            np.testing.assert_allclose(got, there, atol=1e-4)
            np.testing.assert_array_equal(got.argmax(-1), there.argmax(-1))
        at += counts
        cache.check()
    assert used(cache, 0) <= 6
    assert used(cache, 1) == 14 + 10


def test_what_has_left_a_window_is_not_found_again():
    kind = dataclasses.replace(jkv.paged(PAGE), window=5)
    cache, rows = written(new(kind=kind), [[], [], []], numbered([4, 9, 11]))
    short = cache.take([0, 0, 0])
    holds(replace(short, layers=(replace(short.layers[0], window=None),)), [rows[0]] * 3)
    assert short.to_legacy()[0][0].shape[2] == 4
    assert np.asarray(cache.shared[0].tables[0] >= 0).tolist()[1:] == [
        [False, True, True, False, False],
        [False, True, True, False, False],
    ]
    # The page of the fifth token is still there, that of the fourth is not.
    assert cache.crop([4, 8, 8]).lengths.tolist() == [4, 8, 8]
    for lengths in ([4, 7, 11], [4, 9, 3]):
        with pytest.raises(UnsupportedError, match="crop: rows"):
            cache.crop(lengths)
    with pytest.raises(UnsupportedError, match="under jit"):
        jax.eval_shape(lambda cache: cache.crop(3), cache)
    assert used(cache.crop(0)) == 0
    for refused in (cache.to_legacy, lambda: jax.eval_shape(lambda c: c.to_legacy(), short)):
        with pytest.raises(UnsupportedError, match="every token"):
            refused()
