"""Each transform against a few lines of numpy, their chain, and the draws."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv import sampling
from jkv.decoding.loop import check_sampler
from tests.decoding import oracle

INF = np.inf
RNG = np.random.default_rng(0)

# Rows that tend to go wrong: ties, everything equal, one token left, very large and very small.
LOGITS = np.stack(
    [
        RNG.normal(size=9),
        RNG.normal(size=9) * 30,
        [1, 3, 3, 3, 2, 2, 0, -1, -1],
        [0] * 9,
        [-INF] * 8 + [0.5],
        [-INF, 2, -INF, 2, 1, -INF, 0, -INF, -3],
        [3e38, -3e38, 0, 1e30, 1, 2, 3, 4, 5],
        [-1e-20, 1e-20, 0, -0.0, 2e-20, 1e-3, 0, 0, 0],
        [88, 89, 90, -88, -89, -90, 0, 1, 2],
    ]
).astype(np.float32)


def apply(transform, logits=LOGITS, said=None, token=None):
    """One update, compiled, after `said`."""
    batch, vocab = logits.shape
    said = np.full((batch, 1), -1, np.int32) if said is None else said
    token = np.full((batch,), -1, np.int32) if token is None else token
    return np.asarray(_apply(transform, logits, said, token, vocab))


@functools.partial(jax.jit, static_argnums=4)
def _apply(transform, logits, said, token, vocab):
    return transform.update(logits, transform.init(said, vocab), token)[0]


def softmax(row):
    row = row.astype(np.float64)
    weights = np.exp(row - row.max())
    return weights / weights.sum()


# Transforms


@pytest.mark.parametrize("value", [0.1, 0.5, 1, 1.7, 100])
def test_temperature(value):
    with np.errstate(over="ignore"):
        want = LOGITS / np.float32(value)
    np.testing.assert_allclose(apply(sampling.temperature(value)), want, rtol=1e-6)


def test_a_temperature_for_each_row():
    values = np.linspace(0.5, 2, 9, dtype=np.float32)[:, None]
    with np.errstate(over="ignore"):
        want = LOGITS / values
    np.testing.assert_allclose(apply(sampling.Temperature(values)), want, rtol=1e-6)


@pytest.mark.parametrize("value", [0, 0.0, 1e-7, 1e-40, np.float32(0), 5e-324])
def test_no_temperature_is_greedy(value):
    assert sampling.temperature(value) == sampling.greedy()


def test_the_least_temperature_still_finds_the_best():
    got = apply(sampling.temperature(1e-6), LOGITS[[0, 1, 5, 8]])
    np.testing.assert_array_equal(got.argmax(axis=1), LOGITS[[0, 1, 5, 8]].argmax(axis=1))
    assert np.isfinite(got.max(axis=1)).all()


def test_greedy_keeps_the_first_of_the_best():
    got = apply(sampling.greedy())
    for row, before in zip(got, LOGITS, strict=True):
        best = int(np.argmax(before))
        assert np.flatnonzero(row > -INF).tolist() == [best]
        assert row[best] == before[best]


def test_the_likeliest_is_what_argmax_says():
    nans = np.array(LOGITS[:3])
    nans[0, [4, 6]], nans[1, 8], nans[2] = np.nan, np.nan, np.nan
    for logits in (LOGITS, nans, np.full((2, 5), -INF, np.float32), np.full((1, 4), INF)):
        got = np.asarray(jax.jit(sampling.likeliest)(jnp.asarray(logits, jnp.float32)))
        np.testing.assert_array_equal(got, np.argmax(logits, axis=1))


@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 10, 1000])
def test_top_k(k):
    got = apply(sampling.top_k(k))
    for row, before in zip(got, LOGITS, strict=True):
        kth = np.sort(before)[::-1][min(k, 9) - 1]
        np.testing.assert_array_equal(row, np.where(before >= kth, before, -INF))
        # Ties with the last one stay; never fewer than k.
        assert (row > -INF).sum() >= min(k, (before > -INF).sum())


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p(p):
    got = apply(sampling.top_p(p))
    for row, before in zip(got, LOGITS, strict=True):
        order = np.argsort(-before, kind="stable")
        weights = softmax(before)[order]
        # The smallest set that reaches p; what equals its last token is in it too.
        count = min(int(np.searchsorted(np.cumsum(weights), p - 1e-6)) + 1, 9)
        least = before[order[count - 1]]
        if p == 1:
            least = -INF
        np.testing.assert_array_equal(row, np.where(before >= least, before, -INF))
        assert row.max() == before.max()


def test_top_p_of_one_is_everything():
    """However many unlikely tokens there are: a sum in float32 is more than 1 before the last."""
    logits = np.concatenate([np.zeros(30000), np.full(30000, -14.0)])[None].astype(np.float32)
    np.testing.assert_array_equal(apply(sampling.top_p(1.0), logits), logits)


@pytest.mark.parametrize("p", [1e-30, 0.1, 0.5, 1.0])
def test_min_p(p):
    got = apply(sampling.min_p(p))
    for row, before in zip(got, LOGITS, strict=True):
        if before.max() > 1e37:
            assert row.max() == before.max()
            continue
        weights = softmax(before)
        kept = weights >= p * weights.max() * (1 - 1e-6)
        np.testing.assert_array_equal(row, np.where(kept, before, -INF))


def penalised(row, said, penalty):
    """transformers' RepetitionPenaltyLogitsProcessor: a score below 0 is multiplied."""
    row = row.astype(np.float32).copy()
    for token in set(said):
        score = row[token]
        row[token] = score * penalty if score < 0 else score / penalty
    return row


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty(penalty):
    rows = [[0, 0, 3, -1], [8, -1, -1, -1], [1, 2, 3, 4], [-1] * 4, [8, 0, 8, 0]]
    said = np.asarray(rows, np.int32)
    token = np.asarray([5, -1, 1, 7, 3], np.int32)
    logits = LOGITS[[0, 1, 2, 5, 8]]
    got = apply(sampling.repetition_penalty(penalty), logits, said, token)
    for row, before, old, new in zip(got, logits, rows, token, strict=True):
        want = penalised(before, [t for t in [*old, new] if t >= 0], np.float32(penalty))
        np.testing.assert_allclose(row, want, rtol=1e-6)


