"""Samples of one prompt are what the prompt given so many times says, from one prefill."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jkv
from jkv.decoding.stream import stream
from tests.decoding import oracle

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

PROMPTS = [[3], [1, 2, 3, 4, 5, 6, 7], [(7 * i + i * i) % 11 for i in range(20)]]
HOT = jkv.sampling.temperature(1.5)
DRAW = {"sampler": HOT, "key": jax.random.key(7), "slots": 64}
COUNT = 2
REPEATED = [prompt for prompt in PROMPTS for _ in range(COUNT)]


@pytest.fixture(params=["dense", "none", "paged"])
def kind(request):
    return {"dense": jkv.dense(), "none": jkv.none(), "paged": jkv.paged(4)}[request.param]


@pytest.fixture(scope="module")
def spy(tiny_model):
    return oracle.Spy(tiny_model)


@pytest.fixture(scope="module")
def repeated(tiny_model):
    return jkv.generate(tiny_model, REPEATED, max_new_tokens=14, return_logprobs=True, **DRAW)


def test_the_same_as_repeated_prompts(tiny_model, repeated, kind):
    out = jkv.generate(
        tiny_model,
        PROMPTS,
        max_new_tokens=14,
        samples=COUNT,
        cache=kind,
        return_logprobs=True,
        **DRAW,
    )
    np.testing.assert_array_equal(out.tokens, repeated.tokens)
    np.testing.assert_allclose(out.logprobs, repeated.logprobs, atol=1e-4)
    rows = out.tokens.reshape(3, COUNT, -1)
    assert all(a.tolist() != b.tolist() for a, b in rows)  # drawn apart
    for got, want in zip(out.history, repeated.history, strict=True):
        np.testing.assert_array_equal(got, want)
    oracle.check_cache(tiny_model, out)


def test_each_sample_alone_with_its_own_key(tiny_model, repeated):
    keys = jax.random.split(jax.random.key(1), 3 * COUNT)
    out = jkv.generate(
        tiny_model, PROMPTS, max_new_tokens=9, samples=COUNT, **(DRAW | {"key": keys})
    )
    for row in (0, 3, 5):
        alone = jkv.generate(
            tiny_model, [REPEATED[row]], max_new_tokens=9, **(DRAW | {"key": keys[row : row + 1]})
        )
        np.testing.assert_array_equal(alone.tokens[0], out.tokens[row])
    assert out.tokens.tolist() != repeated.tokens[:, :9].tolist()
    # One key is one per row of the result, folded with the row's number.
    alone = jkv.generate(
        tiny_model,
        [PROMPTS[2]],
        max_new_tokens=9,
        **(DRAW | {"key": jax.random.fold_in(DRAW["key"], 5)[None]}),
    )
    np.testing.assert_array_equal(alone.tokens[0], repeated.tokens[5, :9])


def test_each_prompt_is_prefilled_once(spy):
    spy.passes()
    jkv.generate(spy, PROMPTS, max_new_tokens=5, samples=COUNT, **DRAW)
    passes = spy.passes()
    prefill = [counts for size, counts in passes if size > 1]
    assert np.sum(prefill, axis=0).tolist() == [len(p) for p in PROMPTS]
    assert [counts for size, counts in passes if size == 1] == [[1] * 3 * COUNT] * 4


def test_stops_are_the_prompts(tiny_model, repeated):
    """One list per prompt; samples of it end apart, by ids and by strings."""
    text = oracle.Letters().decode(repeated.tokens[2, 2:5].tolist())
    stops = [[int(repeated.tokens[0, 4])], [text], []]
    lm = oracle.lm(tiny_model)
    out = jkv.generate(lm, PROMPTS, max_new_tokens=14, samples=COUNT, stop=stops, **DRAW)
    want = jkv.generate(
        lm, REPEATED, max_new_tokens=14, stop=[s for s in stops for _ in range(COUNT)], **DRAW
    )
    np.testing.assert_array_equal(out.tokens, want.tokens)
    assert out.finish_reasons == want.finish_reasons
    assert out.lengths[0] <= 5
    assert len(set(out.lengths.tolist())) > 2
    oracle.check_cache(tiny_model, out)


def test_a_sampler_that_looks_back_sees_each_samples_own_words(tiny_model):
    draw = DRAW | {"sampler": jkv.sampling.chain(jkv.sampling.repetition_penalty(3.0), HOT)}
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=9, samples=COUNT, **draw)
    want = jkv.generate(tiny_model, REPEATED, max_new_tokens=9, **draw)
    np.testing.assert_array_equal(out.tokens, want.tokens)


def test_all_samples_go_on(tiny_model, repeated):
    """A result has a row per sample, and the next turn a prompt for each."""
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=9, samples=COUNT, **DRAW)
    rest = jkv.generate(tiny_model, [[]] * 3 * COUNT, max_new_tokens=5, resume=out, **DRAW)
    joined = np.concatenate([out.tokens, rest.tokens], axis=1)
    np.testing.assert_array_equal(joined, repeated.tokens)
    with pytest.raises(ValueError, match="3 prompts for 6 rows"):
        jkv.generate(tiny_model, [[]] * 3, max_new_tokens=5, resume=out, **DRAW)


def test_samples_of_what_a_result_says_next(spy, tiny_model):
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=9, slots=64)
    turn = [[5], [], [1, 2]]
    spy.passes()
    more = jkv.generate(spy, turn, max_new_tokens=5, resume=out, samples=COUNT, **DRAW)
    prefill = [counts for size, counts in spy.passes() if size > 1]
    assert np.sum(prefill, axis=0).tolist() == [1 + len(t) for t in turn]
    whole = [[*h.tolist(), *t] for h, t in zip(out.history, turn, strict=True)]
    want = jkv.generate(
        tiny_model, [w for w in whole for _ in range(COUNT)], max_new_tokens=5, **DRAW
    )
    np.testing.assert_array_equal(more.tokens, want.tokens)
    oracle.check_cache(tiny_model, more)
    oracle.check_cache(tiny_model, out)


def test_blocks_of_all_samples(tiny_model, repeated):
    got = stream(tiny_model, PROMPTS, max_new_tokens=14, samples=COUNT, block=4, **DRAW)
    blocks = [block.tokens for block in got]
    assert all(len(tokens) == 3 * COUNT for tokens in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), repeated.tokens)


def test_texts_of_all_samples(tiny_config):
    from tests.decoding import texts

    lm = texts.noise(tiny_config, layers=1)
    got = stream(lm, ["he", "w"], max_new_tokens=6, samples=3, sampler=HOT, key=jax.random.key(0))
    pieces = [block.texts for block in got]
    for row in range(6):
        text = lm.tokenizer.decode(got.result.tokens[row])
        assert "".join(p[row] for p in pieces) == text


def test_one_sample_is_a_plain_call(tiny_model):
    plain = jkv.generate(tiny_model, PROMPTS, max_new_tokens=5, slots=64)
    one = jkv.generate(tiny_model, PROMPTS, max_new_tokens=5, slots=64, samples=1)
    np.testing.assert_array_equal(one.tokens, plain.tokens)


def test_other_requests_compile_nothing(tiny_model, compiles):
    rng = np.random.default_rng(0)

    def request(seed):
        prompts = [rng.integers(0, 11, size=n).tolist() for n in rng.integers(1, 17, size=3)]
        jkv.generate(
            tiny_model,
            prompts,
            max_new_tokens=int(rng.integers(2, 9)),
            samples=COUNT,
            sampler=jkv.sampling.temperature(float(rng.uniform(0.5, 2))),
            key=jax.random.key(seed),
            stop=int(rng.integers(11)),
        )

    request(0)
    with compiles:
        for seed in range(1, 9):
            request(seed)
        assert compiles.count == 0
