"""Heads over devices: every kind of cache, generation and the engine on two, as on one."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

import jkv
from jkv._pytree import replace
from jkv.decoding import programs
from jkv.ops import dispatch
from jkv.ops.pages import TpuPages
from tests.conftest import ROOT
from tests.ops.calls import needs

START = """
import warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp, numpy as np
import jkv
from flax import nnx
from jkv.cache import sharding
from jkv.cache.protocol import Step
from jkv.ops import AttentionSpec
from jax.sharding import NamedSharding

assert len(jax.devices()) == 2
mesh = jax.make_mesh((2,), ("heads",))
"""

# Each form in which a kind keeps tokens, one layer of it: a chunk, then a token.
KINDS = """
from jax.sharding import Mesh
from tests.cache.kinds import KINDS

mesh = Mesh(mesh.devices, mesh.axis_names)
config = jkv.Config(
    vocab=32, layers=1, width=32, heads=8, kv_heads=4, head_dim=8, feed_forward=8, context=64,
    rope=jkv.Rope(dims=8),
)
keys = jax.random.split(jax.random.key(0), 3)
arrays = [jax.random.normal(key, (2, 21, n, 8)) for key, n in zip(keys, (8, 4, 4), strict=True)]

def life(arrays, cache, mesh):
    outs = []
    for first, new in ((0, 20), (20, 1)):
        run = cache.begin(jnp.zeros((2, new), jnp.int32))
        q, k, v = (x[:, first : first + new] for x in arrays)
        out, layer = sharding.attend(run.layers[0], mesh, q, k, v, run.step, AttentionSpec(0.4))
        out, cache = run.end(out, [layer])
        outs.append(out)
    return jnp.concatenate(outs, axis=1), cache

run = run_life = jax.jit(life, static_argnums=2)
cases = {case.name: case for case in KINDS}
for name in ("sinks", "int4", "near_far", "sparse", "paged", "paged:int8", "evicting"):
    case = cases[name]
    cache = jkv.init_cache(config, case.kind, batch=2, slots=64)
    want, held = run(arrays, cache, None)
    lowered = run.lower(arrays, cache, mesh)
    got, kept = lowered.compile()(arrays, cache)
    np.testing.assert_allclose(got, want, atol=1e-5, err_msg=case.name)
    jax.tree.map(np.testing.assert_array_equal, kept, held)
    # Each has its own heads, and asks for nothing but whether a flag is raised.
    for leaf in jax.tree.leaves(kept.layers):
        if leaf.ndim > 1:
            assert leaf.sharding.shard_shape(leaf.shape)[1] * 2 == leaf.shape[1], case.name
    flags = sum(leaf.ndim == 1 for leaf in jax.tree.leaves(kept.layers))
    text = lowered.as_text()
    assert text.count("all_reduce") == 2 * flags, (case.name, text.count("all_reduce"))
    for word in ("all_gather", "collective_permute", "all_to_all"):
        assert word not in text, (case.name, word)

# What one device cannot store, all know of.
layer = jkv.quantized(8).init(2, 64, 4, 8, jnp.float32)
step = Step.after(jnp.zeros((2,), jnp.int32), jnp.full((2,), 4, jnp.int32), 4)
q, k, v = (x[:, :4] for x in arrays)
for head in (0, 3):
    bad = k.at[1, 2, head].set(jnp.nan)
    run = jax.jit(lambda *a: sharding.attend(layer, mesh, *a, step, AttentionSpec(0.4))[1])
    after = run(q, bad, v)
    shards = [np.asarray(s.data) for s in after.nonfinite.addressable_shards]
    assert len(shards) == 2 and all((s == [False, True]).all() for s in shards), head

# A kind of a user's own, with an array of rows and slots: of all heads, or refused.
import dataclasses
from jkv.cache import CacheKind, pytree, shard_heads
from jkv.cache.dense import Dense
from jkv.errors import UnsupportedError

