"""Kinds per layer: each layer has its own, and the whole is what its layers are."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv.cache import Dense, Window
from jkv.errors import UnsupportedError
from jkv.models import Decoder
from tests.cache.steps import one_by_one


@pytest.fixture(scope="module")
def config(tiny_config):
    return dataclasses.replace(tiny_config, layers=4, context=64)


def cache_of(config, kind):
    return jkv.init_cache(config, kind, batch=2, slots=32)


def sizes(cache):
    """The window of each layer, None where it is dense."""
    return [layer.ring.size if isinstance(layer, Window) else None for layer in cache.layers]


def test_a_list_names_each_layers_kind(config):
    kind = jkv.per_layer([jkv.dense(), jkv.window(5), jkv.window(9), jkv.dense()])
    assert sizes(cache_of(config, kind)) == [None, 5, 9, None]
    with pytest.raises(ValueError, match="4 kinds for a model of 2 layers"):
        cache_of(dataclasses.replace(config, layers=2), kind)


def test_the_ends_are_exact(config):
    window = jkv.window(5)
    assert sizes(cache_of(config, jkv.per_layer(window))) == [5] * 4
    assert sizes(cache_of(config, jkv.per_layer(window, first=1))) == [None, 5, 5, 5]
    assert sizes(cache_of(config, jkv.per_layer(window, last=1))) == [5, 5, 5, None]
    assert sizes(cache_of(config, jkv.per_layer(window, 1, 2))) == [None, 5, None, None]
    assert sizes(cache_of(config, jkv.per_layer(window, 3, 1))) == [None] * 4
    other = jkv.per_layer(jkv.dense(), first=1, exact=window)
    assert sizes(cache_of(config, other)) == [5, None, None, None]
    with pytest.raises(ValueError, match="first=3 and last=2 for a model of 4 layers"):
        cache_of(config, jkv.per_layer(window, 3, 2))


def test_layers_are_bound_to_the_model(config):
    """A kind within sees the layer that it is for, with its window and its rotation."""
    local = dataclasses.replace(config, windows=(6, None, 6, None))
    kinds = [jkv.window(), jkv.dense(grow=True)] * 2
    assert sizes(cache_of(local, jkv.per_layer(kinds))) == [6, None, 6, None]
    cache = cache_of(config, jkv.per_layer(jkv.window(5, 2), first=1))
    assert cache.layers[1].rope == config.rope
    nested = jkv.per_layer(jkv.per_layer([jkv.window(n) for n in (3, 4, 5, 6)]), first=1)
    assert sizes(cache_of(config, nested)) == [None, 4, 5, 6]


def test_the_tokens_are_those_of_the_layers(config, tiny_config):
    """The same as a model whose layers have those windows; and not that of any other order."""
    config = dataclasses.replace(config, layers=2)
    local = dataclasses.replace(config, windows=(5, None))
    build = jax.jit(lambda config: Decoder(config, rngs=nnx.Rngs(0)), static_argnums=0)
    plain, windowed = build(config), build(local)
    tokens = np.random.default_rng(0).integers(0, 11, (2, 20), np.int32)
    want, _ = jax.jit(lambda model, tokens: model(tokens))(windowed, tokens)

    kinds = [jkv.window(5), jkv.dense()]
    got = one_by_one(plain, cache_of(config, jkv.per_layer(kinds)), tokens)
    np.testing.assert_allclose(got, want, atol=1e-4)
    got = one_by_one(plain, cache_of(config, jkv.per_layer(kinds[::-1])), tokens)
    assert np.abs(got - want).max() > 1e-2


def test_what_the_whole_is(config):
    dense, grows, window = jkv.dense(), jkv.dense(grow=True), jkv.window(5)
    for kinds, grow, endless in (
        ([dense] * 4, False, False),
        ([dense, grows, window, window], True, False),
        ([window, window, window, jkv.window(3)], False, True),
        ([window, window, dense, window], False, False),
    ):
        kind = jkv.per_layer(kinds)
        cache = cache_of(config, kind)
        assert kind.grows == cache.grows == grow
        assert cache.forgets == endless
        assert cache.capacity == (None if endless else 32)
    ends = jkv.per_layer(window, first=1)
    assert not ends.grows
    assert cache_of(config, jkv.per_layer(window)).forgets
    assert not cache_of(config, ends).forgets
    assert jkv.per_layer(window, last=1, exact=grows).grows
    assert not jkv.per_layer(window, exact=grows).grows


def test_convert(config):
    kind = jkv.per_layer(jkv.window(8), first=1)
    cache = cache_of(config, jkv.dense())
    to = cache.convert(kind, config=config)
    assert sizes(to) == [None, 8, 8, 8]
    assert all(isinstance(layer, Dense) for layer in to.convert(jkv.dense()).layers)
    for unbound in (kind, jkv.per_layer([jkv.dense()] * 4)):
        with pytest.raises(UnsupportedError, match="config="):
            cache.convert(unbound)


def test_is_a_value():
    dense, window = jkv.dense(), jkv.window(5)
    assert jkv.per_layer([dense, window]) == jkv.per_layer((dense, window))
    assert hash(jkv.per_layer([dense, window])) == hash(jkv.per_layer((dense, window)))
    kinds = {jkv.per_layer(window, 1), jkv.per_layer(window, 0, 1), jkv.per_layer([window])}
    assert len(kinds) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "no kinds"),
        (([jkv.dense()], 1), ValueError, "one or the other"),
        (([jkv.dense()], 0, 0, jkv.dense()), ValueError, "one or the other"),
        ((jkv.dense(), -1), ValueError, "first=-1"),
        ((jkv.dense(), 0, True), ValueError, "last=True"),
        ((jkv.dense(), 1.0), ValueError, "first=1.0"),
        ((3,), TypeError, "per_layer got 3"),
        (("dens",), ValueError, "did you mean 'dense'"),
        (([jkv.dense],), TypeError, "function dense"),
        (([jkv.none()],), TypeError, "keep keys and values"),
        ((jkv.dense(), 1, 1, 3), TypeError, "got 3"),
        ((jnp.zeros(3),), TypeError, "expected kinds"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        jkv.per_layer(*arguments)
