"""What every kind of cache must do, driven by the one list in `kinds.py`.

All of it through the model, as users meet it, against the same model without a cache; one batch
size, one number of slots and three chunk sizes, so that a kind costs three compilations.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv.cache import LayerCache
from jkv.cache.block_table import tables_of
from jkv.errors import CacheFullError, UnsupportedError
from jkv.models import Decoder
from jkv.ops import AttentionSpec
from tests.cache import kinds

# Each kind costs a dozen compilations of a whole model, so those that differ from these in their
# codec alone, or have no such model to be compared with, are looked at layer by layer: by the same
# questions in test_testing.py and test_machine.py, and bit by bit in test_quantized.py.
KINDS = [case for case in kinds.KINDS if case.modelled]

B, SLOTS, TOTAL = 4, 32, 23
CHUNKS = (1, 5, 1, 9, 5, 1, 1)  # sums to TOTAL; 9 is longer than the ring, which holds 7

every_kind = pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
layered = pytest.mark.parametrize("case", [c for c in KINDS if c.layered], ids=lambda c: c.name)


@functools.cache
def windowed(model, window):
    """The same weights with another window, which decides what a kind is compared with."""
    if window is None:
        return model
    config = dataclasses.replace(model.config, windows=(window,) * model.config.layers)
    other = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    nnx.update(other, nnx.state(model))
    return other


@pytest.fixture
def model(case, tiny_model):
    return windowed(tiny_model, case.window)


@jax.jit
def forward(model, tokens):
    return model(tokens)[0]


@jax.jit
def run(model, tokens, cache, counts):
    return model(tokens, cache, counts)


@pytest.fixture(scope="session")
def tokens(tiny_config):
    return np.random.default_rng(7).integers(0, tiny_config.vocab, (B, TOTAL), np.int32)


def new_cache(case, model, **changes):
    options = {"batch": B, "slots": SLOTS} | changes
    return jkv.init_cache(model.config, case.kind, **options)


def feed(model, cache, rows, size):
    """Each row's list of new tokens, padded to `size` with an id that would show if it counted."""
    chunk = np.full((len(rows), size), 10, np.int32)
    for b, row in enumerate(rows):
        chunk[b, : len(row)] = row
    return run(model, chunk, cache, np.array([len(row) for row in rows], np.int32))


def feed_all(model, cache, rows):
    """Rows of up to 23 tokens in the suite's chunk sizes; no row's last chunk is special."""
    done = [0] * len(rows)
    while any(d < len(row) for d, row in zip(done, rows, strict=True)):
        left = max(len(row) - d for d, row in zip(done, rows, strict=True))
        size = 9 if left >= 9 else 5 if left >= 5 else 1
        new = [row[d : d + size] for d, row in zip(done, rows, strict=True)]
        _, cache = feed(model, cache, new, size)
        done = [d + len(n) for d, n in zip(done, new, strict=True)]
    return cache


def uncached(model, rows):
    """Logits after each row's last token, without any cache; rows as long as need be."""
    padded = np.zeros((B, SLOTS), np.int32)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
    logits = np.asarray(forward(model, padded))
    return np.stack([logits[b, len(row) - 1] for b, row in enumerate(rows)])


