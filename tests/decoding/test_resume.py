"""A resumed turn equals the whole conversation decoded at once, and computes only what is new."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import jkv
from tests.decoding import oracle

PROMPTS = [[3], [1, 2, 3, 4, 5, 6, 7], [(7 * i + i * i) % 11 for i in range(20)]]
TURNS = [[[5, 6], [7], []], [[], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 1], [4]]]
HOT = jkv.sampling.temperature(1.5)


@pytest.fixture(params=["dense", "none"])
def kind(request):
    return {"dense": jkv.dense(), "none": jkv.none()}[request.param]


@pytest.fixture(params=["greedy", "sampled"])
def draw(request):
    if request.param == "greedy":
        return {}
    return {"sampler": HOT, "key": jax.random.key(2)}


@pytest.fixture(scope="module")
def spy(tiny_model):
    return oracle.Spy(tiny_model)


def ends_apart(model, kind, draw, new=14):
    """A first turn whose rows end by a stop token, a stop string and at the length."""
    free = jkv.generate(model, PROMPTS, max_new_tokens=new, cache=kind, slots=64, **draw)
    text = oracle.Letters().decode(free.tokens[1, :9].tolist())
    stop = [[int(free.tokens[0, 3])], [text], []]
    out = jkv.generate(
        oracle.lm(model), PROMPTS, max_new_tokens=new, cache=kind, slots=64, stop=stop, **draw
    )
    assert out.finish_reasons == ("stop", "stop", "length")
    assert len(set(out.lengths)) == 3
    return out


def whole(model, histories, new, kind, draw):
    """The conversation so far as one prompt."""
    rows = [row.tolist() for row in histories]
    return oracle.generated(
        jkv.generate(model, rows, max_new_tokens=new, cache=kind, slots=96, stop=(), **draw)
    )


def test_turns_equal_the_conversation_at_once(tiny_model, draw):
    """Rows that ended apart; turns that add nothing, one token, and more than a bucket."""
    out = ends_apart(tiny_model, jkv.dense(), draw)
    for turn in TURNS:
        before = [np.append(h, t).astype(int) for h, t in zip(out.history, turn, strict=True)]
        after = jkv.generate(tiny_model, turn, max_new_tokens=9, resume=out, slots=96, **draw)
        assert oracle.generated(after) == whole(tiny_model, before, 9, jkv.dense(), draw)
        for row, history in enumerate(after.history):
            assert history.tolist() == [*before[row], *after.tokens[row].tolist()]
        oracle.check_cache(tiny_model, after)
        out = after


def test_greedy_turns_equal_the_model_without_a_cache(tiny_model, kind):
    out = ends_apart(tiny_model, kind, {})
    turn = [[5, 6], [7], []]
    after = jkv.generate(tiny_model, turn, max_new_tokens=9, resume=out)
    for row in range(3):
        before = [*out.history[row].tolist(), *turn[row]]
        assert after.tokens[row].tolist() == oracle.greedy(tiny_model, before, 9)


def test_nothing_added_is_one_call_cut_in_two(tiny_model, kind, draw):
    at_once = jkv.generate(tiny_model, PROMPTS, max_new_tokens=23, cache=kind, slots=64, **draw)
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=14, cache=kind, slots=64, **draw)
    rest = jkv.generate(tiny_model, [[], [], []], max_new_tokens=9, resume=out, slots=64, **draw)
    joined = np.concatenate([out.tokens, rest.tokens], axis=1)
    np.testing.assert_array_equal(joined, at_once.tokens)


def test_only_the_waiting_token_and_the_new_ones_are_computed(spy):
    out = ends_apart(spy, jkv.dense(), {})
    spy.passes()
    for turn in TURNS:
        after = jkv.generate(spy, turn, max_new_tokens=9, resume=out, slots=96, stop=())
        passes = spy.passes()
        prefill = [counts for size, counts in passes if size > 1]
        assert np.sum(prefill, axis=0).tolist() == [1 + len(row) for row in turn]
        steps = [counts for size, counts in passes if size == 1]
        assert steps == [[1, 1, 1]] * 8
        out = after
    # The positive twin: the same without `resume` computes all of it.
    cold = [row.tolist() for row in out.history]
    jkv.generate(spy, cold, max_new_tokens=1, slots=96)
    total = np.sum([counts for _, counts in spy.passes()], axis=0).tolist()
    assert total == [len(row) for row in cold]


def test_the_earlier_result_stays_valid(tiny_model, kind):
    """Resumed twice, with the same and with other prompts, in the same buffer and a larger one."""
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=14, cache=kind, slots=64)
    bits = jax.tree.map(np.array, out.cache)
    said, history = out.tokens.copy(), [row.copy() for row in out.history]
    a, b = [[5, 6], [7], []], [[1], [1, 2], [3, 3, 3]]
    for slots in (64, 96):
        first = jkv.generate(tiny_model, a, max_new_tokens=9, resume=out, slots=slots)
        fork = jkv.generate(tiny_model, b, max_new_tokens=9, resume=out, slots=slots)
        again = jkv.generate(tiny_model, a, max_new_tokens=9, resume=out, slots=slots)
        np.testing.assert_array_equal(first.tokens, again.tokens)
        assert oracle.generated(fork) == whole(
            tiny_model,
            [np.append(h, t).astype(int) for h, t in zip(out.history, b, strict=True)],
            9,
            kind,
            {},
        )
        jax.tree.map(np.testing.assert_array_equal, bits, jax.tree.map(np.array, out.cache))
    np.testing.assert_array_equal(out.tokens, said)
    for row, before in zip(out.history, history, strict=True):
        np.testing.assert_array_equal(row, before)
    oracle.check_cache(tiny_model, out)


def test_samples_of_one_conversation(tiny_model):
    """A fork by key: one result, several continuations, each reproducible."""
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=14, slots=64)
    rows = [
        jkv.generate(
            tiny_model,
            [[], [], []],
            max_new_tokens=9,
            resume=out,
            slots=64,
            sampler=HOT,
            key=jax.random.key(seed),
        ).tokens.tolist()
        for seed in (0, 1, 0)
    ]
    assert rows[0] == rows[2]
    assert rows[0] != rows[1]


def test_the_buffer_grows_when_needed(tiny_model, kind):
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=14, cache=kind)
    assert out.cache.capacity == 64
    same = jkv.generate(tiny_model, [[1], [1], [1]], max_new_tokens=4, resume=out)
    assert same.cache.capacity == 64
    more = jkv.generate(tiny_model, [[1], [1], [1]], max_new_tokens=60, resume=out)
    assert more.cache.capacity == 128
    for row in range(3):
        before = [*out.history[row].tolist(), 1]
        assert more.tokens[row].tolist() == oracle.greedy(tiny_model, before, 60)
    oracle.check_cache(tiny_model, more)
    assert out.cache.capacity == 64


def test_many_short_turns(tiny_model):
    """One token at a time, in both directions: the waiting token is never lost nor doubled."""
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=1, slots=64)
    said = [[*p, *t] for p, t in zip(PROMPTS, oracle.generated(out), strict=True)]
    for turn in range(6):
        add = [[turn], [], [turn, turn]]
        out = jkv.generate(tiny_model, add, max_new_tokens=1, resume=out, slots=64)
        for row in range(3):
            said[row] += add[row]
            said[row] += oracle.greedy(tiny_model, said[row], 1)
        assert [row.tolist() for row in out.history] == said
    oracle.check_cache(tiny_model, out)


def test_rows_of_a_result_can_be_chosen(tiny_model):
    """With the cache's own algebra: one row of a result, twice."""
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=14, slots=64)
    rows = [2, 0, 2]
    chosen = dataclasses.replace(
        out, cache=out.cache.take(rows), history=tuple(out.history[r] for r in rows)
    )
    after = jkv.generate(tiny_model, [[5], [6], [7]], max_new_tokens=9, resume=chosen, slots=64)
    for i, row in enumerate(rows):
        before = [*out.history[row].tolist(), 5 + i]
        assert after.tokens[i].tolist() == oracle.greedy(tiny_model, before, 9)