@pytree
class Marked(Dense):
    marks: jax.Array = None  # [B, S] float32, with fractions

    def append(self, k, v, step):
        cache = super().append(k, v, step)
        return dataclasses.replace(cache, marks=jnp.maximum(self.marks, step.stop[:, None] + 0.5))

    def partition_spec(self, axis):
        return shard_heads(self, axis, whole=("marks",))

@pytree
class Silent(Marked):
    partition_spec = jkv.LayerCache.partition_spec

@dataclasses.dataclass(frozen=True)
class MarkedKind(CacheKind):
    layer: type = Marked

    def init(self, batch, slots, kv_heads, head_dim, dtype):
        made = jkv.dense().init(batch, slots, kv_heads, head_dim, dtype)
        return self.layer(made.keys, made.values, False, jnp.zeros((batch, slots)))

cache = jkv.init_cache(config, MarkedKind(), batch=2, slots=64)
want, held = run_life(arrays, cache, None)
got, kept = run_life(arrays, cache, mesh)
np.testing.assert_allclose(got, want, atol=1e-5)
jax.tree.map(np.testing.assert_array_equal, kept, held)
marks = kept.layers[0].marks
assert marks.sharding.shard_shape(marks.shape) == (2, 64) and (marks == 21.5).all()
try:
    run_life(arrays, jkv.init_cache(config, MarkedKind(Silent), batch=2, slots=64), mesh)
except UnsupportedError as error:
    assert "Silent does not say which axes" in str(error), error
else:
    raise AssertionError("a kind that says nothing of its axes was sharded")
print("same")
"""

# A model whose vocabulary has no equal parts: generation, and an engine that compiles nothing new.
MODELS = """
from tests.conftest import Compiles

config = jkv.Config(
    vocab=97, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, feed_forward=48, context=64,
    rope=jkv.Rope(dims=8), qkv_bias=True,
)
model = jax.jit(lambda: jkv.Decoder(config, rngs=nnx.Rngs(0)))()
two = jkv.shard(model, mesh)
assert model.mesh is None and two.mesh is not None
assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(model))  # as it was
kernel = two.blocks[0].attention.q.kernel[...]
assert kernel.sharding.shard_shape(kernel.shape) == (16, 32)
assert two.head.kernel[...].sharding.is_fully_replicated  # 97 rows
ids = [[1, 5, 9, 44, 17] * 4, [1, 7, 3]]
want = jkv.generate(model, ids, max_new_tokens=20, return_logprobs=True)
got = jkv.generate(two, ids, max_new_tokens=20, return_logprobs=True)
np.testing.assert_array_equal(got.tokens, want.tokens)
np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
more = jkv.generate(two, [[3], [4]], max_new_tokens=4, resume=got)
np.testing.assert_array_equal(
    more.tokens, jkv.generate(model, [[3], [4]], max_new_tokens=4, resume=want).tokens
)
for how in (
    lambda m: np.concatenate([b.tokens for b in jkv.stream(m, ids, max_new_tokens=20)], axis=1),
    lambda m: jkv.beam_search(m, ids, beams=2, max_new_tokens=4).tokens,
    lambda m: jkv.generate(m, ids, max_new_tokens=20, draft=jkv.prompt_lookup()).tokens,
):
    np.testing.assert_array_equal(how(two), how(model))
held = jax.tree.leaves(got.cache.layers)[0]
assert held.shape[1] == 2 and held.sharding.shard_shape(held.shape)[1] == 1

# A score that compares heads would see half of them.
for score in (jkv.scores.h2o, jkv.scores.tova):
    kind = jkv.evicting(8, score)
    try:
        kept = jkv.generate(two, ids, max_new_tokens=8, cache=kind)
    except jkv.UnsupportedError as error:
        assert score is jkv.scores.tova and "compares all heads" in str(error), error
    else:
        assert score is jkv.scores.h2o
        alone = jkv.generate(model, ids, max_new_tokens=8, cache=kind)
        np.testing.assert_array_equal(kept.tokens, alone.tokens)