def same(case, got, want):
    """Exact kinds to rounding and in every greedy token; the others within a quarter of a
    standard deviation, where a token lost or misplaced is off by several."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    spread = want.std()
    if case.exact:
        assert np.max(np.abs(got - want)) <= 1e-5 * max(1.0, spread) * 10
        np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
    else:
        assert np.max(np.abs(got - want)) <= case.spread * spread


def continues(case, model, cache, rows):
    """The cache holds exactly these rows: one more token in each gives the logits that it must."""
    assert np.asarray(cache.lengths).tolist() == [len(row) for row in rows]
    new = [[(3 * b + len(row)) % 11] for b, row in enumerate(rows)]
    logits, after = feed(model, cache, new, 1)
    whole = [[*row, *n] for row, n in zip(rows, new, strict=True)]
    same(case, logits[:, 0], uncached(model, whole))
    return after, whole


@every_kind
def test_is_a_frozen_pytree(case, model):
    cache = new_cache(case, model)
    if case.layered:
        assert all(isinstance(layer, LayerCache) for layer in cache.layers)
        assert len(cache.layers) == model.config.layers
    leaves, tree = jax.tree.flatten(cache)
    again = jax.tree.unflatten(tree, leaves)
    assert jax.tree.structure(again) == tree
    assert again.capacity == cache.capacity == (SLOTS if case.fills else None)
    assert hash(case.kind) == hash(case.kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cache.lengths = cache.lengths
    with pytest.raises(dataclasses.FrozenInstanceError):
        cache.layers[0].anything = 1
    assert "float32[" in repr(cache) or "int32[" in repr(cache)


@every_kind
def test_bytes(case, model):
    cache = new_cache(case, model)
    config = model.config
    want = case.nbytes(config.layers, B, config.kv_heads, SLOTS, config.head_dim)
    assert cache.nbytes == want + 5 * B  # and a length and a flag per row


@every_kind
def test_no_buffer_twice(case, model):
    """The same buffer in two leaves cannot be donated."""
    leaves = jax.tree.leaves(new_cache(case, model))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@every_kind
def test_chunks_equal_one_pass(case, model, tokens):
    want = np.asarray(forward(model, np.pad(tokens, ((0, 0), (0, SLOTS - TOTAL)))))
    cache, at = new_cache(case, model), 0
    for size in CHUNKS:
        logits, cache = feed(model, cache, tokens[:, at : at + size], size)
        same(case, logits, want[:, at : at + size])
        at += size
    assert at == TOTAL
    assert (cache.lengths == TOTAL).all()
    assert cache.check() is cache


@every_kind
def test_ragged_rows_are_themselves(case, model, tokens):
    """Rows of different lengths, one of padding only, each as if it were alone."""
    rows = [list(tokens[b, :n]) for b, n in enumerate((9, 4, 1, 7))]
    cache = new_cache(case, model)
    _, cache = feed(model, cache, [*rows[:2], [], *rows[3:]], 9)
    _, cache = feed(model, cache, [[], [], rows[2], []], 1)
    for _ in range(2):
        cache, rows = continues(case, model, cache, rows)
    more = [[1, 2], [3], [], [4, 5, 6, 7, 8]]
    logits, cache = feed(model, cache, more, 5)
    rows = [[*row, *m] for row, m in zip(rows, more, strict=True)]
    last = np.stack([logits[b, max(len(m) - 1, 0)] for b, m in enumerate(more)])
    want = uncached(model, rows)
    for b in (0, 1, 3):  # the third has no new token and so no logits
        same(case, last[b : b + 1], want[b : b + 1])
    continues(case, model, cache, rows)


def kept_bits(before, after, row):
    """Whether nothing of a row is different."""
    shared = zip(jax.tree.leaves(before.shared), jax.tree.leaves(after.shared), strict=True)
    if not all((a[row] == b[row]).all() for a, b in shared):
        return False
    if tables := tables_of(before.shared):
        # What is in its pages.
        at = [np.asarray(table[row]) for table in tables]
        at = [at[layer.group][at[layer.group] >= 0] for layer in before.layers]
    else:
        at = [row] * len(before.layers)
    return all(
        np.array_equal(x[numbers], y[numbers])
        for a, b, numbers in zip(before.layers, after.layers, at, strict=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@layered
def test_padding_is_not_stored(case, model):
    """NaN keys and values on the padding: not in the cache, not in anybody's output."""
    config = model.config
    shape = (B, 5, config.heads, config.head_dim), (B, 5, config.kv_heads, config.head_dim)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=shape[0]), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=shape[1]), jnp.float32) for _ in range(2))
    counts = jnp.array([5, 3, 0, 1])
    real = (jnp.arange(5)[None] < counts[:, None])[..., None, None]
    cache = new_cache(case, model)
    cache = dataclasses.replace(cache, lengths=jnp.array([0, 2, 4, SLOTS - 1]))

    @jax.jit
    def attend(cache, k, v):
        run = cache.begin(jnp.zeros((B, 5), jnp.int32), counts)
        found = [layer.attend(q, k, v, run.step, AttentionSpec(0.3)) for layer in run.layers]
        return run.end(found[0][0].reshape(B, 5, -1), [layer for _, layer in found])

    out, clean = attend(cache, jnp.where(real, k, 0), jnp.where(real, v, 0))
    dirty_out, dirty = attend(cache, jnp.where(real, k, jnp.nan), jnp.where(real, v, jnp.nan))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)
    real = real[..., 0]
    np.testing.assert_array_equal(jnp.where(real, out, 0), jnp.where(real, dirty_out, 0))
    # The row of padding only kept its bits.
    assert kept_bits(cache, clean, 2)
    assert not kept_bits(cache, clean, 0)