def test_stops_of_the_next_turn_are_its_own(tiny_model):
    """A row that ended by a stop goes on; old stops don't hold, and old text is not searched."""
    lm = oracle.lm(tiny_model)
    out = ends_apart(tiny_model, jkv.dense(), {})
    free = jkv.generate(lm, [[], [], []], max_new_tokens=9, resume=out, slots=96, stop=())
    assert free.finish_reasons == ("length",) * 3
    ids = [int(row[3]) for row in free.tokens]
    after = jkv.generate(
        lm, [[], [], []], max_new_tokens=9, resume=out, slots=96, stop=[[i] for i in ids]
    )
    for row, tokens in enumerate(oracle.generated(after)):
        whole_row = free.tokens[row].tolist()
        assert tokens == whole_row[: whole_row.index(ids[row]) + 1]


def test_a_context_full_of_turns(tiny_model):
    """The last token fits; one more is refused, and the result can still be used."""
    context = tiny_model.config.context
    prompt = [(3 * i * i + i) % 11 for i in range(context - 10)]
    out = jkv.generate(tiny_model, [prompt], max_new_tokens=4)
    with pytest.raises(ValueError, match="context of 256"):
        jkv.generate(tiny_model, [[1]], max_new_tokens=6, resume=out)
    last = jkv.generate(tiny_model, [[1]], max_new_tokens=5, resume=out)
    assert len(last.history[0]) == context


