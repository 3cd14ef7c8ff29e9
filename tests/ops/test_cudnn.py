"""A chunk's attention among itself apart from that over the tokens before it, and the two merged.

cuDNN itself is on GPUs only (`test_on_gpu.py`). Here XLA stands in for it below `jax.nn`, and in
float32 too, so that what is around it is compared sharply.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv import ops
from jkv.cache.none import NoCache
from jkv.cache.protocol import Step
from jkv.errors import UnsupportedError
from jkv.ops import dispatch
from jkv.ops.attention import OPERATION, cudnn
from tests.ops import calls
from tests.ops.test_attention import close, draw, oracle

pytestmark = calls.needs("cudnn")

NEW, DIM = 18, 8
CHUNKS = ([NEW, 2, 0, 7], [3, NEW, 0, 11])  # real tokens of four rows, twice
SHAPE = jax.ShapeDtypeStruct
SIZES = types.SimpleNamespace(layers=1, kv_heads=1, head_dim=DIM)


def offer(monkeypatch, platforms):
    """Have cuDNN as a candidate on these platforms."""
    listed = [
        dataclasses.replace(each, platforms=platforms) if each.name == "cudnn" else each
        for each in OPERATION.implementations
    ]
    monkeypatch.setattr(OPERATION, "implementations", listed)


@pytest.fixture
def stand_in(monkeypatch):
    """What would be cuDNN's, by XLA."""
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(cudnn, "DTYPES", (*cudnn.DTYPES, "float32"))
    monkeypatch.setattr(cudnn, "installed", lambda: True)
    offer(monkeypatch, ("cuda", "cpu"))


def poisoned(x, counts, value=jnp.nan):
    """New keys [B, T, K, H] with anything where there is no token."""
    real = jnp.arange(x.shape[1])[None] < jnp.asarray(counts)[:, None]
    return jnp.where(real[..., None, None], x, value)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("window", [None, 5, NEW])
@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_a_chunk_among_itself(window, poison):
    counts, start = CHUNKS[0], [0, 5, 9, 100]
    q, k, v = draw(4, NEW, 2, 3, DIM, NEW)
    step = Step.after(jnp.asarray(start), jnp.asarray(counts), NEW)
    new = [jnp.swapaxes(poisoned(jnp.swapaxes(x, 1, 2), counts, poison), 1, 2) for x in (k, v)]
    with dispatch.record() as names:
        part = calls.attention(q, *new, positions=step.positions, window=window, chunk=True)
    assert names == ["cudnn"]
    positions = np.asarray(step.positions)
    close(part, oracle(q, k, v, positions, positions, window=window))
    assert (part.out[2] == 0).all()
    assert np.isneginf(part.lse[0]).sum() == 0


@pytest.mark.usefixtures("stand_in")
def test_derivatives_and_rows_of_rows():
    """Those of XLA's, and more rows."""
    q, k, v = draw(2, NEW, 1, 2, DIM, NEW)
    positions = jnp.broadcast_to(jnp.arange(NEW)[None], (2, NEW))

    def loss(arrays, implementation):
        part = calls.attention(
            *arrays, positions=positions, chunk=True, implementation=implementation
        )
        return jnp.sum(part.out**2) + jnp.sum(part.lse)

    run = jax.jit(jax.vmap(jax.grad(loss), (0, None)), static_argnums=1)
    stacked = tuple(jnp.stack([x, x * 2]) for x in (q, k, v))
    for got, want in zip(run(stacked, None), run(stacked, "xla"), strict=True):
        assert jnp.abs(want).max() > 1e-2
        np.testing.assert_allclose(got, want, atol=1e-4)


KINDS = {
    "dense": jkv.dense(),
    "window": jkv.window(10),
    "a long window": jkv.window(40),
    "sinks": jkv.window(10, sinks=4, positions="text"),
    "int2": jkv.quantized(bits=2, residual=8, group=8),
    "none": None,
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name, stand_in, monkeypatch):
    """A first and a second chunk of each kind, apart and merged, as together; rows of padding."""
    del stand_in
    kind = KINDS[name]
    draws = [draw(4, NEW, 1, 2, DIM, NEW, seed=i) for i in range(2)]

    def life():
        cache = NoCache() if kind is None else kind.init(4, 64, 1, DIM, jnp.float32)
        if name in ("dense", "window", "a long window", "sinks"):
            # What has not been written may be anything.
            cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)
        start, outs = jnp.zeros((4,), jnp.int32), []
        window = 6 if name == "none" else None

        @jax.jit  # not shared between two lives, each of which chooses for itself
        def attend(cache, q, k, v, step):
            return cache.attend(q, k, v, step, ops.AttentionSpec(0.3, window))

        for counts, (q, k, v) in zip(CHUNKS, draws, strict=True):
            step = Step.after(start, jnp.asarray(counts), NEW)
            k, v = (poisoned(jnp.swapaxes(x, 1, 2), counts, 7.0) for x in (k, v))
            out, cache = attend(cache, q, k, v, step)
            outs.append(jnp.where((step.positions >= 0)[..., None, None], out, 0.0))
            start = step.stop
        return outs, cache

    with dispatch.record() as names:
        got, cache = life()
    assert "cudnn" in names
    offer(monkeypatch, ("cuda",))
    with dispatch.record() as names:
        want, same = life()
    assert "cudnn" not in names
    for i in range(2):
        assert jnp.isfinite(want[i]).all()
        assert jnp.abs(want[i]).max() > 0.5
        np.testing.assert_allclose(got[i], want[i], atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, cache, same)


