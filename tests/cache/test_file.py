"""Caches as files: every kind to the bit, and nothing that is not what was written."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import jkv
from jkv import _tensorfile
from jkv.cache import file as cache_file
from jkv.cache import replace
from jkv.errors import CheckpointError, StaleError, UnsupportedError
from tests.cache.kinds import KINDS
from tests.cache.test_own_kind import OwnKind, OwnLayer

WEIGHTS = {"w": jnp.arange(4.0)}


@dataclasses.dataclass(frozen=True)
class Bare:
    """The shape of a model, and nothing else."""

    layers: int = 2
    kv_heads: int = 2
    head_dim: int = 8


def new(kind, batch=2, dtype="float32"):
    """A cache of arbitrary bits, within what its tables may say."""
    cache = jkv.init_cache(Bare(), kind, batch=batch, slots=16, dtype=dtype)
    rng = np.random.default_rng(0)

    def fill(leaf):
        high = 2 if leaf.dtype in (jnp.int32, bool) else 99
        return jnp.asarray(rng.integers(0, high, leaf.shape), leaf.dtype)

    lengths = jnp.arange(batch, dtype=jnp.int32)
    return replace(cache, layers=jax.tree.map(fill, cache.layers), lengths=lengths)


def same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


@pytest.fixture
def saved(path):
    cache = new(jkv.quantized(bits=8))
    cache.save(path, WEIGHTS)
    return cache


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_every_kind_comes_back_to_the_bit(case, path):
    cache = new(case.kind)
    cache.save(path, WEIGHTS)
    same_bits(jkv.load_cache(path, WEIGHTS), cache)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "kind",
    [
        jkv.per_layer([jkv.window(4), jkv.dense()]),
        jkv.pyramid(8),
        jkv.evicting(8, score=jkv.scores.h2o),
        jkv.paged(4, managed=True),
    ],
    ids=["per_layer", "pyramid", "h2o", "managed"],
)
def test_what_is_made_of_kinds_and_scores(kind, path):
    cache = new(kind)
    cache.save(path)
    same_bits(jkv.load_cache(path), cache)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_stay_as_they_are_and_others_read_them(dtype, path):
    cache = new(jkv.dense(), dtype=dtype)
    cache.save(path)
    same_bits(jkv.load_cache(path), cache)
    with safe_open(path, "flax") as file:
        np.testing.assert_array_equal(file.get_tensor("layers.1.keys"), cache.layers[1].keys)


def test_the_file_is_not_mapped(saved, path):
    """It may be truncated afterwards, and the loop may write into what was loaded."""
    cache = jkv.load_cache(path)
    os.truncate(path, 8)
    same_bits(cache, saved)
    jax.jit(lambda cache: jax.tree.map(lambda x: x[::-1], cache), donate_argnums=0)(cache)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


def test_only_for_its_model(saved, path, tiny_model):
    same_bits(jkv.load_cache(path, {"w": jnp.arange(4.0)}), saved)  # its values count
    same_bits(jkv.load_cache(path), saved)
    for other in ({"w": jnp.arange(4.0) + 1}, tiny_model):
        with pytest.raises(StaleError, match="another model, or with other weights"):
            jkv.load_cache(path, other)
    saved.save(path)
    with pytest.raises(StaleError, match="saved without a model"):
        jkv.load_cache(path, WEIGHTS)
    for nothing in ("gpt2", {}, 3):
        with pytest.raises(TypeError, match=r"expected what jkv\.load returns"):
            saved.save(path, nothing)
        with pytest.raises(TypeError, match=r"load_cache got .* as a model"):
            jkv.load_cache(path, nothing)


@pytest.mark.parametrize("fails", ["write", "rename"])
def test_what_was_there_stays_if_the_write_fails(saved, path, fails, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, {"write": "fsync", "rename": "replace"}[fails], fail)
    with pytest.raises(OSError, match="No space left"):
        new(jkv.dense()).save(path, WEIGHTS)
    monkeypatch.undo()
    assert os.listdir(path.parent) == [path.name]
    same_bits(jkv.load_cache(path, WEIGHTS), saved)


def test_any_damage_is_refused(saved, path):
    data = path.read_bytes()
    for size in (0, 7, 8, 300, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            jkv.load_cache(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="1 bytes follow"):
        jkv.load_cache(path)
    # Blanks after the header's JSON change nothing.
    end = 8 + len(data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip())
    start = 8 + int.from_bytes(data[:8], "little")
    for at in [*range(0, end, 101), *range(start, len(data), 211)]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x11]) + data[at + 1 :])
        with pytest.raises((CheckpointError, UnsupportedError)):
            jkv.load_cache(path)


def rewrite(path, change, sealed=True):
    """Write a file again whose header says something else, with a seal that fits."""
    tensors, metadata = _tensorfile.read_tensors(path, [])
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    header = json.loads(metadata["jkv"])
    change(header, arrays)
    header["crc32"] = {name: cache_file._crc(array) for name, array in arrays.items()}
    text = json.dumps(header)
    shapes = {name: (_tensorfile.WORDS[a.dtype], a.shape) for name, a in arrays.items()}
    seal = cache_file._seal(text, shapes) if sealed else metadata["jkv.sha256"]
    path.unlink()
    _tensorfile.write_file(path, shapes, {"jkv": text, "jkv.sha256": seal}, arrays.__getitem__)


def version(header, arrays):
    header["format"] = 2


def settings(header, arrays):
    header["model"] = None


def rows(header, arrays):
    name = next(name for name in arrays if name.startswith("layers.1") and arrays[name].ndim == 4)
    arrays[name] = np.concatenate([arrays[name]] * 2)


def length(header, arrays):
    arrays["lengths"] = arrays["lengths"] + 99


def integer(header, arrays):
    arrays["lengths"] = arrays["lengths"].astype(np.float32)


def code(header, arrays):
    header["cache"]["fields"]["layers"]["tuple"][0]["class"] = "jkv.cache.file:Known"


def inner(header, arrays):
    header["cache"]["fields"]["layers"]["tuple"][0]["class"] = "jkv.store.entry:Entry"


def function(header, arrays):
    header["cache"]["fields"]["layers"]["tuple"][0] = {"function": "jkv.cache.spec:parse"}


def missing(header, arrays):
    arrays.pop("overflowed")


def more(header, arrays):
    header["else"] = 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (version, r"in format 2 by jkv .* reads 1"),
        (rows, "not of 2 rows"),
        (length, "it holds no cache: .*rows of"),
        (integer, "one number for each row"),
        (code, "is no dataclass"),
        (inner, "nothing that caches are made of"),
        (function, "is no score"),
        (missing, "other arrays than it holds"),
        (more, "its header says"),
    ],
)
def test_a_header_that_lies_is_refused(saved, path, change, says):
    rewrite(path, lambda *_: None)
    same_bits(jkv.load_cache(path), saved)  # the positive twin: written again without a lie
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=says):
        jkv.load_cache(path)


def test_a_changed_header_is_refused(saved, path):
    rewrite(path, settings, sealed=False)
    with pytest.raises(CheckpointError, match="not the one that was written"):
        jkv.load_cache(path)


def test_what_is_no_cache_is_refused(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        jkv.load_cache(path)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="but of no cache"):
        jkv.load_cache(path)
    path.write_text("a text, and no cache")
    with pytest.raises(CheckpointError, match=r"no safetensors file\. Expected .* cache\.save has"):
        jkv.load_cache(path)
    with pytest.raises(IsADirectoryError, match="expected the path of a file"):
        new(jkv.dense()).save(tmp_path)
    with pytest.raises(CheckpointError, match="it is a directory"):
        jkv.load_cache(tmp_path)


def test_a_kind_of_ones_own_is_named_by_the_reader(path):
    cache = new(OwnKind())
    cache.save(path)
    same_bits(jkv.load_cache(path, known=[OwnLayer]), cache)
    with pytest.raises(UnsupportedError, match=r"test_own_kind:OwnLayer, .* pass them as known="):
        jkv.load_cache(path)


def test_a_score_of_ones_own_is_named_by_the_reader(path):
    cache = new(jkv.evicting(8, score=newest))
    cache.save(path)
    same_bits(jkv.load_cache(path, known=[newest]), cache)
    with pytest.raises(UnsupportedError, match=r"test_file:newest, .* pass them as known="):
        jkv.load_cache(path)
    with pytest.raises(UnsupportedError, match="that have a name in their module"):
        new(jkv.evicting(8, score=lambda seen: seen.positions * 1.0)).save(path)


def newest(seen):
    return jnp.broadcast_to(seen.positions, seen.scores.shape) * 1.0


def test_what_a_file_cannot_hold_is_refused(path):
    cache = new(jkv.dense())
    with pytest.raises(TypeError, match="save is traced by jit"):
        jax.jit(lambda cache: cache.save(path))(cache)
    half = jax.tree.map(lambda x: x.astype(jnp.int4) if x.ndim == 4 else x, cache)
    with pytest.raises(UnsupportedError, match="dtype int4, which safetensors files do not hold"):
        half.save(path)
    assert not path.exists()
