"""`jkv.generate` against a model that has no cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv.errors import CacheFullError
from tests.decoding import oracle

KINDS = {"dense": jkv.dense(), "none": jkv.none()}
# The longest is such that all of this page's caches have 128 slots: few programs to compile.
PROMPTS = [[3], [1, 2, 3, 4, 5, 6, 7], [(7 * i + i * i) % 11 for i in range(69)]]
HOT = jkv.sampling.temperature(1.5)


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def spy(tiny_model):
    return oracle.Spy(tiny_model)


@pytest.fixture(scope="module")
def varied(tiny_model):
    """Random tokens after each prompt: the raw material of the tests of stops."""
    return jkv.generate(tiny_model, PROMPTS, max_new_tokens=58, sampler=HOT, key=jax.random.key(5))


def test_a_ragged_batch_says_what_each_row_says_without_a_cache(tiny_model, kind):
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=20, cache=kind)
    assert oracle.generated(out) == [oracle.greedy(tiny_model, p, 20) for p in PROMPTS]
    assert out.finish_reasons == ("length",) * 3
    assert out.lengths.tolist() == [20, 20, 20]
    assert out.logprobs is None
    for prompt, row, history in zip(PROMPTS, out.tokens, out.history, strict=True):
        assert history.tolist() == [*prompt, *row.tolist()]
    oracle.check_cache(tiny_model, out)


def test_a_row_alone_says_the_same(tiny_model, kind):
    together = oracle.generated(jkv.generate(tiny_model, PROMPTS, max_new_tokens=20, cache=kind))
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = jkv.generate(tiny_model, [prompt], max_new_tokens=20, cache=kind, slots=128)
        assert oracle.generated(alone) == [row]


def test_the_order_of_rows_does_not_matter(tiny_model):
    there = oracle.generated(jkv.generate(tiny_model, PROMPTS, max_new_tokens=20))
    back = oracle.generated(jkv.generate(tiny_model, PROMPTS[::-1], max_new_tokens=20))
    assert back[::-1] == there


@pytest.mark.parametrize("chunk", [16, 33, 100, 256])
def test_the_chunk_of_a_prefill_changes_nothing(tiny_model, spy, chunk):
    prompts = [[(5 * i + i * i) % 11 for i in range(n)] for n in (100, 33, 1)]
    want = [oracle.greedy(tiny_model, p, 4) for p in prompts]
    spy.passes()
    out = jkv.generate(spy, prompts, max_new_tokens=4, prefill_chunk=chunk)
    assert oracle.generated(out) == want
    oracle.check_cache(tiny_model, out)
    prefill = [p for p in spy.passes() if p[0] > 1]
    assert max(size for size, _ in prefill) <= max(chunk, 16)
    np.testing.assert_array_equal(np.sum([counts for _, counts in prefill], axis=0), [100, 33, 1])


def test_chunks_of_a_prefill_without_a_cache(tiny_model):
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=4, prefill_chunk=32, cache=jkv.none())
    assert oracle.generated(out) == [oracle.greedy(tiny_model, p, 4) for p in PROMPTS]


def test_what_keeps_nothing_grows_as_it_goes(tiny_model):
    """From 64 slots for a prompt of one token to what 80 new ones need."""
    out = jkv.generate(tiny_model, [[3]], max_new_tokens=80, cache=jkv.none())
    assert oracle.generated(out) == [oracle.greedy(tiny_model, [3], 80)]
    assert out.cache.capacity == 128
    oracle.check_cache(tiny_model, out)


@pytest.mark.parametrize(
    "form",
    [
        lambda rows: rows,
        lambda rows: tuple(tuple(row) for row in rows),
        lambda rows: np.asarray(rows),
        lambda rows: np.asarray(rows, np.uint8),
        lambda rows: np.asfortranarray(np.asarray(rows, np.int64)),
        lambda rows: jnp.asarray(rows),
        lambda rows: [np.asarray(row, np.int16) for row in rows],
        lambda rows: [jnp.asarray(rows[0]), *rows[1:]],
        lambda rows: [range(1, 4), *rows[1:]],
    ],
    ids=["lists", "tuples", "numpy", "uint8", "fortran", "jax", "rows", "mixed", "range"],
)
def test_prompts_come_in_any_form(tiny_model, form):
    rows = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    want = oracle.generated(jkv.generate(tiny_model, rows, max_new_tokens=5))
    assert oracle.generated(jkv.generate(tiny_model, form(rows), max_new_tokens=5)) == want


def test_texts_go_through_the_tokenizer(tiny_model):
    by_text = jkv.generate(oracle.lm(tiny_model), ["abc", "def", [1]], max_new_tokens=5)
    by_ids = jkv.generate(tiny_model, [[0, 1, 2], [3, 4, 5], [1]], max_new_tokens=5)
    assert oracle.generated(by_text) == oracle.generated(by_ids)


@pytest.mark.parametrize("new", [1, 2, 32, 33, 34, 58])
def test_fewer_tokens_are_a_prefix_of_more(tiny_model, varied, new):
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=new, sampler=HOT, key=jax.random.key(5))
    np.testing.assert_array_equal(out.tokens, varied.tokens[:, :new])
    oracle.check_cache(tiny_model, out)


def test_the_input_is_left_alone(tiny_model):
    prompts = np.asarray([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    before = prompts.copy()
    out = jkv.generate(tiny_model, prompts, max_new_tokens=5)
    np.testing.assert_array_equal(prompts, before)
    out.history[0][:] = 0
    np.testing.assert_array_equal(prompts, before)


# Stops


def cut(tokens, stops):
    """A row's tokens up to the first that is a stop, and why it ended."""
    for n, token in enumerate(tokens, 1):
        if token in stops:
            return tokens[:n], "stop"
    return tokens, "length"


