"""Keys of every implementation: a row's samples do not depend on the batch, nor on the path."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jkv
from tests.decoding import oracle
from tests.engine.engines import check_empty, make_engine

HOT = jkv.sampling.temperature(3.0)
ROWS = [[1, 2, 3], [4, 5, 6, 7, 8]]
HOW = {"max_new_tokens": 8, "sampler": HOT, "stop": (), "slots": 64}
IMPLEMENTATIONS = ["threefry2x32", "rbg", "unsafe_rbg"]


@pytest.fixture(scope="module")
def engine(tiny_model):
    it = make_engine(oracle.lm(tiny_model), max_batch=2, prefill_rows=1)
    yield it
    check_empty(it)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_row_says_the_same_alone_in_a_batch_and_in_an_engine(tiny_model, engine, impl):
    def key():
        return jax.random.key(7, impl=impl)

    both = oracle.generated(jkv.generate(tiny_model, ROWS, key=key(), **HOW))
    assert both != oracle.generated(jkv.generate(tiny_model, ROWS, key=jax.random.key(8), **HOW))
    (alone,) = oracle.generated(jkv.generate(tiny_model, ROWS[:1], key=key(), **HOW))
    assert alone == both[0]
    # Two rows of one prompt are drawn apart.
    twins = oracle.generated(jkv.generate(tiny_model, [ROWS[0]] * 2, key=key(), **HOW))
    assert twins[0] == both[0] != twins[1]
    keys = jax.random.split(key(), 2)
    given = oracle.generated(jkv.generate(tiny_model, ROWS, key=keys, **HOW))
    (second,) = oracle.generated(jkv.generate(tiny_model, ROWS[1:], key=keys[1:], **HOW))
    assert second == given[1]
    draft = jkv.prompt_lookup(tokens=2)
    assert oracle.generated(jkv.generate(tiny_model, ROWS, key=key(), draft=draft, **HOW)) == both
    request = engine.submit(ROWS[0], max_new_tokens=8, stop=(), sampler=HOT, key=key())
    assert request.result() == both[0]


def test_words_of_a_key_all_count():
    """Keys that differ in any of their bits draw differently."""
    data = np.zeros((5, 4), np.uint32)
    data[1:] = np.eye(4)
    keys = jax.random.wrap_key_data(data, impl="rbg")
    rows = jkv.sampling.row_keys(keys, 5)
    assert len({tuple(row) for row in np.asarray(jax.random.key_data(rows)).tolist()}) == 5
    assert str(jax.random.key_impl(rows)) == "threefry2x32"


def test_an_engine_under_debug_key_reuse(engine, tiny_model):
    (want,) = oracle.generated(jkv.generate(tiny_model, ROWS[:1], key=jax.random.key(1), **HOW))
    with jax.debug_key_reuse(True):
        engine.warm([HOT])
        how = {"max_new_tokens": 8, "stop": (), "sampler": HOT}
        one = engine.submit(ROWS[0], key=jax.random.key(1), **how)
        many = engine.submit(ROWS[1], key=jax.random.key(1), samples=2, **how)
        engine.run()
    assert one.tokens == want
    assert many[0].tokens != many[1].tokens
