"""Weights that were changed in place: what was cached of the old ones is never gone on from."""

from __future__ import annotations

import copy

import jax
import pytest

import jkv
from jkv.errors import StaleError
from jkv.models.weights import is_current, weights_of
from jkv.store import Memory, Store
from tests.decoding import oracle

HOW = {"max_new_tokens": 4, "slots": 64, "stop": ()}


@pytest.fixture
def model(tiny_model):
    """One of the test's own, to be changed."""
    leaves, tree = jax.tree.flatten(tiny_model)
    return jax.tree.unflatten(tree, list(leaves))


def train(model):
    model.embedding[...] = model.embedding[...][::-1] * 1.5


def test_a_result_of_other_weights_is_not_resumed(model):
    first = jkv.generate(model, [[1, 2, 3]], **HOW)
    again = jkv.generate(model, [[4]], resume=first, **HOW)
    copied = copy.deepcopy(first)
    train(model)
    for resumed in (jkv.generate, jkv.stream, jkv.beam_search):
        how = HOW if resumed is not jkv.beam_search else HOW | {"beams": 2}
        with pytest.raises(StaleError, match="other weights than the model has now"):
            resumed(model, [[4]], resume=first, **how)
    assert copied.weights is None
    fresh = jkv.generate(model, [[1, 2, 3]], **HOW)
    assert oracle.generated(fresh) == [oracle.greedy(model, [1, 2, 3], 4)]
    assert oracle.generated(fresh) != oracle.generated(first)
    assert jkv.generate(model, [[4]], resume=fresh, **HOW).lengths.tolist() == [4]
    assert again.lengths.tolist() == [4]


def test_equal_weights_in_other_arrays_are_the_same(model):
    first = jkv.generate(model, [[1, 2, 3]], **HOW)
    leaves, tree = jax.tree.flatten(model)
    other = jax.tree.unflatten(tree, [jax.numpy.copy(leaf) for leaf in leaves])
    want = oracle.generated(jkv.generate(model, [[4]], resume=first, **HOW))
    assert oracle.generated(jkv.generate(other, [[4]], resume=first, **HOW)) == want
    train(other)
    assert not is_current(first.weights, other)
    # A sharded copy is known to be one after the original is gone.
    mesh = jax.make_mesh((1,), ("heads",))
    sharded = jkv.shard(model, mesh)
    assert is_current(first.weights, sharded)
    assert weights_of(sharded) is first.weights


def test_weights_of_numpy_count_too(model):
    moved = jax.device_get(model)
    first = jkv.generate(moved, [[1, 2, 3]], **HOW)
    assert jkv.generate(moved, [[4]], resume=first, **HOW).lengths.tolist() == [4]
    leaves, tree = jax.tree.flatten(moved)
    assert is_current(first.weights, jax.tree.unflatten(tree, [leaf.copy() for leaf in leaves]))
    other = jax.tree.unflatten(tree, [leaf * 1.5 for leaf in leaves])
    with pytest.raises(StaleError, match="other weights than the model has now"):
        jkv.generate(other, [[4]], resume=first, **HOW)


def test_a_stream_ends_where_its_weights_were_changed(model):
    stream = jkv.stream(model, [[1, 2, 3]], block=2, **HOW)
    next(stream)
    train(model)
    with pytest.raises(StaleError, match="while this generation was under way"):
        next(stream)


def test_a_store_has_nothing_of_the_old_weights(model):
    prompt = list(range(10))
    with Store(tiers=[Memory(1 << 24)]) as store:
        how = {"store": store, "sequence_ids": ["a"], **HOW}
        jkv.generate(model, [prompt], **how)
        assert jkv.generate(model, [prompt], **how).reused.tolist() == [9]
        train(model)
        out = jkv.generate(model, [prompt], **how)
        assert out.reused.tolist() == [0]
        assert oracle.generated(out) == [oracle.greedy(model, prompt, 4)]


def test_an_engine_takes_new_weights_when_it_is_told(model):
    engine = jkv.Engine(model, pages=32, page=4, max_batch=2)
    prompt = list(range(9))
    how = {"max_new_tokens": 6, "stop": ()}
    assert engine.submit(prompt, **how).result() == oracle.greedy(model, prompt, 6)
    running = engine.submit(prompt, max_new_tokens=12, stop=())
    while len(running.tokens) < 3:
        engine.step()
    old = list(running.tokens)
    train(model)
    with pytest.raises(StaleError, match=r"engine\.update\(lm\)"):
        engine.submit(prompt, **how)
    engine.update(model)
    request = engine.submit(prompt, **how)
    engine.run()
    assert request.tokens == oracle.greedy(model, prompt, 6)
    kept = [t for t, o in zip(running.tokens, old, strict=False) if t == o]
    assert kept == old
    done = len(old)
    more = oracle.greedy(model, prompt + running.tokens[:done], 12 - done)
    assert running.tokens[done:] == more
    with pytest.raises(ValueError, match="another model"):
        engine.update(jkv.load("shakespeare"))


def test_a_conversation_is_read_anew(model):
    class Words(oracle.Letters):
        def decode(self, tokens):
            return super().decode([t % 11 for t in tokens])

        def without_special(self, text):
            return text

        def template_source(self, template, *, tools):
            return "{{ messages }}"

        def chat_ids(self, messages, add_generation_prompt=True, template=None, tools=None):
            return [*(ord(c) % 8 for m in messages for c in m["content"]), 8]

    class LM:
        pass

    lm = LM()
    lm.model, lm.tokenizer, lm.config = model, Words(), model.config
    chat = jkv.Chat(lm, max_new_tokens=3, stop=())
    chat.send("abc")
    chat.send("de")
    assert chat.reused > 0
    train(model)
    chat.send("f")
    assert chat.reused == 0