def stopped(model, stop, new=58, **kwargs):
    return jkv.generate(
        model,
        PROMPTS,
        max_new_tokens=new,
        sampler=HOT,
        key=jax.random.key(5),
        stop=stop,
        **kwargs,
    )


def check(model, out, want):
    assert list(zip(oracle.generated(out), out.finish_reasons, strict=True)) == want
    assert out.lengths.tolist() == [len(row) for row, _ in want]
    assert out.tokens.shape == (3, max(out.lengths))
    oracle.check_cache(model, out)


@pytest.mark.parametrize("stop", [*range(11), [2, 7], np.asarray([2, 7]), np.int32(4)], ids=str)
def test_stop_ids_for_all_rows(tiny_model, varied, stop):
    out = stopped(tiny_model, stop)
    ids = set(np.atleast_1d(stop).tolist())
    check(tiny_model, out, [cut(row.tolist(), ids) for row in varied.tokens])


def test_stop_ids_of_each_row(tiny_model, varied):
    stops = [[], [int(varied.tokens[1, 0])], [10, 3]]
    out = stopped(tiny_model, stops)
    want = [cut(row.tolist(), s) for row, s in zip(varied.tokens, stops, strict=True)]
    assert out.lengths[1] == 1
    check(tiny_model, out, want)


def test_stops_come_beside_the_end_of_text_ids(tiny_model, varied):
    """Nothing else switches these off than (), or an empty list of a row."""
    ending = nnx.clone(tiny_model)
    ending.config = dataclasses.replace(tiny_model.config, end_ids=(4, 9))
    rows = [row.tolist() for row in varied.tokens]
    check(tiny_model, stopped(ending, None), [cut(row, {4, 9}) for row in rows])
    check(tiny_model, stopped(ending, ()), [(row, "length") for row in rows])
    check(tiny_model, stopped(ending, []), [(row, "length") for row in rows])
    check(tiny_model, stopped(ending, 2), [cut(row, {2, 4, 9}) for row in rows])
    lm = oracle.lm(ending)
    check(tiny_model, stopped(lm, "no such text"), [cut(row, {4, 9}) for row in rows])
    check(
        tiny_model,
        stopped(lm, [[], [2], ["no such text"]]),
        [(rows[0], "length"), cut(rows[1], {2, 4, 9}), cut(rows[2], {4, 9})],
    )


def test_a_stop_as_the_last_token_is_a_stop(tiny_model, varied):
    row = varied.tokens[0].tolist()
    new = next(n for n in range(5, 58) if row[n] not in row[:n]) + 1
    out = stopped(tiny_model, [[row[new - 1]], [], []], new=new)
    assert out.finish_reasons == ("stop", "length", "length")
    assert out.lengths.tolist() == [new] * 3


def test_a_stop_at_the_first_token_costs_no_pass(spy, tiny_model, varied):
    firsts = [[int(row[0])] for row in varied.tokens]
    spy.passes()
    out = stopped(spy, firsts)
    check(tiny_model, out, [([first[0]], "stop") for first in firsts])
    assert all(size > 1 for size, _ in spy.passes())


