"""Kinds that evict, as values and in a model."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

import jkv
from jkv import scores
from jkv.cache import Evicting
from jkv.errors import UnsupportedError
from tests.cache.test_evicting import H, K, stored

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX


def test_pyramid():
    kind = jkv.pyramid(100, ratio=3)
    for layers in (1, 2, 5, 12):
        budgets = kind.budgets(layers)
        assert sum(budgets) == 100 * layers
        assert budgets == sorted(budgets, reverse=True)
    assert kind.budgets(2) == [150, 50]
    assert jkv.pyramid(100, ratio=39).budgets(40)[-1] == 5  # the paper's total / (beta * layers)
    assert jkv.pyramid(7, ratio=1).budgets(3) == [7, 7, 7]

    @dataclasses.dataclass
    class Shape:
        layers: int = 3
        kv_heads: int = K
        head_dim: int = H

    cache = jkv.init_cache(Shape(), kind, batch=1, slots=8, dtype="float32")
    assert [layer.keys.shape[2] for layer in cache.layers] == [150, 100, 50]
    assert [layer.recent for layer in cache.layers] == [75, 50, 25]
    with pytest.raises(UnsupportedError, match="init_cache"):
        kind.init(1, 8, K, H, jnp.float32)
    with pytest.raises(ValueError, match="budget of 5"):
        jkv.init_cache(Shape(), jkv.pyramid(100, 39, recent=50), batch=1, slots=8, dtype="float32")


def test_kinds_are_values():
    """The same description is the same program."""
    assert jkv.evicting(8, scores.snapkv(4)) == jkv.evicting(8, scores.snapkv(4))
    assert hash(jkv.evicting([4, 8])) == hash(jkv.evicting((4, 8)))
    assert jkv.evicting(8) != jkv.evicting(8, scores.tova)
    made = jkv.evicting(8, sinks=2).init(1, 99, K, H, jnp.float32)
    assert isinstance(made, Evicting)
    assert (made.capacity, made.retained, made.recent, made.sinks) == (None, 8, 4, 2)
    # What is kept for long is looked at from ever further away; a window is not.
    for kind, want in ((jkv.evicting(8), False), (jkv.evicting(8, scores.recency), True)):
        reach = 8 if want else None
        assert kind.reach(1) == kind.init(1, 9, K, H, jnp.float32).reach(1) == reach
    assert jkv.evicting(8, scores.recency, sinks=1).reach(1) is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jkv.evicting(0), ValueError, "budget=0"),
        (lambda: jkv.evicting(2.5), ValueError, r"budget=2\.5"),
        (lambda: jkv.evicting(True), ValueError, "budget=True"),
        (lambda: jkv.evicting(()), ValueError, "no budgets"),
        (lambda: jkv.evicting((4, 0)), ValueError, "budget=0"),
        (lambda: jkv.evicting(4, recent=0), ValueError, "recent=0"),
        (lambda: jkv.evicting(4, sinks=-1), ValueError, "sinks=-1"),
        (lambda: jkv.evicting(4, recent=3, sinks=2), ValueError, "budget of 4"),
        (lambda: jkv.evicting((4, 9), recent=5), ValueError, "budget of 4"),
        (lambda: jkv.evicting(4, "h2o"), TypeError, "jkv.scores"),
        (lambda: jkv.evicting(4, scores.SnapKV), TypeError, "jkv.scores"),
        (lambda: jkv.evicting((4, 8), scores.tova), ValueError, "same tokens"),
        (lambda: scores.snapkv(0), ValueError, "window=0"),
        (lambda: scores.snapkv(pool=4), ValueError, "pool=4.*odd"),
        (lambda: jkv.pyramid((4, 4)), ValueError, "budget="),
        (lambda: jkv.pyramid(4, ratio=0.5), ValueError, r"ratio=0\.5"),
        (lambda: jkv.evicting((4, 4, 4)).init(1, 9, K, H, jnp.float32), ValueError, "3 budgets"),
        (lambda: stored(jkv.evicting(4, lambda seen: seen.weights), [1] * 3), ValueError, "expect"),
        (lambda: stored(jkv.evicting(4, lambda seen: 1.0), [1] * 3), ValueError, "inputs.previous"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
