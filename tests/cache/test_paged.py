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
from jkv.cache import BlockTables, Cache, Paged, copy_pages
from jkv.errors import CacheFullError, NonFiniteError, UnsupportedError
from jkv.models import Decoder
from jkv.ops import AttentionSpec, dispatch
from jkv.ops.codecs import Affine, Sparse
from jkv.ops.pages import TpuPages
from jkv.testing import check_kind

PAGE, SLOTS = 4, 20


def new(rows=3, slots=SLOTS, kind=None, **options):
    """A cache of one layer, of one head of two numbers: a token and its position."""
    kind = jkv.paged(PAGE, **options) if kind is None else kind
    return Cache.empty([kind.init(rows, slots, 1, 2, jnp.float32)], rows, slots)


@jax.jit
def put(cache, tokens, counts):
    run = cache.begin(tokens, counts)
    k = jnp.stack([tokens, run.step.positions], axis=-1)[:, :, None].astype(jnp.float32)
    layers = [layer.append(k, k + 0.5, run.step) for layer in run.layers]
    return run.end(jnp.zeros((*tokens.shape, 1)), layers)[1]


def written(cache, rows, more, width=None):
    """Each row's new tokens in the cache, and in the lists of what it should be."""
    width = width or (1 if max(map(len, more)) <= 1 else 11)  # few shapes: each is a compilation
    tokens = np.full((len(more), width), 999, np.int32)
    for line, new in zip(tokens, more, strict=True):
        line[: len(new)] = new
    cache = put(cache, tokens, np.array([len(new) for new in more], np.int32))
    return cache, [[*row, *new] for row, new in zip(rows, more, strict=True)]


legacy = jax.jit(lambda cache: cache.to_legacy()[0])


def holds(cache, rows):
    """Every token of every row, where it belongs."""
    assert np.asarray(cache.lengths).tolist() == [len(row) for row in rows]
    keys, values = (np.asarray(x) for x in legacy(cache))
    for b, row in enumerate(rows):
        want = np.stack([row, np.arange(len(row))], axis=-1)
        np.testing.assert_array_equal(keys[b, 0, : len(row)], want)
        np.testing.assert_array_equal(values[b, 0, : len(row)], want + 0.5)


def used(cache, group=0):
    """Pages that somebody has."""
    numbers = np.asarray(cache.shared[0].tables[group])
    return len(np.unique(numbers[numbers >= 0]))


def numbered(rows, first=0):
    """As many different tokens as each number says."""
    starts = np.cumsum([first, *rows])
    return [list(range(a, a + n)) for a, n in zip(starts, rows, strict=False)]


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


# Managed: the pages are somebody else's to give.


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
    # Shared pages are not copied: whoever manages them does that.
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

        for new, counts in ((19, [19, 7]), (1, [1, 1]), (19, [4, 0])):
            q, k, v = rng.normal(size=(3, 2, new, 3, dim)).astype(np.float32)
            out, cache = more(cache, q, k, v, np.asarray(counts, np.int32))
            cache = cache.take(np.asarray([1, 0]))
            real = np.arange(new)[None] < np.asarray(counts)[:, None]
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
