"""The merge of partial results: exact, in any order and grouping, inert where nothing was seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jkv.ops import Partial, merge

B, T, N, H = 2, 3, 2, 4
merge_of = jax.jit(merge)


def partial_of(scores, values):
    """Attention over the slots in the last axis, in float64: out and log-sum-exp."""
    with np.errstate(divide="ignore", invalid="ignore"):
        top = np.max(scores, axis=-1, initial=-np.inf)
        shift = np.where(np.isneginf(top), 0, top)
        weights = np.exp(scores - shift[..., None])
        total = weights.sum(-1)
        out = (
            np.einsum("btns,btnsh->btnh", weights, values)
            / np.where(total == 0, 1, total)[..., None]
        )
        return out, np.where(total == 0, -np.inf, shift + np.log(total))


def draw(seed, sizes, empty=0.3, spread=3.0):
    """Scores and values of each part; some scores are -inf, whole rows among them."""
    rng = np.random.default_rng(seed)
    parts = []
    for size in sizes:
        scores = rng.normal(size=(B, T, N, size)) * spread
        scores[rng.random(scores.shape) < empty] = -np.inf
        scores[rng.random((B, T, N)) < empty] = -np.inf
        parts.append((scores, rng.normal(size=(B, T, N, size, H))))
    return parts


def as_partial(scores, values):
    out, lse = partial_of(scores, values)
    return Partial(out=jnp.asarray(out, jnp.float32), lse=jnp.asarray(lse, jnp.float32))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    # 80 is past float32's exponent: exp(-200) is zero and exp(200) is inf.
    spread=st.sampled_from([0.1, 3.0, 80.0]),
    order=st.permutations(range(3)),
)
def test_merge_equals_the_whole_in_any_order(seed, spread, order):
    parts = draw(seed, (3, 1, 5), spread=spread)
    whole = partial_of(*(np.concatenate(x, axis=3) for x in zip(*parts, strict=True)))
    partials = [as_partial(*parts[i]) for i in order]
    flat = merge_of(*partials)
    grouped = merge_of(merge_of(partials[0], partials[1]), partials[2])
    for got in (flat, grouped):
        np.testing.assert_allclose(got.out, whole[0], atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(got.lse, whole[1], atol=2e-5, rtol=1e-5)


def test_one_part_is_itself():
    part = as_partial(*draw(0, (5,))[0])
    got = merge_of(part)
    np.testing.assert_allclose(got.out, part.out, atol=1e-6)
    np.testing.assert_allclose(got.lse, part.lse, atol=1e-6)


def test_an_empty_part_changes_no_bit():
    part = as_partial(*draw(1, (5,))[0])
    nothing = Partial(out=jnp.zeros_like(part.out), lse=jnp.full_like(part.lse, -jnp.inf))
    alone = merge_of(part)
    for got in (merge_of(part, nothing), merge_of(nothing, part)):
        np.testing.assert_array_equal(got.out, alone.out)
        np.testing.assert_array_equal(got.lse, alone.lse)


def test_rows_that_saw_nothing_anywhere_are_zero():
    nothing = Partial(out=jnp.zeros((B, T, N, H)), lse=jnp.full((B, T, N), -jnp.inf))
    got = merge_of(nothing, nothing)
    assert (got.out == 0).all()
    assert jnp.isneginf(got.lse).all()


def test_no_parts():
    with pytest.raises(ValueError, match="at least one"):
        merge()


def test_gradients_are_finite_where_nothing_was_seen():
    """And equal those of the same sum over all slots at once."""
    parts = draw(3, (3, 4))
    mixing = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, N, H)), jnp.float32)
    scores = [jnp.asarray(s, jnp.float32) for s, _ in parts]
    values = [jnp.asarray(v, jnp.float32) for _, v in parts]
    empty = np.isneginf(np.concatenate([s for s, _ in parts], axis=3)).all(-1)
    assert empty.any()
    assert not empty.all()

    def partial(scores, values):
        seen = ~jnp.isneginf(scores)
        safe = jnp.where(seen, scores, 0.0)
        total = jnp.sum(jnp.where(seen, jnp.exp(safe), 0.0), axis=-1)
        weights = jnp.where(seen, jnp.exp(safe), 0.0)
        some = jnp.where(total == 0, 1.0, total)
        out = jnp.einsum("btns,btnsh->btnh", weights, values) / some[..., None]
        return Partial(out=out, lse=jnp.where(total == 0, -jnp.inf, jnp.log(some)))

    def loss(values, split):
        if split:
            done = [partial(s, v) for s, v in zip(scores, values, strict=True)]
            # Twice, so that the log-sum-exp of the first merge is differentiated as well.
            part = merge(merge(*done), done[0])
        else:
            joined = [*scores, scores[0]], [*values, values[0]]
            part = partial(*(jnp.concatenate(x, axis=3) for x in joined))
        lse = jnp.where(jnp.isneginf(part.lse), 0.0, part.lse)
        return jnp.sum(part.out * mixing) + jnp.sum(lse)

    got, want = (jax.jit(jax.grad(functools.partial(loss, split=s)))(values) for s in (True, False))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)

    parts = [partial(s, v) for s, v in zip(scores, values, strict=True)]
    through = jax.jit(jax.grad(lambda parts: jnp.sum(merge(merge(*parts), parts[0]).out * mixing)))
    for leaf in jax.tree.leaves(through(parts)):
        assert jnp.isfinite(leaf).all()
