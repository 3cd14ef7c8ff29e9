"""Which implementation runs, and what is said about the others."""

from __future__ import annotations

import sys
import types

import jax
import jax.numpy as jnp
import pytest

from jkv import ops
from jkv.errors import UnsupportedError
from jkv.ops import choice

Q, KV = jnp.ones((1, 1, 2, 8)), jnp.ones((1, 2, 4, 8))
CALL = {"positions": jnp.full((1, 1), 3), "slot_positions": None, "lengths": None}


@pytest.fixture
def picky(monkeypatch):
    """An implementation that takes one query token only, and says 7."""

    def unsupported(q, **_):
        return None if q.shape[1] == 1 else f"{q.shape[1]} new tokens"

    def attention(q, **_):
        return ops.Partial(out=jnp.full(q.shape, 7.0), lse=jnp.zeros(q.shape[:3]))

    module = types.SimpleNamespace(unsupported=unsupported, attention=attention)
    monkeypatch.setitem(sys.modules, "jkv.ops.attention.picky", module)
    monkeypatch.setattr(choice, "IMPLEMENTATIONS", (*choice.IMPLEMENTATIONS, "picky"))
    monkeypatch.setitem(choice.CANDIDATES, "cpu", ("picky", "xla"))
    monkeypatch.setitem(choice.CANDIDATES, "tpu", ("picky", "xla"))
    return module


@pytest.mark.usefixtures("picky")
def test_the_first_that_can():
    positions = jnp.full((1, 2), 3)
    assert ops.attention(Q, KV, KV, positions=CALL["positions"]).out[0, 0, 0, 0] == 7
    two = ops.attention(jnp.ones((1, 2, 2, 8)), KV, KV, positions=positions)
    assert two.out[0, 0, 0, 0] == 1
    chosen = ops.explain(Q, KV, KV, positions=CALL["positions"])
    assert (chosen.name, chosen.refused, str(chosen)) == ("picky", {}, "picky: yes")
    shape = jax.ShapeDtypeStruct((1, 2, 2, 8), jnp.float32)
    chosen = ops.explain(shape, KV, KV, positions=positions)
    assert (chosen.name, chosen.refused) == ("xla", {"picky": "2 new tokens"})
    assert str(chosen) == "picky: no, 2 new tokens\nxla: yes"


@pytest.mark.usefixtures("picky")
def test_by_name():
    out = ops.attention(Q, KV, KV, positions=CALL["positions"], implementation="xla").out
    assert out[0, 0, 0, 0] == 1
    with pytest.raises(UnsupportedError, match="'picky', which cannot do this: 2 new tokens"):
        ops.attention(
            jnp.ones((1, 2, 2, 8)),
            KV,
            KV,
            positions=jnp.full((1, 2), 3),
            implementation="picky",
        )
    with pytest.raises(UnsupportedError, match="expected one of"):
        ops.attention(Q, KV, KV, positions=CALL["positions"], implementation="cuda")
    with pytest.raises(UnsupportedError, match=r"runs on \['cuda'\] and not on cpu"):
        ops.attention(Q, KV, KV, positions=CALL["positions"], implementation="mosaic_gpu")


@pytest.mark.usefixtures("picky")
def test_a_program_for_several_platforms(monkeypatch):
    """Where the platforms choose differently, each gets its own in one program."""
    monkeypatch.setitem(choice.CANDIDATES, "cpu", ("xla",))
    with choice.target("tpu"):
        assert choice.platforms() == ("tpu", "cpu")
        call = jax.jit(lambda q: ops.attention(q, KV, KV, positions=CALL["positions"]).out)
        assert call(Q)[0, 0, 0, 0] == 1  # runs here, on a CPU
        for_tpu = call.trace(Q).lower(lowering_platforms=("tpu",)).as_text()
    assert "7.0" in for_tpu
    assert choice.platforms() == ("cpu",)
    with (
        pytest.raises(UnsupportedError, match="'abacus'; expected one of"),
        choice.target("abacus"),
    ):
        pass


@pytest.mark.usefixtures("picky")
def test_what_was_chosen_is_recorded():
    with choice.record() as names:
        for new in (1, 2, 1):
            ops.attention(jnp.ones((1, new, 2, 8)), KV, KV, positions=jnp.full((1, new), 3))
    assert names == ["picky", "xla"]
    ops.attention(Q, KV, KV, positions=CALL["positions"])
    assert names == ["picky", "xla"]


def test_the_platform_must_be_known():
    assert ops.explain(Q, KV, KV, positions=CALL["positions"], platform="cuda").name
    with pytest.raises(UnsupportedError, match="platform='abacus'"):
        ops.explain(Q, KV, KV, positions=CALL["positions"], platform="abacus")
