"""Windows bound to a model, and in the compiled loop."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compile_check
import jkv
from bench.loops import Case
from jkv.cache import Dense
from jkv.errors import UnsupportedError
from jkv.models import Decoder
from tests.cache.steps import one_by_one
from tests.cache.test_window import ROPES, Shape, made

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX


@pytest.fixture(scope="module")
def local_global(tiny_config):
    """Local and global layers in turn, as in Gemma 2."""
    config = dataclasses.replace(tiny_config, windows=(5, None))
    return jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


def test_the_models_own_windows_are_exact(local_global):
    tokens = np.random.default_rng(0).integers(0, 11, (2, 20), np.int32)
    want, _ = jax.jit(lambda model, tokens: model(tokens))(local_global, tokens)

    cache = jkv.init_cache(local_global.config, jkv.window(), batch=2, slots=32)
    np.testing.assert_allclose(one_by_one(local_global, cache, tokens), want, atol=1e-5)
    local, everywhere = cache.layers
    assert local.ring.size == 5
    assert isinstance(everywhere, Dense)
    assert cache.capacity == 32  # the layer without a window runs full
    assert not cache.forgets


def test_windows_everywhere_forget(local_global, tiny_config):
    def forgets(kind, config):
        return jkv.init_cache(config, kind, batch=1, slots=8).forgets

    every = dataclasses.replace(tiny_config, windows=(5, 9))
    assert forgets(jkv.window(), every)
    assert forgets(jkv.window(4), local_global.config)
    assert not forgets(jkv.window(), local_global.config)
    assert not forgets(jkv.dense(), every)
    cache = jkv.init_cache(every, jkv.window(7), batch=1, slots=1)
    assert [layer.ring.size for layer in cache.layers] == [5, 7]
    assert cache.capacity is None


def test_what_it_cannot_serve_is_refused(tiny_config):
    learned = dataclasses.replace(tiny_config, rope=None)

    def cache(config, kind):
        return jkv.init_cache(config, kind, batch=1, slots=8)

    with pytest.raises(UnsupportedError, match=r"own windows.*give the size"):
        cache(tiny_config, jkv.window())
    for rule in ("cache", "clamped"):
        with pytest.raises(UnsupportedError, match=r"learned.*positions='text'"):
            cache(learned, jkv.window(4, 2, rule))
        with pytest.raises(UnsupportedError, match="init_cache"):
            jkv.window(4, 2, rule).init(1, 8, 2, 8, jnp.float32)
        with pytest.raises(UnsupportedError, match="config="):
            cache(tiny_config, jkv.dense()).convert(jkv.window(4, 2, rule))
        converted = cache(tiny_config, None).convert(jkv.window(4, 2, rule), config=tiny_config)
        assert converted.layers[0].first == 2
    with pytest.raises(UnsupportedError, match="init_cache"):
        jkv.window().init(1, 8, 2, 8, jnp.float32)
    assert cache(learned, jkv.window(4, 2, "text")).layers[0].first == 2
    assert cache(learned, jkv.window(4)).layers[0].ring.size == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "size=0"),
        ((True,), "size=True"),
        ((2.0,), "size=2.0"),
        ((4, -1), "sinks=-1"),
        ((4, None), "sinks=None"),
        ((4, 1, "absolute"), "'absolute'; expected one of 'cache', 'text', 'clamped'"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        jkv.window(*arguments)


def test_is_a_value():
    assert jkv.window(4) == jkv.window(np.int64(4))
    assert hash(jkv.window(4, 2)) == hash(jkv.window(4, sinks=2))
    assert len({jkv.window(4, 2, rule) for rule in ("cache", "text", "clamped")}) == 3
    bound = jkv.window(4, 2).bind(Shape(ROPES["yarn"]), 0)
    assert hash(bound) != hash(jkv.window(4, 2))
    # Another rotation is another kind, also to a compiled program.
    first, second = (made(jkv.window(4, 2), ROPES[r]) for r in ("plain", "yarn"))
    assert jax.tree.structure(first) != jax.tree.structure(second)


# The compiled loop.


@pytest.mark.parametrize(
    ("kind", "batch", "groups"),
    [
        (jkv.window(4096), 1, 1),
        (jkv.window(4096, 4, "cache"), 8, 4),
        (jkv.window(4096, 4, "clamped"), 1, 1),
    ],
    ids=str,
)
def test_the_decode_loop_copies_nothing(kind, batch, groups):
    report = compile_check.measure(Case(kind, batch, groups, slots=4096))
    assert report.free, report


def test_a_chunk_copies_nothing():
    case = Case(jkv.window(4096, 4), 1, 4, new=32, slots=4096)
    assert compile_check.measure(case).copies == 0
