"""Drafts: the same tokens in fewer passes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from bench.loops import Case, program
from compile_check import count_copies
from jkv._pytree import nbytes, pytree, static
from jkv.decoding import draft as drafts
from jkv.decoding.stream import stream
from jkv.errors import UnsupportedError
from tests.decoding import oracle, texts

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

# The longest is such that all of this page's caches and histories have 128 slots.
PROMPTS = [[3], [1, 2, 3, 4, 5, 6, 7] * 2, [(7 * i + i * i) % 11 for i in range(69)]]
NEW = 40
LOOKUP = jkv.prompt_lookup(ngram=2, tokens=4)
HOT = jkv.sampling.temperature(1.5)


@pytest.fixture(scope="module")
def spy(tiny_model):
    return oracle.Spy(tiny_model)


@pytest.fixture(scope="module")
def plain(tiny_model):
    return jkv.generate(tiny_model, PROMPTS, max_new_tokens=NEW, stop=(), return_logprobs=True)


@pytree
class Oracle:
    """Knows what will be said: proposes it, with a mistake at every `wrong`-th position."""

    rows: jax.Array  # [B, S], prompts and answers
    wrong: jax.Array
    tokens: int = static()

    def __call__(self, history, lengths):
        at = lengths[:, None] + jnp.arange(self.tokens)[None, :]
        known = jnp.take_along_axis(self.rows, at, axis=1)
        return jnp.where(at % self.wrong == 0, (known + 1) % 11, known)


def foreseen(out, tokens, wrong=10**6):
    rows = np.full((len(out.history), 128), -1, np.int32)
    for row, history in zip(rows, out.history, strict=True):
        row[: len(history)] = history
    return Oracle(jnp.asarray(rows), jnp.asarray(wrong), tokens)


def same(out, want):
    """Everything that a result says, but the number of passes."""
    np.testing.assert_array_equal(out.tokens, want.tokens)
    np.testing.assert_array_equal(out.lengths, want.lengths)
    assert out.finish_reasons == want.finish_reasons
    for got, history in zip(out.history, want.history, strict=True):
        np.testing.assert_array_equal(got, history)
    np.testing.assert_array_equal(out.cache.lengths, want.cache.lengths)
    if want.logprobs is not None:
        np.testing.assert_allclose(out.logprobs, want.logprobs, rtol=1e-3, atol=1e-3)


# What is generated


@pytest.mark.parametrize("kind", [jkv.dense(), jkv.none()], ids=["dense", "none"])
def test_the_same_tokens_in_fewer_passes(tiny_model, plain, kind):
    out = jkv.generate(
        tiny_model,
        PROMPTS,
        max_new_tokens=NEW,
        stop=(),
        draft=LOOKUP,
        cache=kind,
        return_logprobs=True,
    )
    same(out, plain)
    oracle.check_cache(tiny_model, out)
    assert oracle.generated(out) == [oracle.greedy(tiny_model, p, NEW) for p in PROMPTS]
    assert (out.passes < NEW - 1).any()
    assert out.tokens_per_pass == pytest.approx(3 * (NEW - 1) / out.passes.sum())
    assert out.tokens_per_pass > 1.1
    assert plain.passes.tolist() == [NEW - 1] * 3
    assert plain.tokens_per_pass == 1.0


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("wrong", [10**6, 3, 5])
def test_rows_accept_what_is_right(tiny_model, plain, tokens, wrong):
    """Of a draft that knows the answer all is taken, up to where it errs."""
    out = jkv.generate(
        tiny_model,
        PROMPTS,
        max_new_tokens=NEW,
        stop=(),
        draft=foreseen(plain, tokens, wrong),
        return_logprobs=True,
    )
    same(out, plain)
    for prompt, passes in zip(PROMPTS, out.passes, strict=True):
        at, end, count = len(prompt) + 1, len(prompt) + NEW, 0
        while at < end:  # what a pass says: up to the first mistake, or the end
            said = next((n for n in range(1, tokens + 1) if (at + n - 1) % wrong == 0), tokens + 1)
            at, count = at + said, count + 1
        assert count <= passes <= count + 2  # where other rows end a block there may be one more
    if wrong > NEW:
        assert out.tokens_per_pass > 0.8 * (tokens + 1)


def test_a_draft_that_is_always_wrong(tiny_model, plain):
    out = jkv.generate(
        tiny_model, PROMPTS, max_new_tokens=NEW, stop=(), draft=foreseen(plain, 4, 1)
    )
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.passes.tolist() == [NEW - 1] * 3


def nonsense(history, lengths):
    """No tokens at all, and such as there are none."""
    at = lengths[:, None] + jnp.arange(3)[None, :]
    return jnp.where(at % 2 == 0, jnp.asarray([[-7, 11, 2**30]]), jnp.asarray([[4, -1, 3]]))


def nothing(history, lengths):
    return jnp.full((history.shape[0], 2), -1)


@pytest.mark.parametrize("draft", [nonsense, nothing])
def test_a_draft_of_nonsense(tiny_model, plain, draft):
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=NEW, stop=(), draft=draft)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    oracle.check_cache(tiny_model, out)


@pytest.mark.parametrize("new", [1, 2, 5, 33])
def test_never_more_than_asked(spy, tiny_model, plain, new):
    """Nor more computed: the last pass of a row takes no proposal that could not be said."""
    spy.passes()
    out = jkv.generate(
        spy, PROMPTS, max_new_tokens=new, stop=(), draft=foreseen(plain, 4), slots=128
    )
    np.testing.assert_array_equal(out.tokens, plain.tokens[:, :new])
    oracle.check_cache(tiny_model, out)
    fed = np.sum([counts for size, counts in spy.passes() if size == 5] or [[0] * 3], axis=0)
    assert (fed <= new - 1).all()


def test_slots_exactly_as_many_as_needed(tiny_model, plain):
    out = jkv.generate(
        tiny_model, PROMPTS, max_new_tokens=5, stop=(), draft=foreseen(plain, 4), slots=73
    )
    np.testing.assert_array_equal(out.tokens, plain.tokens[:, :5])


def test_a_context_used_to_its_last_token(tiny_model):
    prompt = [1, 2, 3] * 82
    want = jkv.generate(tiny_model, [prompt], max_new_tokens=10, stop=())
    out = jkv.generate(tiny_model, [prompt], max_new_tokens=10, stop=(), draft=LOOKUP)
    same(out, want)
    assert len(out.history[0]) == tiny_model.config.context


def test_tokens_drawn_at_random_are_the_same(tiny_model):
    """Each position has its own key, so that a draft may be right about them too."""
    draw = {"sampler": HOT, "key": jax.random.key(5), "max_new_tokens": NEW, "samples": 2}
    want = jkv.generate(tiny_model, PROMPTS, return_logprobs=True, **draw)
    out = jkv.generate(tiny_model, PROMPTS, draft=foreseen(want, 4), return_logprobs=True, **draw)
    same(out, want)
    assert out.tokens_per_pass > 4


def test_a_chain_of_samplers_for_each_row(tiny_model):
    heat = jkv.sampling.Temperature(jnp.asarray([[0.5], [1.0], [2.0]]))
    draw = {
        "sampler": jkv.sampling.chain(heat, jkv.sampling.top_k(5)),
        "key": jax.random.key(5),
        "max_new_tokens": 12,
    }
    want = jkv.generate(tiny_model, PROMPTS, **draw)
    same(jkv.generate(tiny_model, PROMPTS, draft=LOOKUP, **draw), want)


# Stops, turns and blocks


@pytest.mark.parametrize("at", range(1, 12))
def test_a_stop_among_accepted_tokens(tiny_model, plain, at):
    """At every place of an accepted run; nothing after it is kept, in the cache neither."""
    stops = [[int(row[at])] for row in plain.tokens]
    want = jkv.generate(tiny_model, PROMPTS, max_new_tokens=NEW, stop=stops, slots=128)
    out = jkv.generate(
        tiny_model, PROMPTS, max_new_tokens=NEW, stop=stops, draft=foreseen(plain, 4), slots=128
    )
    same(out, want)
    assert "stop" in out.finish_reasons
    oracle.check_cache(tiny_model, out)


def test_stop_strings(tiny_model, plain):
    lm = oracle.lm(tiny_model)
    strings = [
        [oracle.Letters().decode(row[n : n + 3].tolist())]
        for n, row in zip((3, 11, 20), plain.tokens, strict=True)
    ]
    want = jkv.generate(lm, PROMPTS, max_new_tokens=NEW, stop=strings, return_logprobs=True)
    assert set(want.lengths) != {NEW}
    out = jkv.generate(
        lm,
        PROMPTS,
        max_new_tokens=NEW,
        stop=strings,
        draft=foreseen(plain, 4),
        return_logprobs=True,
    )
    same(out, want)
    oracle.check_cache(tiny_model, out)


def test_turns_after_a_draft(tiny_model, plain):
    """What a draft leaves behind goes on, with a draft and without."""
    stops = [[int(plain.tokens[0, 5])], [], []]
    first = {"max_new_tokens": 14, "stop": stops, "slots": 128}
    turn = [[5, 6], [7], []]
    want = jkv.generate(tiny_model, PROMPTS, **first)
    then = jkv.generate(tiny_model, turn, max_new_tokens=9, resume=want, slots=128)
    out = jkv.generate(tiny_model, PROMPTS, draft=LOOKUP, **first)
    for draft in (None, LOOKUP):
        after = jkv.generate(tiny_model, turn, max_new_tokens=9, resume=out, slots=128, draft=draft)
        same(after, then)
        oracle.check_cache(tiny_model, after)


@pytest.mark.parametrize("block", [1, 3, 16])
def test_blocks_are_ragged_and_join_to_the_whole(tiny_model, plain, block):
    stop = [[], [int(plain.tokens[1, 7])], []]
    want = jkv.generate(tiny_model, PROMPTS, max_new_tokens=NEW, stop=stop, slots=128)
    got = stream(
        tiny_model,
        PROMPTS,
        max_new_tokens=NEW,
        stop=stop,
        slots=128,
        draft=foreseen(plain, 4, 7),
        block=block,
    )
    blocks = list(got)
    same(got.result, want)
    assert max(b.tokens.shape[1] for b in blocks) <= block
    counts = np.asarray([(b.tokens >= 0).sum(axis=1) for b in blocks])
    assert (counts.max(axis=1) > 0).all()
    if block > 1:
        assert any(
            len(set(row[~b.done].tolist())) > 1 for row, b in zip(counts, blocks, strict=True)
        )
    for row in range(3):
        said = [int(t) for b in blocks for t in b.tokens[row] if t >= 0]
        assert said == want.tokens[row, : want.lengths[row]].tolist()
        for b, count in zip(blocks, counts, strict=True):
            assert (b.tokens[row, count[row] :] == -1).all()


def test_texts_of_ragged_blocks(tiny_model, plain):
    lm = SimpleNamespace(model=tiny_model, tokenizer=texts.byte_level())
    got = stream(lm, PROMPTS, max_new_tokens=NEW, stop=(), draft=foreseen(plain, 4, 7), block=16)
    blocks = list(got)
    for row, tokens in enumerate(plain.tokens):
        assert "".join(b.texts[row] for b in blocks) == lm.tokenizer.decode(tokens)


# Which caches, which drafts


@pytest.mark.parametrize("kind", [jkv.window(7), jkv.evicting(20)], ids=["window", "evicting"])
def test_a_cache_that_cannot_be_taken_back_is_refused_before_the_prefill(spy, kind):
    spy.passes()
    with pytest.raises(UnsupportedError, match=r"draft proposes.*crop under jit.*no draft"):
        jkv.generate(spy, PROMPTS, max_new_tokens=5, draft=LOOKUP, cache=kind)
    assert spy.passes() == []


def test_a_rounded_cache_runs(tiny_model):
    """Equal tokens are not promised: a chunk sees itself before it is rounded."""
    out = jkv.generate(
        tiny_model,
        PROMPTS,
        max_new_tokens=12,
        draft=LOOKUP,
        cache=jkv.quantized(bits=8, residual=6),
        stop=(),
    )
    assert out.lengths.tolist() == [12] * 3
    assert out.cache.lengths.tolist() == [len(h) - 1 for h in out.history]


@jax.tree_util.register_pytree_node_class
class Bigram:
    """A draft with weights: the token that follows each token."""

    def __init__(self, table):
        self.table = table

    def tree_flatten(self):
        return (self.table,), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)

    def __call__(self, history, lengths):
        last = jnp.take_along_axis(history, lengths[:, None] - 1, axis=1)
        first = self.table[last]
        return jnp.concatenate([first, self.table[first]], axis=1)


def test_a_draft_of_ones_own_with_weights(tiny_model, plain, compiles):
    tables = [jnp.asarray(np.random.default_rng(s).integers(0, 11, size=11)) for s in (0, 1)]
    asked = {"max_new_tokens": NEW, "stop": ()}
    out = jkv.generate(tiny_model, PROMPTS, draft=Bigram(tables[0]), **asked)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    with compiles:
        out = jkv.generate(tiny_model, PROMPTS, draft=Bigram(tables[1]), **asked)
        assert compiles.count == 0
    np.testing.assert_array_equal(out.tokens, plain.tokens)


def test_other_requests_compile_nothing(tiny_model, compiles):
    rng = np.random.default_rng(0)

    def request(seed):
        prompts = [rng.integers(0, 4, size=n).tolist() for n in rng.integers(1, 17, size=3)]
        asked = {"stop": int(rng.integers(11)), "draft": jkv.prompt_lookup(2, 4)}
        out = jkv.generate(
            tiny_model, prompts, max_new_tokens=int(rng.integers(2, 40)), slots=64, **asked
        )
        jkv.generate(tiny_model, [[1], [], [2, 3]], max_new_tokens=2, resume=out, slots=64, **asked)

    for seed in range(3):
        request(seed)
    with compiles:
        for seed in range(12):
            request(seed)
        assert compiles.count == 0


@pytest.mark.usefixtures("optimised")
def test_no_second_cache():
    """The loop with a draft holds its cache once, as the plain one does.

    A chunk's scores are temporaries, of one layer at a time: with more heads to a group they are
    more, whatever the cache.
    """
    _, (model, state, *_), cache = program(Case(jkv.dense(), 2, 1, slots=4096))
    history = jax.ShapeDtypeStruct((2, 4096), jnp.int32)
    state = jax.eval_shape(drafts.begin_draft, state, history)
    ends = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    how = (jkv.prompt_lookup(), None, None, ends, state.token)
    compiled = drafts.draft_jit.lower(32, model, state, *how).compile()
    biggest = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(cache))
    assert count_copies(compiled.as_text(), biggest) == 0
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * nbytes(cache)


# Trained models


@pytest.fixture(scope="module")
def shakespeare():
    return jkv.load("shakespeare")


def test_a_trained_model_repeats_itself(shakespeare):
    """Real acceptance, in a ragged batch of which some rows go on as they began."""
    lm = shakespeare
    line = "O, she doth teach the torches to burn bright!\n"
    prompts = ["ROMEO:\n" + line * 3, "KING HENRY:\n", "First Citizen:\nWe are", "\n"]
    asked = {"max_new_tokens": 120, "stop": (), "return_logprobs": True}
    want = jkv.generate(lm, prompts, **asked)
    out = jkv.generate(lm, prompts, draft=jkv.prompt_lookup(), **asked)
    same(out, want)
    assert len(set(out.passes.tolist())) > 1
    assert out.tokens_per_pass > 1.5


def test_stories_word_by_word(shared):
    """The tokens that transformers gave, from a model that repeats names and phrases."""
    lm = jkv.load(shared / "models" / "stories260k")
    path = Path(__file__).parents[1] / "golden" / "stories260k.json"
    golden = json.loads(path.read_text())
    ids, tokens = [case["ids"] for case in golden], [case["tokens"] for case in golden]
    new = min(map(len, tokens))
    out = jkv.generate(
        lm.model, ids, max_new_tokens=new, stop=(), draft=jkv.prompt_lookup(), slots=128
    )
    assert oracle.generated(out) == [row[:new] for row in tokens]
    assert out.tokens_per_pass > 1.05
