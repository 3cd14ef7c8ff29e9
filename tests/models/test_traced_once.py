"""Layers that differ in nothing but numbers are traced once, for all programs of a process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jkv
from jkv._pytree import pytree
from jkv.cache import CacheKind
from jkv.cache.dense import Dense
from jkv.models import Decoder
from jkv.ops import dispatch

CALLS: list[int | None] = []  # the window of each layer that attends


@pytree
class Counted(Dense):
    """Writes down each of its calls in Python, which are those of traces."""

    def attend(self, q, k, v, step, spec):
        CALLS.append(spec.window)
        out, layer = super().attend(q, k, v, step, spec)
        return out, Counted(layer.keys, layer.values)


@dataclasses.dataclass(frozen=True)
class CountedKind(CacheKind):
    def init(self, batch, slots, kv_heads, head_dim, dtype):
        made = jkv.dense().init(batch, slots, kv_heads, head_dim, dtype)
        return Counted(made.keys, made.values)


@pytest.fixture
def calls() -> list[int | None]:
    jax.clear_caches()
    CALLS.clear()
    return CALLS


@pytest.fixture(scope="module")
def make(tiny_config: Any) -> Callable[..., Decoder]:
    def make(*windows: int | None) -> Decoder:
        config = dataclasses.replace(tiny_config, layers=len(windows), windows=windows)
        return jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()

    return make


def begun(model: Decoder) -> jkv.Cache:
    return jkv.init_cache(model.config, CountedKind(), batch=1, slots=8)


TOKENS = jnp.asarray([[1, 2, 3]])


def test_layers_alike_are_traced_once(make, calls):
    model = make(None, None, None)
    want, _ = model(TOKENS, begun(model))
    assert calls == [None, None, None]  # op by op, as it is debugged
    calls.clear()
    got, _ = jax.jit(lambda model, cache: model(TOKENS, cache))(model, begun(model))
    assert calls == [None]
    assert jnp.allclose(got, want, atol=1e-5)
    # Another program with the same passes in it traces them no more.
    jax.eval_shape(lambda model, cache: model(TOKENS + 1, cache)[0].sum(), model, begun(model))
    assert calls == [None]


def test_layers_that_differ_are_traced_each(make, calls):
    model = make(2, None, 2, 4)
    want, _ = model(TOKENS, begun(model))
    calls.clear()
    got, _ = jax.jit(lambda model, cache: model(TOKENS, cache))(model, begun(model))
    assert calls == [2, None, 4]
    assert jnp.allclose(got, want, atol=1e-5)


def test_what_a_choice_depends_on_traces_again(make, calls):
    model = make(None, None)

    def forward() -> list[str]:
        with dispatch.record() as names:
            jax.eval_shape(lambda m, cache: m(TOKENS, cache), model, begun(model))
        return names

    here = forward()
    assert here == forward()  # a record is complete, whatever was traced before it
    assert calls == [None, None]
    with dispatch.target("tpu"):
        jax.eval_shape(lambda m, cache: m(TOKENS, cache), model, begun(model))
    assert calls == [None, None, None]


def test_branches_of_a_training_loop_are_those_of_each_layer(make):
    """And so their blocks are no copies of one."""
    seen: list[int] = []

    def branch(x: jax.Array, index: int) -> jax.Array:
        seen.append(index)
        return x

    jax.eval_shape(lambda model: model(TOKENS, branch=branch), make(None, None))
    assert seen == [0, 1, 2, 3, 4]