@pytest.mark.usefixtures("stand_in")
def test_pages():
    cache = jkv.init_cache(SIZES, jkv.paged(16), batch=4, slots=64, dtype=jnp.float32)
    q, k, v = draw(4, NEW, 1, 2, DIM, NEW)
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    step = cache.begin(jnp.zeros((4, NEW), jnp.int32), jnp.asarray(CHUNKS[0])).step
    with dispatch.record() as names:
        out, _ = cache.layers[0].attend(q, k, v, step, ops.AttentionSpec(0.3))
    assert "cudnn" in names
    want, _ = oracle(q, *(jnp.swapaxes(x, 1, 2) for x in (k, v)), *[step.positions] * 2, scale=0.3)
    real = np.asarray(step.positions) >= 0
    np.testing.assert_allclose(out[real], want[real], atol=1e-5)


def test_nothing_before_is_not_read(stand_in, monkeypatch):
    del stand_in
    q, k, v = draw(2, NEW, 1, 2, DIM, NEW)
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))

    lost = jnp.full((2, 1, 4, DIM), jnp.nan)
    past = ops.ContiguousKV(lost, lost, lengths=jnp.full((2,), 3))

    first, second = (
        Step.after(jnp.asarray(s), jnp.asarray([NEW, 1]), NEW) for s in ([0, 0], [0, 3])
    )

    def out(step):
        spec = ops.AttentionSpec(0.3)
        return ops.attention_with_chunk(q, k, v, step.positions, spec, past).out

    run = jax.jit(out)
    assert jnp.isfinite(run(first)).all()
    assert jnp.isnan(run(second)).all()
    # Where all is done by what does both, there is no such branch.
    offer(monkeypatch, ("cuda",))
    plain = jax.jit(lambda step: out(step))
    assert jnp.isnan(plain(first)).all()


def shapes(new=512, dim=128, dtype="bfloat16", slots=None):
    q = SHAPE((8, new, 32, dim), jnp.dtype(dtype))
    kv = SHAPE((8, 8, new if slots is None else slots, dim), jnp.dtype(dtype))
    return q, kv, kv


def explained(*arrays, chunk=True, **options):
    found = calls.explain(*arrays, platform="cuda", chunk=chunk, **options)
    assert (found.name == "cudnn") == ("cudnn" not in found.refused)
    return found.refused.get("cudnn")


def test_what_it_takes(monkeypatch):
    monkeypatch.setattr(cudnn, "installed", lambda: True)
    for dtype in cudnn.DTYPES:
        assert explained(*shapes(dtype=dtype)) is None
    assert explained(*shapes(), window=512, sinks=4) is None
    assert explained(*shapes(), window=100) is None
    refused = {
        "16 new tokens": explained(*shapes(new=16)),
        "float32": explained(*shapes(dtype="float32")),
        "softcap": explained(*shapes(), softcap=50.0),
        "sinks": explained(*shapes(), window=511, sinks=4),
        "100 channels": explained(*shapes(dim=100)),
        "multiples of 8 up to 128": explained(*shapes(dim=256)),
        "tokens of a cache": explained(*shapes(slots=8192), chunk=False),
    }
    for text, why in refused.items():
        assert why is not None, text
        assert text in why
    with monkeypatch.context() as flags:
        flags.setenv("XLA_FLAGS", "--xla_allow_excess_precision=false")
        assert "its lse comes rounded" in (explained(*shapes()) or "")
    monkeypatch.setattr(dispatch, "capability", lambda: "9.0")
    assert explained(*shapes(dim=256)) is None
    monkeypatch.setattr(dispatch, "capability", lambda: "7.5")
    assert "capability 7.5" in (explained(*shapes()) or "")
    monkeypatch.setattr(cudnn, "installed", lambda: False)
    assert "no JAX for NVIDIA GPUs" in (explained(*shapes()) or "")


def test_by_name():
    q, k, v = draw(1, NEW, 1, 1, DIM, NEW)
    at = jnp.arange(NEW)[None]
    with pytest.raises(UnsupportedError, match=r"'cudnn', which runs on \['cuda'\]"):
        calls.attention(q, k, v, positions=at, chunk=True, implementation="cudnn")
    with dispatch.target("cuda"), pytest.raises(UnsupportedError, match="float32"):
        calls.attention(q, k, v, positions=at, chunk=True, implementation="cudnn")
    table = jnp.zeros((1, 1), jnp.int32)
    paged: Any = {"positions": at, "lengths": at[0, :1], "implementation": "cudnn"}
    with (
        dispatch.target("cuda"),
        pytest.raises(UnsupportedError, match=r"'cudnn', which cannot do this: tokens of a cache"),
    ):
        calls.attention(q, k, v, table, **paged)
    with pytest.raises(ValueError, match="a chunk of 17 slots for 18 queries"):
        calls.attention(q, k[:, :, 1:], v[:, :, 1:], positions=at, chunk=True)
