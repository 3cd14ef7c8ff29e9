"""A cache that doubles as it fills: the tokens of one that was long enough from the start."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv.decoding import capacity, programs
from jkv.models import Decoder
from tests.decoding import texts

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

LONG = 500  # tokens
SIZES = [128, 256, 512]


@pytest.fixture(scope="module")
def model(tiny_config):
    config = dataclasses.replace(tiny_config, layers=1, context=4096)
    model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    model.embedding[...] = model.embedding[...] * 50
    return model


@pytest.fixture
def grown(monkeypatch):
    """The sizes that caches grow to."""
    sizes = []
    plain = capacity.grow

    def noted(cache, slots):
        sizes.append(slots)
        return plain(cache, slots)

    monkeypatch.setattr(capacity, "grow", noted)
    return sizes


def test_the_tokens_and_the_compilations(model, grown, compiles):
    options: dict[str, Any] = {"max_new_tokens": LONG, "stop": ()}
    prompts = [[1, 2, 3], [4]]
    jkv.generate(model, prompts, max_new_tokens=20, stop=(), cache=jkv.dense(grow=True))
    assert grown == []
    with compiles:
        got = jkv.generate(model, prompts, cache=jkv.dense(grow=True), **options)
        assert grown == SIZES[1:]
        # In the first size a prefill, and in each the decode loop and what moves a layer to it.
        sizes = len(SIZES)
        assert compiles.count <= 3 + sizes + (sizes - 1)
        assert sizes <= math.log2(LONG)
    with compiles:
        jkv.generate(model, prompts, cache=jkv.dense(grow=True), **options)
        assert compiles.count == 0
    want = jkv.generate(model, prompts, cache=jkv.dense(), **options)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.cache.capacity == SIZES[-1]
    assert got.cache.grows
    assert not want.cache.grows


def test_powers_of_two_where_others_take_quarters():
    sizes = {capacity.slots_for(n, jkv.dense(grow=True)) for n in range(1, 10_000)}
    assert sizes == {64 * 2**i for i in range(9)}
    assert len({capacity.slots_for(n, jkv.dense()) for n in range(1, 10_000)}) > len(sizes)
    # Without a cache every slot is computed anew at each step.
    assert capacity.slots_for(1100, jkv.none()) == 1280
    assert capacity.slots_for(1100, jkv.dense(grow=True)) == 2048


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


def test_old_buffers_are_gone_before_new_ones_are_made(tiny_config, monkeypatch):
    config = dataclasses.replace(tiny_config, layers=6)
    cache = jkv.init_cache(config, jkv.dense(grow=True), batch=2, slots=256)
    old, layer = cache.nbytes, cache.layers[0]
    one = sum(leaf.nbytes for leaf in jax.tree.leaves(layer))
    before = live_bytes() - old
    seen = []
    plain = capacity._resize_layer_jit

    def noted(layer, slots):
        longer = plain(layer, slots)
        seen.append(live_bytes() - before)
        return longer

    monkeypatch.setattr(capacity, "_resize_layer_jit", noted)
    longer = capacity.grow(cache, 512)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache.layers))
    # At first the old cache and a layer of the new one; at most the new one and a layer of the old.
    assert seen[0] <= old + 2 * one
    assert max(seen) <= longer.nbytes + one < longer.nbytes + old
    assert len(seen) == 6
    # What grows in one program needs both at once, and is for caches that somebody still holds.
    again = programs.resize_jit(longer, 1024)
    assert live_bytes() - before >= longer.nbytes + again.nbytes
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(longer))


def test_a_conversation_needs_no_maximum(model, grown):
    """Turn after turn, from an earlier turn too: the first result stays what it was."""
    turns = [[[1, 2, 3], [4]], [[5] * 90, [6]], [[], []]]
    said: list[Any] = []
    for prompt in turns:
        how = {"resume": said[-1]} if said else {"cache": jkv.dense(grow=True)}
        said.append(jkv.generate(model, prompt, max_new_tokens=40, stop=(), **how))
    assert [out.cache.capacity for out in said] == [64, 256, 256]
    want = jkv.generate(model, list(said[1].history), max_new_tokens=40, stop=())
    np.testing.assert_array_equal(said[2].tokens, want.tokens)
    again = jkv.generate(model, turns[1], max_new_tokens=40, stop=(), resume=said[0])
    np.testing.assert_array_equal(again.tokens, said[1].tokens)


def test_stream_and_rows_that_end_apart(model, grown):
    options: dict[str, Any] = {"max_new_tokens": 150, "stop": [[1], []]}
    stream = jkv.stream(model, [[2], [3, 4]], cache=jkv.dense(grow=True), **options)
    blocks = [block.tokens for block in stream]
    want = jkv.generate(model, [[2], [3, 4]], max_new_tokens=150, stop=options["stop"])
    np.testing.assert_array_equal(stream.result.tokens, want.tokens)
    assert sum(block.shape[1] for block in blocks) == want.tokens.shape[1]
    assert grown == [128, 256]


def test_chat(tiny_config):
    lm = texts.noise(tiny_config, layers=1)
    chat = jkv.Chat(lm, max_new_tokens=70, cache=jkv.dense(grow=True))
    chat.send("hello")
    asked = [*chat.messages, {"role": "user", "content": "why"}]
    want = jkv.stream(lm, [lm.tokenizer.chat_ids(asked)], max_new_tokens=70)
    assert chat.send("why") == "".join(block.texts[0] for block in want)
    assert chat.reused > 0


def test_slots_that_are_asked_for_stay(model, grown):
    out = jkv.generate(
        model, [[1]], max_new_tokens=100, slots=101, stop=(), cache=jkv.dense(grow=True)
    )
    assert out.cache.capacity == 101
    assert grown == []


def test_arguments():
    assert jkv.dense() == jkv.dense(grow=False) != jkv.dense(grow=True)
    for bad in (1, None, "yes"):
        with pytest.raises(TypeError, match="grow"):
            jkv.dense(grow=bad)
