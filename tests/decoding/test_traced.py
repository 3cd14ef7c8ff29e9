"""What works on the host says so inside of a trace, and caches come back from the host."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv.cache import from_legacy
from tests.decoding import oracle
from tests.engine.engines import make_engine

ROWS = [[1, 2, 3], [4, 5, 6]]
HOT = jkv.sampling.temperature(1.5)
TRACED = "traced by jit, vmap or grad.*jkv.prefill and jkv.rollout"


def under_jit(call: Callable[[Any], Any]) -> Any:
    return jax.jit(lambda x: jnp.zeros(()) if call(x) is None else jnp.ones(()))(1.0)


def test_concrete_prompts_inside_a_trace(tiny_model):
    """Nothing that they are given is traced, and yet nothing can be read."""
    lm = oracle.lm(tiny_model)
    for call in (
        lambda x: jkv.generate(tiny_model, ROWS, max_new_tokens=2),
        lambda x: jkv.stream(tiny_model, ROWS, max_new_tokens=2),
        lambda x: jkv.beam_search(tiny_model, ROWS, max_new_tokens=2),
        lambda x: jkv.Engine(lm, pages=8),
        lambda x: jkv.Chat(lm),
    ):
        with pytest.raises(TypeError, match=TRACED):
            under_jit(call)


def test_traced_models_keys_and_parameters(tiny_model):
    with pytest.raises(TypeError, match=f"the model is {TRACED}"):
        jax.grad(lambda m: jkv.generate(m, ROWS, max_new_tokens=2).tokens.sum())(tiny_model)

    def drawn(key: Any, sampler: Any = HOT) -> Any:
        how = {"sampler": sampler, "key": key}
        return jkv.generate(tiny_model, ROWS, max_new_tokens=2, **how).tokens

    with pytest.raises(TypeError, match=f"key is {TRACED}"):
        jax.vmap(drawn)(jax.random.split(jax.random.key(0), 2))
    with pytest.raises(TypeError, match=f"sampler is {TRACED}"):
        jax.vmap(lambda t: drawn(jax.random.key(0), jkv.sampling.Temperature(t)))(jnp.ones(2))


def test_an_engine_refuses_what_is_traced(tiny_model):
    engine = make_engine(oracle.lm(tiny_model))
    with pytest.raises(TypeError, match=f"prompt is {TRACED}"):
        jax.jit(lambda p: engine.submit(p, max_new_tokens=2))(jnp.ones((2,), jnp.int32))
    with pytest.raises(TypeError, match=f"key is {TRACED}"):
        jax.vmap(lambda k: engine.submit([1], max_new_tokens=2, sampler=HOT, key=k))(
            jax.random.split(jax.random.key(0), 2)
        )
    assert not engine.step()


def test_a_check_inside_a_trace(tiny_config):
    cache = jkv.init_cache(tiny_config, batch=1, slots=4)
    with pytest.raises(TypeError, match=r"check is traced by jit.*check it outside"):
        jax.jit(lambda cache: cache.check().lengths)(cache)


@pytest.fixture(scope="module")
def held(tiny_model):
    """Logits and caches after the prompts, by kind, in programs of their own."""

    def prefilled(kind: Any) -> Any:
        @jax.jit
        def program(model):
            cache = jkv.init_cache(model.config, kind, batch=2, slots=16)
            return jkv.prefill(model, jnp.asarray(ROWS), cache)

        return program(tiny_model)

    return prefilled


def test_eager_steps_on_a_cache_that_was_moved_to_the_host(tiny_model, held):
    logits, cache = held(jkv.dense())
    there = jax.device_get(cache)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(there))
    token = np.argmax(logits, axis=-1).astype(np.int32)
    want, _ = jax.jit(jkv.decode_step)(tiny_model, token, cache)
    got, after = jkv.decode_step(tiny_model, token, there)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert after.lengths.tolist() == [4, 4]
    assert there.lengths.tolist() == [3, 3]  # as it was
    assert jax.eval_shape(tiny_model, token[:, None], there)[0].shape == (2, 1, 11)


def test_the_algebra_on_a_cache_that_was_moved_to_the_host(held):
    _, cache = held(jkv.dense())
    there = jax.device_get(cache)
    for change in (
        lambda c: c.crop(1),
        lambda c: c.take([1, 0]),
        lambda c: c.resize(20),
        lambda c: c.check(),
    ):
        for a, b in zip(
            jax.tree.leaves(change(there)), jax.tree.leaves(change(cache)), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_from_legacy_under_jit(held):
    _, cache = held(jkv.dense())
    pairs = cache.to_legacy()
    made_of = jax.jit(lambda pairs, lengths: from_legacy(pairs, lengths).lengths)
    assert made_of(pairs, jnp.asarray([2, 3])).tolist() == [2, 3]
    assert made_of(pairs, jnp.asarray([-1, 9])).tolist() == [0, 3]  # nothing can be raised
    with pytest.raises(ValueError, match=re.escape("lengths float32[2]; expected 2 integers")):
        made_of(pairs, jnp.asarray([2.0, 3.0]))


def test_a_tokenizer_decodes_one_row(tiny_model):
    from tests.decoding.texts import byte_level

    for rows in ([[1, 2], [3]], np.zeros((2, 2), np.int32)):
        with pytest.raises(ValueError, match=r"a row of ids, integers \[T\] \(lm.decode takes"):
            byte_level().decode(rows)
