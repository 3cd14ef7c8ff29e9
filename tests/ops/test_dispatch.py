"""Which implementation runs, and the reasons against the others."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkv import _compat, ops
from jkv.errors import UnsupportedError
from jkv.ops import dispatch
from jkv.ops.attention import OPERATION

Q, KEYS = jnp.ones((1, 1, 2, 8)), jnp.ones((1, 2, 4, 8))
KV, AT = ops.ContiguousKV(KEYS, KEYS), jnp.full((1, 1), 3)


def offer(monkeypatch, *platforms):
    """An implementation that takes one query token only, and says 7, before all others."""

    def unsupported(q, *_):
        return None if q.shape[1] == 1 else f"{q.shape[1]} new tokens"

    def run(q, *_):
        return ops.Partial(out=jnp.full(q.shape, 7.0), lse=jnp.zeros(q.shape[:3]))

    picky = dispatch.Implementation("picky", platforms, unsupported, run)
    others = [each for each in OPERATION.implementations if each.name != "picky"]
    monkeypatch.setattr(OPERATION, "implementations", [picky, *others])


@pytest.fixture
def picky(monkeypatch):
    offer(monkeypatch, "cpu", "tpu")


@pytest.mark.usefixtures("picky")
def test_the_first_that_can():
    positions = jnp.full((1, 2), 3)
    assert ops.attention(Q, KV, AT).out[0, 0, 0, 0] == 7
    two = ops.attention(jnp.ones((1, 2, 2, 8)), KV, positions)
    assert two.out[0, 0, 0, 0] == 1
    chosen = ops.explain(Q, KV)
    assert (chosen.name, chosen.refused, str(chosen)) == ("picky", {}, "picky runs")
    shape = jax.ShapeDtypeStruct((1, 2, 2, 8), jnp.float32)
    chosen = ops.explain(shape, KV)
    assert (chosen.name, chosen.refused) == ("xla", {"picky": "2 new tokens"})
    assert str(chosen) == "xla runs\n  picky does not: 2 new tokens"


@pytest.mark.usefixtures("picky")
def test_by_name():
    out = ops.attention(Q, KV, AT, implementation="xla").out
    assert out[0, 0, 0, 0] == 1
    with pytest.raises(UnsupportedError, match="'picky', which cannot do this: 2 new tokens"):
        ops.attention(jnp.ones((1, 2, 2, 8)), KV, jnp.full((1, 2), 3), implementation="picky")
    with pytest.raises(UnsupportedError, match="expected one of"):
        ops.attention(Q, KV, AT, implementation="cuda")
    with pytest.raises(UnsupportedError, match=r"runs on \['cuda'\] and not on cpu"):
        ops.attention(Q, KV, AT, implementation="mosaic_gpu")


@pytest.mark.usefixtures("picky")
def test_a_program_for_several_platforms(monkeypatch):
    """Where the platforms choose differently, each gets its own in one program."""
    offer(monkeypatch, "tpu")
    with dispatch.target("tpu"):
        assert dispatch.platforms() == ("tpu", "cpu")
        call = jax.jit(lambda q: ops.attention(q, KV, AT).out)
        assert call(Q)[0, 0, 0, 0] == 1  # runs here, on a CPU
        for_tpu = call.trace(Q).lower(lowering_platforms=("tpu",)).as_text()
    assert "7.0" in for_tpu
    assert dispatch.platforms() == ("cpu",)
    with (
        pytest.raises(UnsupportedError, match="'abacus'; expected one of"),
        dispatch.target("abacus"),
    ):
        pass


@pytest.mark.usefixtures("picky")
def test_what_was_chosen_is_recorded():
    with dispatch.record() as names:
        for new in (1, 2, 1):
            ops.attention(jnp.ones((1, new, 2, 8)), KV, jnp.full((1, new), 3))
    assert names == ["picky", "xla"]
    ops.attention(Q, KV, AT)
    assert names == ["picky", "xla"]


def test_the_platform_must_be_known():
    assert ops.explain(Q, KV, platform="cuda").name
    with pytest.raises(UnsupportedError, match="platform='abacus'"):
        ops.explain(Q, KV, platform="abacus")


def test_old_names_say_what_replaces_them():
    for name in ("paged_attention", "explain_paged", "choice"):
        with pytest.raises(AttributeError, match=r"it is jkv.ops.* now"):
            getattr(ops, name)
    with pytest.raises(AttributeError, match=r"no attribute 'atention'$"):
        getattr(ops, "atention")  # noqa: B009


def test_operands_are_values_and_a_spec_is_static():
    with pytest.raises(TypeError, match=r"expected jkv\.ops\.ContiguousKV"):
        ops.attention(Q, KEYS, AT)
    with pytest.raises(TypeError, match="expected an AttentionSpec"):
        ops.attention(Q, KV, AT, 0.5)
    with pytest.raises(TypeError, match=r"window=2\.5; expected an integer"):
        ops.AttentionSpec(1.0, 2.5)
    with pytest.raises(TypeError, match="known when the program is traced"):
        jax.jit(lambda scale: ops.AttentionSpec(scale).scale)(2.0)
    with pytest.raises(ValueError, match="sinks=-1; expected at least 0"):
        ops.AttentionSpec(1.0, 3, -1)
    assert ops.AttentionSpec(1.0, None, 5) == ops.AttentionSpec(1.0)  # no window, no sinks
    assert ops.AttentionSpec(1.0, 9).within(5).window == 5
    assert ops.AttentionSpec(1.0, 3).within(5).window == 3
    assert ops.AttentionSpec(1.0).within(None).window is None


SHAPES = ((1, 1, 2, 8), (1, 2, 9, 8), (1, 2, 9, 8))


def test_several_operands_are_attended_to_as_one():
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 1, 2, 8), *2 * [(1, 2, 9, 8)])
    )
    at = jnp.full((1, 1), 8)
    spec = ops.AttentionSpec(0.3, 6)
    parts = [
        ops.ContiguousKV(k[:, :, s], v[:, :, s], slot_positions=jnp.arange(9)[None, s])
        for s in (slice(0, 4), slice(4, 9))
    ]
    got, want = (
        ops.attention(q, parts, at, spec),
        ops.attention(q, ops.ContiguousKV(k, v), at, spec),
    )
    np.testing.assert_allclose(got.out, want.out, atol=1e-6)
    np.testing.assert_allclose(got.lse, want.lse, atol=1e-6)


# The implementation, the last JAX that is too old for it, and the first that is not.
OLD_JAX = {
    "cudnn": ("cuda", (0, 8, 0), (0, 8, 1)),
    "mosaic_gpu": ("cuda", (0, 10, 2), (0, 11, 0)),
    "mosaic_tpu": ("tpu", (0, 9, 2), (0, 10, 0)),
}


@pytest.mark.parametrize("name", OLD_JAX)
def test_an_older_jax_is_a_reason_against(monkeypatch, name):
    platform, old, new = OLD_JAX[name]
    chunk = ops.ContiguousKV.of_chunk(jnp.ones((1, 64, 2, 64)), jnp.ones((1, 64, 2, 64)))
    q = jnp.ones((1, 64, 2, 64))
    oldest = OPERATION.find(name).oldest_jax

    def unsupported(*_):
        return None if oldest <= _compat.JAX else pytest.fail("its modules may not exist")

    able = dataclasses.replace(OPERATION.find(name), unsupported=unsupported)
    monkeypatch.setattr(OPERATION, "implementations", [able, OPERATION.find("xla")])
    for version, wanted in ((old, "xla"), ((0, 7, 2), "xla"), (new, name)):
        monkeypatch.setattr(_compat, "JAX", version)
        assert ops.explain(q, chunk, platform=platform).name == wanted
    monkeypatch.setattr(_compat, "JAX", old)
    why = f"JAX {'.'.join(map(str, old))} (it is for "
    assert why in ops.explain(q, chunk, platform=platform).refused[name]
    with (
        dispatch.target(platform),
        pytest.raises(UnsupportedError, match=f"cannot do this: {re.escape(why)}"),
    ):
        ops.attention(q, chunk, jnp.arange(64)[None], implementation=name)
    with dispatch.target(platform), dispatch.record() as names:
        jax.eval_shape(lambda: ops.attention(q, chunk, jnp.arange(64)[None]))
    assert names == ["xla"]


def test_an_older_jax_writes_without_kernels(monkeypatch):
    buffer, new, slots = jnp.ones((1, 2, 128, 64)), jnp.ones((1, 1, 2, 64)), jnp.ones((1, 1), int)

    def program():
        with dispatch.target("tpu"):
            return str(jax.make_jaxpr(lambda *x: ops.write(*x))(buffer, new, slots))

    monkeypatch.setattr(_compat, "JAX", (0, 10, 0))
    assert "pallas_call" in program()
    monkeypatch.setattr(_compat, "JAX", (0, 7, 2))
    assert "pallas_call" not in program()