def test_a_penalty_counts_prompt_and_answer(tiny_model):
    """In the loop, cold and resumed, ragged: against a loop over the uncached model."""
    sampler = sampling.chain(sampling.repetition_penalty(3.0), sampling.greedy())
    prompts = [[1], [2, 3, 4, 5, 6], [7, 8, 9]]
    out = jkv.generate(tiny_model, prompts, max_new_tokens=12, sampler=sampler)
    more = jkv.generate(
        tiny_model, [[5], [], [1, 1]], max_new_tokens=8, sampler=sampler, resume=out
    )
    for row, prompt in enumerate(prompts):
        said = list(prompt)
        for new, extra in ((12, [[5], [], [1, 1]][row]), (8, [])):
            for _ in range(new):
                logits = penalised(oracle.logits(tiny_model, said)[-1], said, 3.0)
                said.append(int(np.argmax(logits)))
            said += extra
        assert more.history[row].tolist() == said
    plain = jkv.generate(tiny_model, prompts, max_new_tokens=12)
    assert not np.array_equal(plain.tokens, out.tokens)


@pytest.mark.parametrize(
    "transform",
    [
        sampling.greedy(),
        sampling.temperature(0.7),
        sampling.top_k(3),
        sampling.top_p(0.9),
        sampling.min_p(0.1),
        sampling.repetition_penalty(1.2),
    ],
    ids=lambda t: type(t).__name__,
)
def test_no_transform_makes_a_nan(transform):
    """Also of what another one has already masked."""
    once = apply(transform, LOGITS)
    assert not np.isnan(once).any()
    assert not np.isnan(apply(transform, once)).any()
    masked = np.full((2, 9), -INF, np.float32)
    assert not np.isnan(apply(transform, masked)).any()


# Chains


def test_a_chain_goes_from_left_to_right():
    hot, few = sampling.temperature(0.25), sampling.top_p(0.9)
    first = apply(sampling.chain(hot, few))
    np.testing.assert_array_equal(first, apply(few, apply(hot)))
    second = apply(sampling.chain(few, hot))
    np.testing.assert_array_equal(second, apply(hot, apply(few)))
    assert not np.array_equal(first > -INF, second > -INF)


