"""Safetensors headers that lie."""

from __future__ import annotations

import itertools
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jkv import _tensorfile as tensorfile
from jkv._tensorfile import Tensor, read_header, write_tensors

GOOD = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "none": {"dtype": "F32", "shape": [0], "data_offsets": [32, 32]},
}


def _write(path, header, data: bytes = bytes(range(32)), length: int | None = None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def _read(path) -> tuple[dict[str, Tensor], list[str]]:
    problems: list[str] = []
    return read_header(path, problems), problems


def _with(name: str, **changes):
    return GOOD | {name: GOOD[name] | changes}


def test_good(tmp_path):
    path = tmp_path / "x.safetensors"
    _write(path, GOOD)
    tensors, problems = _read(path)
    assert problems == []
    assert set(tensors) == {"a", "b", "none"}
    raw = bytes(range(32))
    np.testing.assert_array_equal(
        tensors["a"].read(), np.frombuffer(raw, np.float32, 6).reshape(2, 3)
    )
    assert tensors["b"].read().tobytes() == raw[24:]
    assert tensors["b"].read().dtype.name == "bfloat16"
    assert tensors["none"].read().shape == (0,)
    assert tensors["a"].read().flags.owndata or tensors["a"].read().base.flags.owndata


def test_an_empty_tensor_where_another_begins(tmp_path):
    """In the order of the header it comes after the one that has the bytes."""
    empty = {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}
    _write(tmp_path / "x", GOOD | {"empty": empty})
    tensors, problems = _read(tmp_path / "x")
    assert problems == []
    assert tensors["empty"].read().shape == (0, 3)


BAD = {
    "overlap": (_with("b", data_offsets=[20, 28]), "overlaps"),
    "the same bytes": (_with("b", shape=[12], data_offsets=[0, 24]), "overlaps"),
    "gap": (_with("b", data_offsets=[26, 34]), "gap"),
    "first not at 0": ({"b": GOOD["b"]}, "gap after the header"),
    "past the end": (
        GOOD | {"c": {"dtype": "U8", "shape": [9], "data_offsets": [32, 41]}},
        "trunc",
    ),
    "far past the end": (
        GOOD | {"c": {"dtype": "U8", "shape": [2**60], "data_offsets": [32, 32 + 2**60]}},
        "truncated",
    ),
    "backwards": (_with("a", data_offsets=[24, 0]), "hold -24 bytes"),
    "negative": (_with("a", data_offsets=[-24, 0]), "are not valid"),
    "size": (_with("a", shape=[2, 4]), "takes 32"),
    "dtype": (_with("a", dtype="F16"), "takes 12"),
    "huge shape": (_with("a", shape=[2**62, 2**62]), "hold 24 bytes"),
    "huge and empty": (_with("none", shape=[0, 2**63]), "are not valid"),
    "negative shape": (_with("a", shape=[-2, -3]), "are not valid"),
    "float shape": (_with("a", shape=[2.0, 3]), "are not valid"),
    "true as an offset": (_with("a", data_offsets=[False, 24]), "are not valid"),
    "three offsets": (_with("a", data_offsets=[0, 12, 24]), "are not valid"),
    "unknown dtype": (_with("a", dtype="F128"), "unknown dtype 'F128'"),
    "list as dtype": (_with("a", dtype=["F32"]), "unknown dtype"),
    "another key": (_with("a", extra=1), "expected dtype, shape and data_offsets"),
    "no object": (GOOD | {"a": [0, 24]}, "expected dtype, shape and data_offsets"),
    "list": ([1], "is not an object"),
    "no json": (b"{", "is not valid"),
    "no text": (b"\xff\xfe", "is not valid"),
    "deep": (b'{"a":' * 50_000, "is not valid"),
    "repeated": (
        json.dumps(GOOD)[:-1].encode() + b', "a": ' + json.dumps(GOOD["a"]).encode() + b"}",
        "repeated keys a",
    ),
    "repeated within": (
        b'{"a": {"dtype": "U8", "shape": [32], "shape": [32], "data_offsets": [0, 32]}}',
        "repeated keys shape",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_refused(what, tmp_path):
    header, message = BAD[what]
    _write(tmp_path / "x.safetensors", header)
    tensors, problems = _read(tmp_path / "x.safetensors")
    assert tensors == {}
    assert len(problems) == 1
    assert message in problems[0]


def test_bytes_after_the_last_tensor(tmp_path):
    _write(tmp_path / "x", GOOD, bytes(33))
    assert "1 bytes follow the last tensor" in _read(tmp_path / "x")[1][0]


@pytest.mark.parametrize("length", [10**6, 2**63, 2**64 - 1])
def test_header_longer_than_the_file(length, tmp_path):
    _write(tmp_path / "x", GOOD, length=length)
    tensors, problems = _read(tmp_path / "x")
    assert tensors == {}
    assert "truncated" in problems[0]


def test_header_longer_than_any_model_needs(tmp_path):
    """Parsed, 100 MB of brackets would take gigabytes."""
    with (tmp_path / "x").open("wb") as file:
        file.write(struct.pack("<Q", (8 << 20) + 1))
        file.truncate(100_000_100)  # sparse
    assert "a header of 8388609 bytes; expected at most 8388608" in _read(tmp_path / "x")[1][0]


def test_a_key_repeated_over_and_over(tmp_path):
    """Found in one pass: to count each name anew would take hours for these."""
    entries = b",".join(b'"%d": 0, "%d": 0' % (i, i) for i in range(150_000))
    _write(tmp_path / "x", b"{" + entries + b"}")
    problem = _read(tmp_path / "x")[1][0]
    assert "repeated keys 0, 1, 10," in problem
    assert len(problem) < 300


@pytest.mark.parametrize("what", ["name", "shape", "dtype", "entry"])
def test_long_things_make_short_errors(what, tmp_path):
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 25]}
    name = "n" * 10**6 if what == "name" else "a"
    if what == "shape":
        entry["shape"] = [1] * 10**6
    elif what == "dtype":
        entry["dtype"] = "F" * 10**6
    _write(tmp_path / "x", {name: entry if what != "entry" else ["e"] * 10**6})
    problems = _read(tmp_path / "x")[1]
    assert len(problems) == 1
    assert len(problems[0]) < 400


def test_truncated_anywhere(tmp_path):
    """Cut at every byte: a problem each time, and never a tensor."""
    path = tmp_path / "x"
    _write(path, GOOD)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        tensors, problems = _read(path)
        assert tensors == {}
        assert problems


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_byte_changed(data, tmp_path_factory):
    """Whatever is accepted lies inside of the file, in pieces that do not touch each other."""
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    _write(path, GOOD)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 33))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    tensors, problems = _read(path)
    assert bool(tensors) != bool(problems) or (not tensors and not problems)
    spans = sorted((t.start, t.start + t.nbytes) for t in tensors.values())
    assert all(8 <= start <= stop <= len(raw) for start, stop in spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_directories_pipes_and_devices(tmp_path):
    """None is opened: a pipe would wait for its other end."""
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (
        (tmp_path, "a directory"),
        (tmp_path / "pipe", "a pipe or a device"),
        (Path("/dev/zero"), "a pipe or a device"),
    ):
        tensors, problems = _read(path)
        assert tensors == {}
        assert f"cannot be read: it is {kind}" in problems[0]


@pytest.mark.parametrize("name", ["a", "ab", "abcdefgh"])
def test_what_is_written_is_aligned(name, tmp_path):
    """Readers that map a file need tensors at multiples of their items."""
    values = {name: np.arange(6, dtype=np.float32).reshape(2, 3)}
    write_tensors(tmp_path / "x", {name: (2, 3)}, "float32", values.__getitem__)
    tensors, problems = _read(tmp_path / "x")
    assert (problems, tensors[name].start % 8) == ([], 0)
    np.testing.assert_array_equal(tensors[name].read(), values[name])


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "x", {}, "float32", {}.__getitem__)
    assert (tmp_path / "x").read_text() == "mine"


def test_a_tensor_in_pieces(tmp_path, monkeypatch):
    """Pieces of two dtypes have the same elements."""
    monkeypatch.setattr(tensorfile, "_CHUNK", 24)
    _write(tmp_path / "x", GOOD)
    tensors, _ = _read(tmp_path / "x")
    assert [piece.size for piece in tensors["a"].chunks()] == [3, 3]
    assert [piece.size for piece in tensors["b"].chunks()] == [3, 1]
    whole = np.concatenate(list(tensors["a"].chunks()))
    np.testing.assert_array_equal(whole, tensors["a"].read().reshape(-1))