def test_the_loop_ends_with_the_last_row(spy, tiny_model, varied):
    rows = [row.tolist() for row in varied.tokens]
    stops = [[row[n]] for row, n in zip(rows, (3, 7, 11), strict=True)]
    want = [cut(row, s) for row, s in zip(rows, stops, strict=True)]
    lengths = [len(row) for row, _ in want]
    assert 1 < max(lengths) <= 12
    spy.passes()
    check(tiny_model, stopped(spy, stops), want)
    steps = [counts for size, counts in spy.passes() if size == 1]
    # A row of n tokens takes n - 1 passes after its prefill, and those only.
    assert len(steps) == max(lengths) - 1
    assert np.sum(steps, axis=0).tolist() == [n - 1 for n in lengths]


def test_a_stop_that_is_never_met(tiny_model, varied):
    rows = [row.tolist() for row in varied.tokens]
    lm = oracle.lm(tiny_model)
    check(tiny_model, stopped(lm, "no such text"), [(row, "length") for row in rows])


def cut_text(tokens, strings):
    """Like `cut`, for texts: a row keeps the tokens that complete the first of them."""
    for n in range(1, len(tokens) + 1):
        text = oracle.Letters().decode(tokens[:n])
        if any(s in text for s in strings):
            return tokens[:n], "stop"
    return tokens, "length"


@pytest.mark.parametrize("start", [0, 1, 5, 29, 30, 31, 32, 33, 34, 54])
@pytest.mark.parametrize("length", [1, 4])
def test_a_stop_string_anywhere(tiny_model, varied, start, length):
    """In the first token, over the ends of tokens, over the end of a block (1 + 32 tokens)."""
    rows = [row.tolist() for row in varied.tokens]
    decode = oracle.Letters().decode
    strings = [decode(row[start : start + length])[:-1] or "a" for row in rows]
    out = stopped(oracle.lm(tiny_model), [[s] for s in strings])
    check(tiny_model, out, [cut_text(r, [s]) for r, s in zip(rows, strings, strict=True)])


def test_long_stop_strings_end_where_they_are_complete(tiny_model, varied):
    rows = [row.tolist() for row in varied.tokens]
    decode = oracle.Letters().decode
    strings = [decode(row[25:41]) for row in rows]
    want = [cut_text(r, [s]) for r, s in zip(rows, strings, strict=True)]
    # Found in the second block; a last token without text is not needed for it.
    assert [len(row) for row, _ in want] == [40 if row[40] == 9 else 41 for row in rows]
    check(tiny_model, stopped(oracle.lm(tiny_model), [[s] for s in strings]), want)


def test_ids_and_strings_together(tiny_model, varied):
    rows = [row.tolist() for row in varied.tokens]
    for stop in (["hi", 4], ["c", "fd", 7], ["ij", "zzz"]):
        ids, strings = (
            {s for s in stop if isinstance(s, int)},
            [s for s in stop if isinstance(s, str)],
        )
        want = []
        for row in rows:
            by_id, by_text = cut(row, ids), cut_text(row, strings)
            want.append(min(by_id, by_text, key=lambda end: len(end[0])))
        check(tiny_model, stopped(oracle.lm(tiny_model), stop), want)


def test_stop_strings_end_the_work_within_a_block(spy, varied):
    rows = [row.tolist() for row in varied.tokens]
    strings = [oracle.Letters().decode(row[:4]) for row in rows]
    spy.passes()
    out = stopped(oracle.lm(spy), [[s] for s in strings])
    assert out.finish_reasons == ("stop",) * 3
    steps = [counts for size, counts in spy.passes() if size == 1]
    assert max(out.lengths) - 1 <= len(steps) <= 57  # one block of 32 read, one under way


def test_a_stop_string_in_the_prompt_is_no_stop_but_one_that_begins_there_is(tiny_model):
    lm = oracle.lm(tiny_model)
    free = jkv.generate(lm, ["abc"], max_new_tokens=5, stop=())
    out = jkv.generate(lm, ["abc"], max_new_tokens=5, stop="abc")
    want = cut_text(free.tokens[0].tolist(), ["abc"])
    assert oracle.generated(out)[0] == want[0]
    assert out.lengths[0] > 1
    # The row's first token with text completes this one, as it does for transformers.
    first = next(n for n, t in enumerate(oracle.generated(free)[0]) if lm.tokenizer.decode([t]))
    letter = lm.tokenizer.decode(free.tokens[0])[0]
    out = jkv.generate(lm, ["abc"], max_new_tokens=5, stop="bc" + letter)
    assert out.finish_reasons == ("stop",)
    assert oracle.generated(out)[0] == oracle.generated(free)[0][: first + 1]


# Log-probabilities