@pytest.mark.parametrize("case", [c for c in KINDS if c.fills], ids=lambda c: c.name)
def test_a_full_row_refuses_and_the_others_go_on(case, model, tokens):
    rows = [list(np.resize(tokens[b], n)) for b, n in enumerate((SLOTS - 3, 4, SLOTS - 5, SLOTS))]
    cache = feed_all(model, new_cache(case, model), rows)
    cache.check()
    new = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 1, 2, 3], [4]]
    logits, after = feed(model, cache, new, 5)
    # Five tokens do not fit into three slots, and not three of them either; five into five do.
    assert np.asarray(after.overflowed).tolist() == [True, False, False, True]
    assert np.asarray(after.lengths).tolist() == [SLOTS - 3, 6, SLOTS, SLOTS]
    assert kept_bits(cache, after, 0)
    assert kept_bits(cache, after, 3)
    assert not kept_bits(cache, after, 1)
    whole = [rows[0], [*rows[1], 6, 7], [*rows[2], 8, 9, 1, 2, 3], rows[3]]
    want = uncached(model, whole)
    same(case, logits[1:2, 1], want[1:2])
    same(case, logits[2:3, 4], want[2:3])
    with pytest.raises(CacheFullError, match=r"rows \[0, 3\].*32 slots"):
        after.check()
    # One token would fit, and would not be where it belongs: the row has refused those before it.
    _, later = feed(model, after, [[1], [], [], []], 1)
    assert np.asarray(later.overflowed).tolist() == [True, False, False, True]
    assert int(later.lengths[0]) == SLOTS - 3
    assert kept_bits(cache, later, 0)


@pytest.mark.parametrize("case", [c for c in KINDS if c.fills], ids=lambda c: c.name)
def test_a_row_that_overflowed_goes_on_once_it_is_shorter(case, model, tokens):
    rows = [list(np.resize(tokens[b], SLOTS)) for b in range(B)]
    _, full = feed(model, feed_all(model, new_cache(case, model), rows), [[1], [1], [1], []], 1)
    assert np.asarray(full.overflowed).tolist() == [True, True, True, False]
    kept = full.crop([SLOTS, SLOTS + 1, SLOTS, SLOTS])
    assert np.asarray(kept.overflowed).tolist() == [True, True, True, False]
    shorter = full.crop([SLOTS, 0, SLOTS - 1, SLOTS - 1])
    assert np.asarray(shorter.overflowed).tolist() == [True, False, False, False]
    logits, after = feed(model, shorter, [[1], [2], [3], [4]], 1)
    with pytest.raises(CacheFullError, match=r"rows \[0\]"):
        after.check()
    want = uncached(model, [[0], [2], [*rows[2][:-1], 3], [*rows[3][:-1], 4]])
    same(case, logits[1:, 0], want[1:])


@every_kind
def test_crop_rolls_back(case, model, tokens):
    length = TOTAL if case.rolls_back else 7  # as far as nothing has been overwritten
    old = [list(tokens[b, :length]) for b in range(B)]
    cache = feed_all(model, new_cache(case, model), old)
    keep = [0, 3, length, length - 1]
    rows = [row[:n] for row, n in zip(old, keep, strict=True)]
    cropped = cache.crop(keep)
    after, rows = continues(case, model, cropped, rows)
    # What was rolled back is not seen again when the row grows past it.
    more = [[9, 8, 7, 6, 5]] * B
    _, after = feed(model, after, more, 5)
    continues(case, model, after, [[*row, *m] for row, m in zip(rows, more, strict=True)])
    # The cache that was cropped is a value, and still there.
    continues(case, model, cache, old)
    assert (cache.crop(0).lengths == 0).all()
    assert (cache.crop(length + 5).lengths == length).all()
    for bad, message in ((-1, "negative"), ([1, 2], "shape"), (1.5, "integer")):
        with pytest.raises(ValueError, match=message):
            cache.crop(bad)


@pytest.mark.parametrize("case", [c for c in KINDS if not c.rolls_back], ids=lambda c: c.name)
def test_crop_refuses_what_was_overwritten(case, model, tokens):
    cache = feed_all(model, new_cache(case, model), [list(tokens[b, :9]) for b in range(B)])
    with pytest.raises(UnsupportedError):
        cache.crop(8)
    with pytest.raises(UnsupportedError):
        jax.jit(lambda cache: cache.crop(3))(cache)
    continues(case, model, cache.crop(9), [list(tokens[b, :9]) for b in range(B)])


@every_kind
def test_take_reorders_and_forks(case, model, tokens):
    rows = [list(tokens[b, :n]) for b, n in enumerate((9, 4, 14, 7))]
    cache = feed_all(model, new_cache(case, model), rows)
    order = [2, 0, 0, 3]
    taken = cache.take(order)
    # Two forks of row 0 go their own ways.
    continues(case, model, taken, [rows[r] for r in order])
    assert cache.take(np.array([1])).batch == 1
    for bad in ([4], [-1], [], [[0]], [0.5]):
        with pytest.raises(ValueError, match="take got rows"):
            cache.take(bad)


@every_kind
def test_concat_joins_rows(case, model, tokens):
    rows = [list(tokens[b, :n]) for b, n in enumerate((9, 4, 14, 7))]
    cache = feed_all(model, new_cache(case, model), rows)
    parts = [cache.take([3]), cache.take([0, 1]).resize(SLOTS - 8), cache.take([2])]
    joined = jkv.concat(parts)
    assert joined.capacity == cache.capacity
    continues(case, model, joined, [rows[r] for r in (3, 0, 1, 2)])
    assert jkv.concat([cache]).batch == B


