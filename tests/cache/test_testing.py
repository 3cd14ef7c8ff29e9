"""The check that others run their own caches through: ours pass it, broken ones do not."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import jkv
from jkv._pytree import pytree
from jkv.cache import CacheKind, shard_heads
from jkv.cache.dense import Dense
from jkv.testing import check_kind
from tests.cache.kinds import KINDS

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

CASES = [case for case in KINDS if case.layered and case.recalls]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_kind_passes(case):
    check_kind(
        case.kind,
        sees=case.sees,
        tolerance=1e-4 if case.exact else case.off,
        rolls_back=case.rolls_back,
    )


@dataclasses.dataclass(frozen=True)
class Broken(CacheKind):
    layer: Any

    def init(self, batch, slots, kv_heads, head_dim, dtype):
        made = jkv.dense().init(batch, slots, kv_heads, head_dim, dtype)
        return self.layer(made.keys, made.values)


class Undecorated(Dense):
    """A class of its own that JAX has not been told of."""


@pytree
class Named(Dense):
    """A text among the arrays."""

    name: str = "mine"


@dataclasses.dataclass
class Thawed(CacheKind):
    """A kind that is no value."""

    def init(self, batch, slots, kv_heads, head_dim, dtype):
        return jkv.dense().init(batch, slots, kv_heads, head_dim, dtype)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda: Broken(Undecorated), "a Undecorated is where arrays are expected: decorate its"),
        (lambda: Broken(Named), r"a str is where arrays are expected: .* jkv\.cache\.static"),
        (Thawed, "the kind Thawed is not hashable; make it a frozen dataclass"),
    ],
)
def test_what_is_no_value_is_told(kind, message):
    with pytest.raises(AssertionError, match=message):
        check_kind(kind())


@pytree
class OffByOne(Dense):
    """Each token in the slot after its own."""

    def append(self, k, v, step):
        return OffByOne(
            *vars(
                super().append(
                    k,
                    v,
                    dataclasses.replace(
                        step, positions=jnp.where(step.positions < 0, -1, step.positions + 1)
                    ),
                )
            ).values()
        )


@pytree
class Padded(Dense):
    """Stores padding, at slot 0."""

    def append(self, k, v, step):
        made = super().append(
            k, v, dataclasses.replace(step, positions=jnp.maximum(step.positions, 0))
        )
        return Padded(made.keys, made.values)


@pytree
class Stuck(Dense):
    """Takes rows that it was not asked for."""

    def append(self, k, v, step):
        made = super().append(k, v, step)
        return Stuck(made.keys, made.values)

    def take(self, rows):
        return Stuck(*vars(super().take(jnp.sort(rows))).values())


@pytree
class Silent(Dense):
    """Attends, and appends nothing where it is not to attend as well."""

    def attend(self, q, k, v, step, spec):
        out, made = Dense(self.keys, self.values).attend(q, k, v, step, spec)
        return out, Silent(made.keys, made.values)

    def append(self, k, v, step):
        return self


@pytree
class Endless(Dense):
    """Says that it never runs full."""

    @property
    def capacity(self):
        return None


@pytree
class Boastful(Dense):
    """Says that it has one slot more than there are."""

    @property
    def capacity(self):
        return super().capacity + 1


@pytree
class Whole(Dense):
    """Shards nothing."""

    def partition_spec(self, axis):
        return shard_heads(self, axis, whole=("keys", "values"))


@pytree
class Sliced(Dense):
    """Shards what holds rows."""

    def partition_spec(self, axis):
        return Sliced(PartitionSpec(axis), PartitionSpec(None, axis))


@pytree
class Short(Dense):
    """Gives fewer slots than it has tokens."""

    def to_legacy(self, lengths):
        return self.keys[:, :, :5], self.values[:, :, :5]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (OffByOne, "asked for"),
        (Padded, "off by"),
        (Stuck, "after take"),
        (Silent, "after append"),
        (Endless, "capacity is None, .* and so is retained"),
        (Boastful, "in the last slot"),
        (Whole, "shards no leaf"),
        (Sliced, "shards an axis of 3"),
        (Short, r"to_legacy: keys have the shape \[3, 2, 5, 16\]; expected"),
    ],
)
def test_a_broken_one_does_not(layer, message):
    with pytest.raises(AssertionError, match=message):
        check_kind(Broken(layer))


def test_a_kind_that_does_not_roll_back_refuses():
    with pytest.raises(AssertionError, match="crop shortened rows to half; expected Unsupported"):
        check_kind(jkv.dense(), rolls_back=False)


def test_something_else():
    class Nothing(CacheKind):
        def init(self, batch, slots, kv_heads, head_dim, dtype):
            return jnp.zeros(batch)

    class Duck:
        def init(self, batch, slots, kv_heads, head_dim, dtype):
            return jkv.dense().init(batch, slots, kv_heads, head_dim, dtype)

    with pytest.raises(TypeError, match=r"made a .* for layer 0; expected a jkv.cache.LayerCache"):
        check_kind(Nothing())
    with pytest.raises(TypeError, match=r"check_kind got .*derives from jkv.cache.CacheKind"):
        check_kind(Duck())


def test_no_kind():
    with pytest.raises(TypeError, match="check_kind got None; expected a kind"):
        check_kind(None)


def test_a_window_is_no_dense_cache():
    with pytest.raises(AssertionError, match="should see"):
        check_kind(jkv.dense(), sees=lambda query, position: query - 7 < position <= query)


def test_one_that_rounds_is_told_of_the_tolerance():
    with pytest.raises(AssertionError, match=r"off by .*\. Pass tolerance= for a kind that rounds"):
        check_kind("int8")