hot = jkv.sampling.temperature(0.8)
engine = jkv.Engine(two, pages=14, page=4, max_batch=3)
engine.warm([hot])
# Keys are made with programs of their own.
engine.submit(ids[1], max_new_tokens=2, sampler=hot, key=jax.random.key(3)).result()
with Compiles() as compiles:
    plain = [engine.submit(row, max_new_tokens=20) for row in ids * 2]
    drawn = engine.submit(ids[1], max_new_tokens=20, sampler=hot, key=jax.random.key(3))
    engine.run()
    assert compiles.count == 0
assert engine.stats()["preemptions"] != {"recompute": 0, "swap": 0}
for i, request in enumerate(plain):
    assert request.tokens == want.tokens[i % 2].tolist(), i
alone = jkv.generate(model, ids[1:], max_new_tokens=20, sampler=hot, key=jax.random.key(3))
assert drawn.tokens == alone.tokens[0].tolist()

for devices, match in ((mesh.devices.reshape(2, 1), "axes"), (mesh.devices, "key/value heads")):
    odd = jkv.Config(vocab=9, layers=1, width=12, heads=3, kv_heads=3, head_dim=4, feed_forward=8,
                     context=8, rope=jkv.Rope(dims=4))
    axes = ("a", "b")[: devices.ndim]
    try:
        jkv.shard(jkv.Decoder(odd, rngs=nnx.Rngs(0)), jax.sharding.Mesh(devices, axes))
    except ValueError as error:
        assert match in str(error), error
    else:
        raise AssertionError(match)
print("same")
"""


@pytest.mark.parametrize(
    "program",
    [pytest.param(KINDS, id="kinds", marks=pytest.mark.slow), pytest.param(MODELS, id="models")],
)
def test_two_devices(program):
    """In a process of its own: how many devices a CPU is must be said before JAX begins."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", START + program],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "same\n"


def test_what_is_refused():
    mesh = Mesh(np.array(jax.devices()[:1]), ("heads",))
    with pytest.raises(TypeError, match="got a str; expected what"):
        jkv.shard("model", mesh)
    config = jkv.Config(
        vocab=9, layers=1, width=8, heads=2, kv_heads=2, head_dim=4, feed_forward=8, context=8
    )
    model = jkv.Decoder(config, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="got a int; expected a"):
        jkv.shard(model, 2)
    assert jkv.shard(model, mesh).mesh == mesh  # one device is a mesh too


@needs("mosaic_tpu")
def test_rounded_pages_of_a_tpu_are_not_parted():
    """Scales of all heads lie in one line of those, and a sharded model makes others."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("heads",))
    config = jkv.Config(
        vocab=9, layers=1, width=8, heads=2, kv_heads=2, head_dim=64, feed_forward=8, context=64
    )
    model = jkv.shard(jkv.Decoder(config, rngs=nnx.Rngs(0)), mesh)
    run = jax.jit(lambda cache: model(jnp.array([[1, 2, 3]]), cache)[0])
    kind = jkv.paged(32, bits=8)

    def tiled(cache):
        return isinstance(cache.layers[0].k_pages, TpuPages)

    with dispatch.target("tpu"):
        cache = jkv.init_cache(config, kind, batch=1, slots=64)
        own = jax.eval_shape(lambda: programs.init_cache_jit(config, kind, 1, 64, "float32", mesh))
    assert tiled(cache)
    assert not tiled(own)
    with pytest.raises(jkv.UnsupportedError, match="scales of all heads together"):
        run(cache)
    plain = replace(cache, layers=tuple(layer.portable() for layer in cache.layers))
    here = jkv.init_cache(config, kind, batch=1, slots=64)
    np.testing.assert_allclose(run(plain), run(here))