def test_a_chain_of_nothing_and_a_chain_of_chains():
    np.testing.assert_array_equal(apply(sampling.chain()), LOGITS)
    inner = sampling.chain(sampling.temperature(0.5), sampling.top_k(3))
    flat = sampling.chain(sampling.temperature(0.5), sampling.top_k(3), sampling.min_p(0.1))
    nested = sampling.chain(inner, sampling.min_p(0.1))
    np.testing.assert_array_equal(apply(nested), apply(flat))


@pytest.mark.parametrize(
    ("sampler", "needs"),
    [
        (None, False),
        (sampling.greedy(), False),
        (sampling.temperature(0), False),
        (sampling.temperature(0.5), True),
        (sampling.chain(sampling.top_k(2), sampling.greedy()), False),
        (sampling.chain(sampling.chain(sampling.greedy())), False),
        (sampling.chain(), True),
        (sampling.repetition_penalty(1.1), True),
    ],
    ids=repr,
)
def test_who_needs_a_key(sampler, needs):
    assert sampling.needs_key(sampler) is needs
    if needs:
        with pytest.raises(ValueError, match=r"key=jax\.random\.key"):
            check_sampler(sampler, None, 2)
    else:
        assert check_sampler(sampler, None, 2) is None
    assert (check_sampler(sampler, jax.random.key(0), 2) is not None) is needs


# A transform of one's own


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Alternate:
    """Forbids even tokens at every other step: it has a parameter and a state."""

    weight: float

    def init(self, tokens, vocab):
        del vocab
        return jnp.zeros((tokens.shape[0],), jnp.int32)

    def update(self, logits, state, token):
        del token
        even = (jnp.arange(logits.shape[1]) % 2 == 0)[None, :] & (state % 2 == 0)[:, None]
        return jnp.where(even, logits - self.weight, logits), state + 1


def test_a_transform_of_ones_own(tiny_model):
    prompts = [[1], [2, 3, 4, 5, 6], [7, 8, 9]]
    sampler = sampling.chain(Alternate(1e9), sampling.greedy())
    out = jkv.generate(tiny_model, prompts, max_new_tokens=12, sampler=sampler)
    for row, prompt in enumerate(prompts):
        said = list(prompt)
        for step in range(12):
            logits = oracle.logits(tiny_model, said)[-1]
            logits[::2] -= 1e9 * (step % 2 == 0)
            said.append(int(np.argmax(logits)))
        assert out.history[row].tolist() == said
    assert isinstance(Alternate(1.0), sampling.Transform)


# Draws


def test_draws_follow_the_distribution():
    """Chi-square over 20000 draws in one batch; the bound is passed by chance once in 10^5."""
    logits = np.asarray([[0.0, 1.0, -1.0, 2.0, -INF, 0.5, -3.0]], np.float32)
    count = 20000
    keys = sampling.row_keys(jax.random.key(7), count)
    tokens = np.asarray(
        sampling.draw(jnp.tile(logits, (count, 1)), keys, jnp.full((count,), 3, jnp.int32))
    )
    want = softmax(logits[0]) * count
    got = np.bincount(tokens, minlength=7)
    assert got[4] == 0
    seen = want > 0
    chi = ((got - want)[seen] ** 2 / want[seen]).sum()
    assert chi < 31  # five degrees of freedom
    flat = np.full(seen.sum(), count / seen.sum())
    assert ((got[seen] - flat) ** 2 / flat).sum() > 1000  # and the test can fail


def test_draws_along_a_row_follow_the_distribution():
    """The same row at 20000 positions: folding the position in makes independent draws."""
    logits = np.asarray([[0.0, 1.0, -1.0, 2.0]], np.float32)
    count = 20000
    keys = jnp.broadcast_to(jax.random.key(7), (count,))
    tokens = np.asarray(
        sampling.draw(jnp.tile(logits, (count, 1)), keys, jnp.arange(count, dtype=jnp.int32))
    )
    want = softmax(logits[0]) * count
    assert ((np.bincount(tokens, minlength=4) - want) ** 2 / want).sum() < 26
    # Pairs of neighbours too, or runs would go unseen.
    pairs = np.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16)
    want = np.outer(softmax(logits[0]), softmax(logits[0])).ravel() * (count - 1)
    assert ((pairs - want) ** 2 / want).sum() < 55