def test_concat_of_other_things(tiny_model):
    caches = {case.name: new_cache(case, tiny_model) for case in KINDS}
    for name, other in caches.items():
        if name != "dense":
            with pytest.raises(ValueError, match="different kinds"):
                jkv.concat([caches["dense"], other])
    # The same shapes do not make the same kind.
    same_shapes = jkv.init_cache(tiny_model.config, jkv.window(SLOTS), batch=B, slots=SLOTS)
    with pytest.raises(ValueError, match="different kinds"):
        jkv.concat([caches["dense"], same_shapes])
    half = jkv.init_cache(tiny_model.config, batch=B, slots=SLOTS, dtype="bfloat16")
    with pytest.raises(ValueError, match="different kinds"):
        jkv.concat([caches["dense"], half])
    with pytest.raises(ValueError, match="at least one"):
        jkv.concat([])
    with pytest.raises(TypeError, match="list of caches"):
        jkv.concat([1])


@every_kind
def test_resize(case, model, tokens):
    rows = [list(tokens[b, :n]) for b, n in enumerate((9, 4, 14, 7))]
    cache = feed_all(model, new_cache(case, model), rows)
    longer = cache.resize(2 * SLOTS)
    assert longer.capacity == (2 * SLOTS if case.fills else None)
    # Back in the size that is compiled: nothing was lost on the way, nor by the tightest fit.
    continues(case, model, longer.resize(SLOTS), rows)
    continues(case, model, cache.resize(14).resize(SLOTS), rows)
    with pytest.raises(CacheFullError, match="14 tokens"):
        cache.resize(13)
    with pytest.raises(ValueError, match="slots=0"):
        cache.resize(0)
    assert jax.eval_shape(lambda cache: cache.resize(40), cache).lengths.shape == (B,)
    if case.fills:
        with pytest.raises(UnsupportedError, match="under jit"):
            jax.eval_shape(lambda cache: cache.resize(SLOTS - 1), cache)


@every_kind
def test_legacy_round_trip(case, model, tokens):
    rows = [list(tokens[b, :n]) for b, n in enumerate((6, 4, 7, 1))]
    cache = feed_all(model, new_cache(case, model), rows)
    if not case.layered:
        with pytest.raises(UnsupportedError):
            cache.to_legacy()
        return
    pairs = cache.to_legacy()
    config = model.config
    assert len(pairs) == config.layers
    assert {x.shape for pair in pairs for x in pair} == {(B, config.kv_heads, 7, config.head_dim)}
    back = jkv.from_legacy(pairs, lengths=[6, 4, 7, 1])
    continues(case, model, back.resize(SLOTS), rows)
    if not case.rolls_back:
        cache = feed_all(model, new_cache(case, model), [list(tokens[b, :9]) for b in range(B)])
        with pytest.raises(UnsupportedError):
            cache.to_legacy()


@every_kind
def test_one_program_for_every_step(case, model, tokens, compiles):
    """The write position is an argument and not baked in; the results, above, say it is right."""
    cache = feed_all(model, new_cache(case, model), [list(row[:9]) for row in tokens])
    _, cache = feed(model, cache, tokens[:, 9:10], 1)
    with compiles:
        for at in range(10, 14):
            _, cache = feed(model, cache, tokens[:, at : at + 1], 1)
        assert compiles.count == 0
    assert (cache.lengths == 14).all()


@every_kind
def test_scan_vmap_and_donation(case, model, tokens):
    """One program that carries the cache through a scan, for a stack of caches, in place."""
    size = 6

    def decode(model, cache, tokens):
        def body(cache, token):
            logits, cache = model(token[:, None], cache)
            return cache, logits[:, 0]

        cache, logits = jax.lax.scan(body, cache, tokens.T)
        return logits.swapaxes(0, 1), cache

    # Two caches of two rows.
    start = new_cache(case, model, batch=B // 2)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), start)
    program = jax.jit(jax.vmap(decode, in_axes=(None, 0, 0)), donate_argnums=1)
    held = jax.tree.leaves(stacked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Some donated buffers were not usable"
        logits, after = program(model, stacked, jnp.asarray(tokens[:, :size].reshape(2, 2, size)))
    assert all(leaf.is_deleted() for leaf in held)
    want = np.asarray(forward(model, np.pad(tokens, ((0, 0), (0, SLOTS - TOTAL)))))
    same(case, logits.reshape(B, size, -1), want[:, :size])
    # Exactly the cache that single steps make.
    flat = jkv.concat([jax.tree.map(lambda leaf, i=i: leaf[i], after) for i in range(2)])
    continues(case, model, flat, [list(row[:size]) for row in tokens])