def test_a_conversation_goes_on_from_a_file(tiny_model, kind, draw, tmp_path):
    out = ends_apart(tiny_model, kind, draw)
    out.save(tmp_path / "talk")
    loaded = jkv.load_result(tmp_path / "talk", tiny_model)
    for field in dataclasses.fields(out):
        if field.name not in ("cache", "tokenizer", "weights"):
            got, want = getattr(loaded, field.name), getattr(out, field.name)
            jax.tree.map(np.testing.assert_array_equal, got, want)
    turn = [[5, 6], [7], []]
    want = jkv.generate(tiny_model, turn, max_new_tokens=9, resume=out, slots=96, **draw)
    got = jkv.generate(tiny_model, turn, max_new_tokens=9, resume=loaded, slots=96, **draw)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    # Once loaded, it is a result as any other.
    got.save(tmp_path / "talk")
    again = jkv.load_result(tmp_path / "talk", tiny_model)
    assert again.history[0].tolist() == got.history[0].tolist()


def test_a_file_is_for_the_model_that_made_it(tiny_config, tiny_model, tmp_path):
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=14, slots=64)
    path = tmp_path / "talk"
    out.save(path)
    other = jax.jit(lambda: jkv.Decoder(tiny_config, rngs=nnx.Rngs(1)))()
    with pytest.raises(jkv.StaleError, match="another model, or with other weights"):
        jkv.load_result(path, other)
    with pytest.raises(jkv.StaleError, match="save got a model whose weights are not"):
        out.save(path, other)
    unknown = dataclasses.replace(out, weights=None)  # as one that was pickled
    with pytest.raises(ValueError, match="does not know the model of this result"):
        unknown.save(path)
    unknown.save(path, tiny_model)
    assert jkv.load_result(path, tiny_model).tokens.tolist() == out.tokens.tolist()
    # A cache alone has no tokens to go on from.
    out.cache.save(path, tiny_model)
    with pytest.raises(jkv.CheckpointError, match="holds a cache and no result"):
        jkv.load_result(path, tiny_model)
    with pytest.raises(TypeError, match=r"got Cache; .* load it with jkv\.load_result"):
        jkv.generate(
            tiny_model, [[]] * 3, max_new_tokens=1, resume=jkv.load_cache(path, tiny_model)
        )


def test_a_file_whose_tokens_are_not_its_caches_is_refused(tiny_model, tmp_path):
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=14, slots=64)
    for wrong in (
        {"history": tuple(row[:-1] for row in out.history)},
        {"history": tuple(row + 11 for row in out.history)},
        {"lengths": out.lengths[:2]},
        {"tokens": out.tokens[:2]},
        {"finish_reasons": ("stop",)},
    ):
        dataclasses.replace(out, **wrong).save(tmp_path / "talk")
        with pytest.raises(jkv.CheckpointError, match="holds no result"):
            jkv.load_result(tmp_path / "talk", tiny_model)