@pytest.mark.parametrize("hot", [False, True])
def test_logprobs_are_those_of_the_model(tiny_model, hot):
    sampler = HOT if hot else None
    key = jax.random.key(1) if hot else None
    out = jkv.generate(
        tiny_model,
        PROMPTS,
        max_new_tokens=40,
        sampler=sampler,
        key=key,
        stop=[[], [6], [10]],
        return_logprobs=True,
    )
    assert out.logprobs.shape == out.tokens.shape
    assert out.logprobs.dtype == np.float32
    assert len(set(out.lengths)) > 1  # some row ended early, or the zeros below are not tested
    for row, length, history in zip(out.logprobs, out.lengths, out.history, strict=True):
        want = oracle.logprobs(tiny_model, history, length)
        np.testing.assert_allclose(row[:length], want, rtol=1e-3, atol=1e-3)
        assert (row[length:] == 0).all()


def test_logprobs_of_a_row_that_met_a_stop_string(tiny_model, varied):
    string = oracle.Letters().decode(varied.tokens[1, 2:6].tolist())
    free = stopped(tiny_model, (), return_logprobs=True)
    out = stopped(oracle.lm(tiny_model), [[], [string], []], return_logprobs=True)
    length = out.lengths[1]
    assert length < 58
    np.testing.assert_array_equal(out.logprobs[1, :length], free.logprobs[1, :length])
    assert (out.logprobs[1, length:] == 0).all()
    assert (free.logprobs[1] < 0).all()


# Room


def test_slots_exactly_as_many_as_needed(tiny_model, kind):
    want = oracle.generated(jkv.generate(tiny_model, PROMPTS, max_new_tokens=5, cache=kind))
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=5, cache=kind, slots=73)
    assert out.cache.capacity == 73
    assert oracle.generated(out) == want
    with pytest.raises(CacheFullError, match="at least 73"):
        jkv.generate(tiny_model, PROMPTS, max_new_tokens=5, cache=kind, slots=72)


def test_a_context_used_to_its_last_token(tiny_model):
    context = tiny_model.config.context
    prompt = [(3 * i * i + i) % 11 for i in range(context - 3)]
    out = jkv.generate(tiny_model, [prompt], max_new_tokens=3)
    assert len(out.history[0]) == context
    with pytest.raises(ValueError, match="context of 256"):
        jkv.generate(tiny_model, [prompt], max_new_tokens=4)


def test_a_row_without_room_is_an_error_at_the_end(tiny_model):
    """What no check beforehand can foresee: a cache whose flag is up."""
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=5)
    flag = jnp.asarray([False, True, False])
    full = dataclasses.replace(out, cache=dataclasses.replace(out.cache, overflowed=flag))
    with pytest.raises(CacheFullError, match=r"rows \[1\]"):
        jkv.generate(tiny_model, [[1], [1], [1]], max_new_tokens=5, resume=full)
    jkv.generate(tiny_model, [[1], [1], [1]], max_new_tokens=5, resume=out)


def test_progress_counts_the_longest_prompt(tiny_model):
    seen = []
    prompts = [[(5 * i + i * i) % 11 for i in range(n)] for n in (100, 33, 1)]
    jkv.generate(
        tiny_model,
        prompts,
        max_new_tokens=4,
        prefill_chunk=32,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(32, 100), (64, 100), (96, 100), (100, 100)]


def test_a_progress_that_raises_stops_the_work_and_harms_nothing(tiny_model):
    first = jkv.generate(tiny_model, PROMPTS, max_new_tokens=5)

    def angry(done, total):
        raise KeyboardInterrupt

    again = [[1], [2], [3]]
    want = oracle.generated(jkv.generate(tiny_model, again, max_new_tokens=5, resume=first))
    with pytest.raises(KeyboardInterrupt):
        jkv.generate(tiny_model, again, max_new_tokens=5, resume=first, progress=angry)
    assert oracle.generated(jkv.generate(tiny_model, again, max_new_tokens=5, resume=first)) == want


def test_seconds_are_counted(tiny_model):
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=20)
    assert out.prefill_seconds > 0
    assert out.decode_seconds > 0
    one = jkv.generate(tiny_model, PROMPTS, max_new_tokens=1)
    assert one.decode_seconds == 0


def test_a_result_prints_shapes(tiny_model):
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=5)
    assert repr(out) == (
        "Result(tokens=int32[3, 5], lengths=[5, 5, 5], "
        "finish_reasons=('length', 'length', 'length'))"
    )


def test_a_model_in_bfloat16(tiny_config):
    config = dataclasses.replace(tiny_config, dtype="bfloat16")
    model = jkv.Decoder(config, rngs=nnx.Rngs(0))
    out = jkv.generate(model, PROMPTS, max_new_tokens=20)
    assert out.cache.layers[0].keys.dtype == jnp.bfloat16
    assert out.tokens.shape == (3, 20)
    assert (out.tokens >= 0).all()