def test_the_first_draw_of_generate_follows_the_model(tiny_model):
    """512 rows of one prompt, through the whole loop."""
    rows = 512
    out = jkv.generate(
        tiny_model,
        [[4, 2]] * rows,
        max_new_tokens=1,
        sampler=sampling.chain(),
        key=jax.random.key(11),
    )
    want = softmax(oracle.logits(tiny_model, [4, 2])[-1]) * rows
    got = np.bincount(out.tokens[:, 0], minlength=11)
    # Tokens expected less than five times count as one.
    rare = want < 5
    got = np.append(got[~rare], got[rare].sum())
    want = np.append(want[~rare], max(want[rare].sum(), 1e-9))
    assert len(got) > 2
    assert ((got - want) ** 2 / np.maximum(want, 1)).sum() < 40


PROMPTS = [[1], [2, 3, 4, 5, 6], [7, 8, 9]]
HOT = sampling.temperature(2.0)


def sampled(model, prompts, key, new=12, **kwargs):
    return jkv.generate(
        model, prompts, max_new_tokens=new, sampler=HOT, key=key, **kwargs
    ).tokens.tolist()


def test_seeds(tiny_model):
    first = sampled(tiny_model, PROMPTS, jax.random.key(0))
    assert sampled(tiny_model, PROMPTS, jax.random.key(0)) == first
    assert sampled(tiny_model, PROMPTS, jax.random.key(1)) != first


def test_equal_prompts_are_drawn_apart(tiny_model):
    rows = sampled(tiny_model, [[5, 6]] * 3, jax.random.key(0))
    assert len({tuple(row) for row in rows}) == 3


def test_a_row_does_not_depend_on_its_batch(tiny_model):
    """With a key of its own a row says the same alone, in company and in another place."""
    keys = jax.random.split(jax.random.key(9), 3)
    together = sampled(tiny_model, PROMPTS, keys)
    backwards = sampled(tiny_model, PROMPTS[::-1], keys[::-1])
    assert backwards[::-1] == together
    for row in range(3):
        assert sampled(tiny_model, [PROMPTS[row]], keys[row : row + 1]) == [together[row]]
    others = [[3, 3, 3, 3], PROMPTS[1], [10]]
    assert sampled(tiny_model, others, keys)[1] == together[1]


def test_one_key_is_folded_by_row(tiny_model):
    """So that row 0 says the same in batches of any size."""
    key = jax.random.key(4)
    together = sampled(tiny_model, PROMPTS, key)
    assert sampled(tiny_model, PROMPTS[:1], key) == together[:1]
    folded = jnp.stack([jax.random.fold_in(key, row) for row in range(3)])
    assert sampled(tiny_model, PROMPTS, folded) == together


def test_other_numbers_compile_nothing(tiny_model, compiles):
    def run(heat, p, q, penalty, seed):
        sampler = sampling.chain(
            sampling.repetition_penalty(penalty),
            sampling.temperature(heat),
            sampling.top_p(p),
            sampling.min_p(q),
        )
        return jkv.generate(
            tiny_model, PROMPTS, max_new_tokens=4, sampler=sampler, key=jax.random.key(seed)
        )

    first = run(0.8, 0.9, 0.1, 1.1, 0)
    with compiles:
        run(0.8, 0.9, 0.1, 1.1, 0)
        other = run(2.5, 1, 0.01, 1, 5)
        run(np.float32(1.5), np.float64(0.3), 1, 2, 2**31)
        assert compiles.count == 0
    assert not np.array_equal(first.tokens, other.tokens)


def test_no_key_is_used_twice(tiny_model):
    """JAX's own checker, over the whole of a generation; and it does see what it should."""
    with jax.debug_key_reuse(True):
        key = jax.random.key(0)
        out = sampled(tiny_model, PROMPTS[:2], key, new=5)

        @jax.jit
        def twice(key):
            return jax.random.normal(key) + jax.random.normal(key)

        with pytest.raises(jax.errors.KeyReuseError):
            twice(jax.random.key(0))
    assert out == sampled(tiny_model, PROMPTS[:2], jax.random.key(0), new=5)


def test_numpy_numbers_are_numbers():
    assert sampling.temperature(np.float32(0.5)) == sampling.temperature(0.5)
    assert sampling.top_k(np.int64(3)) == sampling.top_k(3)
    assert sampling.top_p(np.float64(0.5)) == sampling.top_p(0.5)
    assert sampling.min_p(1) == sampling.min_p(1.0)
