"""Caches in flax's state dicts, in orbax's checkpoints and in exported programs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax import export

import jkv
from jkv.cache import pytree, static
from jkv.errors import UnsupportedError
from tests.cache.kinds import KINDS
from tests.cache.test_file import new, newest, same_bits
from tests.cache.test_own_kind import OwnKind
from tests.conftest import ROOT

SHAPE = {"layers": 1, "kv_heads": 2, "head_dim": 8}
every_kind = pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)


@every_kind
def test_state_dicts_of_flax(case):
    cache = new(case.kind)
    blank = jax.tree.map(jnp.zeros_like, cache)
    same_bits(serialization.from_bytes(blank, serialization.to_bytes(cache)), cache)
    abstract = jax.eval_shape(lambda: blank)
    same_bits(serialization.from_state_dict(abstract, serialization.to_state_dict(cache)), cache)


def test_a_state_dict_names_what_it_holds():
    state = serialization.to_state_dict(new(jkv.dense()))
    assert list(state) == ["layers", "lengths", "overflowed", "shared"]
    assert list(state["layers"]["1"]) == ["keys", "values"]


def test_a_state_dict_of_another_cache_is_refused():
    cache = new(jkv.dense())
    state = serialization.to_state_dict(cache)
    with pytest.raises(ValueError, match=r"for a QuantizedCache; expected .* of the same kind"):
        serialization.from_state_dict(new(jkv.quantized(bits=8)), state)
    with pytest.raises(ValueError, match="for a NoCache; expected"):
        serialization.from_state_dict(new(jkv.none()), state)
    for other in (new(jkv.dense(), batch=3), new(jkv.dense(), dtype="bfloat16")):
        with pytest.raises(ValueError, match=r"for Dense\.keys; expected .*\[., 2, 16, 8\]"):
            serialization.from_state_dict(other, state)
    rest = {name: part for name, part in state.items() if name != "lengths"}
    with pytest.raises(ValueError, match=r"for a Cache; expected \['layers', 'lengths'"):
        serialization.from_state_dict(cache, rest)


def test_checkpoints_of_orbax(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    caches = {case.name.replace(":", "-"): new(case.kind) for case in KINDS}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), caches
    )
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "caches", caches)
        checkpointer.wait_until_finished()
        same_bits(checkpointer.restore(tmp_path / "caches", abstract), caches)


def through(exported):
    pytest.importorskip("flatbuffers")  # which JAX needs to serialise
    return export.deserialize(exported.serialize())


def reverse(tree):
    return jax.tree.map(lambda x: x[::-1], tree)


def test_exported_programs_take_every_kind():
    caches = {case.name: new(case.kind) for case in KINDS} | {"own": new(OwnKind())}
    program = through(export.export(jax.jit(reverse))(caches))
    same_bits(program.call(caches), reverse(caches))
    with pytest.raises(ValueError, match="tree structure"):
        program.call(caches | {"dense": caches["paged"]})


def step(caches, tokens):
    """A decode step of one layer of attention, for a cache of each kind."""
    outs, after = {}, {}
    for name, cache in caches.items():
        run = cache.begin(tokens)
        x = jax.nn.one_hot(run.tokens, 16).reshape(*run.tokens.shape, 2, 8)
        out, layer = run.layers[0].attend(x, x, x, run.step, jkv.ops.AttentionSpec(1.0))
        outs[name], after[name] = run.end(out.reshape(*run.tokens.shape, 16), [layer])
    return outs, after


FRESH = """
import pathlib, sys
import jax.numpy as jnp
from jax import export
import jkv.cache  # whose classes the program names

here = pathlib.Path(sys.argv[1])
program = export.deserialize(bytearray((here / "program").read_bytes()))
caches = {path.stem: jkv.load_cache(path) for path in here.glob("*.cache")}
for token in (3, 5):
    outs, caches = program.call(caches, jnp.full((2, 1), token, jnp.int32))
for name, cache in caches.items():
    cache.save(here / f"{name}.after")
    print(name, outs[name].sum())
"""


def test_a_decode_step_goes_to_another_process(tmp_path):
    pytest.importorskip("flatbuffers")
    texts = {"dense": "dense", "window": "window:4", "int4": "int4:residual=4,group=4"}
    caches = {
        name: jkv.attention_cache(text, batch=2, slots=8, **SHAPE)
        for name, text in (texts | {"paged": "paged:4"}).items()
    }
    for name, cache in caches.items():
        cache.save(tmp_path / f"{name}.cache")
    tokens = jnp.ones((2, 1), jnp.int32)
    program = export.export(jax.jit(step))(caches, tokens)
    (tmp_path / "program").write_bytes(program.serialize())
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(caches)
    for token in (3, 5):
        _, caches = program.call(caches, token * tokens)
    for name, cache in caches.items():
        assert cache.lengths.tolist() == [2, 2]
        same_bits(jkv.load_cache(tmp_path / f"{name}.after"), cache)


def test_a_score_of_ones_own_has_no_name_in_a_program():
    pytest.importorskip("flatbuffers")
    cache = new(jkv.evicting(8, score=newest))
    with pytest.raises(UnsupportedError, match="expected kinds and scores of jkv"):
        export.export(jax.jit(reverse))(cache).serialize()


def test_a_class_that_is_defined_again_is_another():
    """As in a notebook, whose cell is run twice."""

    def define():
        @pytree
        class Pair:
            first: jax.Array
            second: int = static(default=2)

        return Pair

    for cls in (define(), define()):
        pair = cls(jnp.arange(3), 5)
        again = through(export.export(jax.jit(reverse))(pair)).call(pair)
        assert type(again) is cls
        assert again.second == 5
        np.testing.assert_array_equal(again.first, [2, 1, 0])
        state = serialization.to_state_dict(pair)
        kept = serialization.from_state_dict(dataclasses.replace(pair, second=7), state)
        assert kept.second == 7  # of the target: a state dict has the arrays
