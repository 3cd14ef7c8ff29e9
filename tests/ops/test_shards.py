"""Key/value heads on devices of their own: every layer's cache under `jax.shard_map`, no change."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = """
import functools
import jax, jax.numpy as jnp, numpy as np
import jkv
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jkv.cache.protocol import Step

assert len(jax.devices()) == 2
mesh = Mesh(np.array(jax.devices()), ("heads",))
heads = P(None, None, "heads")
kinds = {
    "dense": jkv.dense(),
    "sinks": jkv.window(9, sinks=2, positions="text"),
    "int4": jkv.quantized(4, residual=4, group=8),
}

def life(arrays, cache):
    # A chunk, then a token at a time.
    start, outs = jnp.zeros((2,), jnp.int32), []
    for first, new in ((0, 20), (20, 1), (21, 1)):
        step = Step.after(start, jnp.full((2,), new, jnp.int32), new)
        q, k, v = (x[:, first : first + new] for x in arrays)
        out, cache = cache.attend(q, k, v, step, scale=0.4)
        outs.append(out)
        start = step.stop
    return jnp.concatenate(outs, axis=1), cache

for name, kind in kinds.items():
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(key, (2, 22, n, 8)) for key, n in zip(keys, (8, 4, 4), strict=True)
    ]
    cache = kind.init(2, 64, 4, 8, jnp.float32)
    # All that has heads has them second; what has not is of rows alone.
    specs = jax.tree.map(lambda x: P(None, "heads") if x.ndim > 1 else P(), cache)
    want, held = jax.jit(life)(arrays, cache)
    placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), cache, specs)
    run = jax.shard_map(
        life, mesh=mesh, in_specs=(heads, specs), out_specs=(heads, specs), check_vma=False
    )
    lowered = jax.jit(run).lower(arrays, placed)
    got, kept = jax.jit(run)(arrays, placed)
    np.testing.assert_allclose(got, want, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, kept, held)
    # Each sees its own heads and asks nobody.
    for word in ("all_gather", "all_reduce", "collective_permute", "all_to_all"):
        assert word not in lowered.as_text(), (name, word)
    assert len(got.sharding.device_set) == 2
print("same")
"""


def test_heads_on_two_devices():
    """In a process of its own: how many devices a CPU is must be said before JAX begins."""
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "same\n"
