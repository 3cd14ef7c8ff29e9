"""A kind of a user's own does what jkv's do, or is refused with the reason."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv import ops
from jkv.cache import pytree, replace, shard_heads
from jkv.store.packing import check_kind, pack


@pytree
class OwnLayer(jkv.LayerCache):
    """Every token, newest first: slot 0 is the last that a row of full length has."""

    keys: jax.Array  # [B, K, S, H]
    values: jax.Array  # [B, K, S, H]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def attend(self, q, k, v, step, spec):
        cache = self.append(k, v, step)
        held = self.capacity - 1 - jnp.arange(self.capacity, dtype=jnp.int32)[None]
        held = jnp.where(held < step.stop[:, None], held, -1)
        kv = ops.ContiguousKV(cache.keys, cache.values, slot_positions=held)
        return ops.attention(q, kv, step.positions, spec).out.astype(q.dtype), cache

    def append(self, k, v, step):
        at = jnp.where(step.positions < 0, -1, self.capacity - 1 - step.positions)
        return OwnLayer(ops.write(self.keys, k, at), ops.write(self.values, v, at))

    def take(self, rows):
        return OwnLayer(self.keys[rows], self.values[rows])

    def resize(self, slots):
        change = slots - self.capacity
        if change <= 0:
            return OwnLayer(self.keys[:, :, -change:], self.values[:, :, -change:])
        room = ((0, 0), (0, 0), (change, 0), (0, 0))
        return OwnLayer(jnp.pad(self.keys, room), jnp.pad(self.values, room))

    def crop(self, held, lengths):
        return self

    def concat(self, others):
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), self, *others)

    def to_legacy(self, lengths):
        return self.keys[:, :, ::-1], self.values[:, :, ::-1]

    def partition_spec(self, axis):
        return shard_heads(self, axis)


@dataclasses.dataclass(frozen=True)
class OwnKind(jkv.CacheKind):
    def init(self, batch, slots, kv_heads, head_dim, dtype):
        zeros = jnp.zeros((batch, kv_heads, slots, head_dim), dtype)
        return OwnLayer(zeros, jnp.zeros_like(zeros))


OWN = OwnKind()
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 6)), jnp.int32)


@pytest.fixture(scope="module")
def filled(tiny_config, tiny_model):
    """The logits of a pass, and caches after it: dense, one's own, and both."""

    @jax.jit
    def run(model, caches):
        counts = jnp.asarray([6, 4])
        return {name: model(TOKENS, cache, counts) for name, cache in caches.items()}

    def new(kind):
        return jkv.init_cache(tiny_config, kind, batch=2, slots=16)

    kinds = {"dense": jkv.dense(), "own": OWN, "both": jkv.per_layer([OWN, jkv.window(8)])}
    return run(tiny_model, {name: new(kind) for name, kind in kinds.items()})


@pytest.mark.parametrize("name", ["own", "both"])
def test_alone_and_per_layer(filled, name):
    (want, dense), (got, cache) = filled["dense"], filled[name]
    for row, count in enumerate((6, 4)):
        np.testing.assert_allclose(got[row, :count], want[row, :count], atol=1e-4)
    assert isinstance(cache.layers[0], OwnLayer)
    assert isinstance(cache.layers[1], jkv.cache.Window if name == "both" else OwnLayer)
    assert cache.capacity == 16
    assert cache.lengths.tolist() == dense.lengths.tolist()


def test_convert_to_it_and_back(filled):
    def convert(cache):
        own = cache.convert(OWN)
        return own, own.convert(jkv.dense())

    _, dense = filled["dense"]
    own, back = jax.jit(convert)(dense)
    assert isinstance(own.layers[0], OwnLayer)
    for (keys, values), layer in zip(dense.to_legacy(), own.layers, strict=True):
        assert isinstance(layer, OwnLayer)
        np.testing.assert_array_equal(layer.keys[0, :, -6:][:, ::-1], keys[0])
        np.testing.assert_array_equal(layer.values[1, :, -4:][:, ::-1], values[1, :, :4])
    for got, want in zip(back.layers, dense.layers, strict=True):
        assert isinstance(got, jkv.cache.Dense)
        np.testing.assert_array_equal(got.keys[0, :, :6], want.keys[0, :, :6])


def test_the_algebra(filled):
    _, cache = filled["own"]
    longer = jax.jit(lambda cache: cache.fork(2).crop(3).resize(20))(cache)
    assert (longer.batch, longer.capacity, longer.lengths.tolist()) == (4, 20, [3] * 4)
    joined = jkv.concat([longer, cache])
    assert (joined.batch, joined.capacity) == (6, 20)
    keys = longer.to_legacy()[0][0]
    np.testing.assert_array_equal(keys[0], cache.to_legacy()[0][0][0, :, :3])


def test_plans(tiny_config):
    plan = jkv.plan(tiny_config, seq_len=64, batch=2, cache=OWN)
    assert plan.cache == "OwnKind()"
    cache = jax.eval_shape(lambda: jkv.init_cache(tiny_config, OWN, batch=2, slots=64))
    assert plan.cache_bytes == cache.nbytes


def test_refused_by_the_store_with_the_reason(filled):
    """Another process would not have its class."""
    with pytest.raises(jkv.UnsupportedError, match="expected kinds and scores of jkv"):
        check_kind(OWN)
    with pytest.raises(jkv.UnsupportedError, match="expected kinds and scores of jkv"):
        check_kind(jkv.per_layer([OWN, jkv.dense()]))
    _, cache = filled["own"]
    with pytest.raises(jkv.UnsupportedError, match="expected kinds and scores of jkv"):
        pack(cache.take([0]))


def test_refused_where_it_has_no_meaning(filled):
    _, cache = filled["own"]
    with pytest.raises(jkv.UnsupportedError, match="no layer rounds"):
        cache.requantise("int4")
    with pytest.raises(TypeError, match="expected a kind that rounds"):
        jkv.near_far(far=OWN)
    with pytest.raises(TypeError, match="expected a kind that rounds"):
        jkv.paged(codec=OWN)
    with pytest.raises(TypeError, match=r"requantise got OwnKind\(\)"):
        jkv.cache.Cache.empty([jkv.quantized(8).init(1, 8, 1, 4, "float32")], 1, 8).requantise(OWN)


def test_on_a_mesh(filled):
    """Its arrays lie as `partition_spec` says, which one that does not say is told."""
    from jkv.cache.sharding import partition_specs, shard_layers

    _, cache = filled["own"]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("heads",))
    specs = partition_specs(cache.layers, mesh)
    assert [spec.keys for spec in specs] == [jax.sharding.PartitionSpec(None, "heads")] * 2

    @pytree
    class Silent(OwnLayer):
        def partition_spec(self, axis):
            return jkv.LayerCache.partition_spec(self, axis)

    layer = Silent(*vars(cache.layers[0]).values())
    with pytest.raises(jkv.UnsupportedError, match="Silent does not say which axes"):
        shard_layers((layer,), mesh)
    assert replace(cache, layers=(layer,) * 2).capacity == 16
