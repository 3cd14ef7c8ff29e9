"""Safetensors headers that lie."""

from __future__ import annotations

import itertools
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jkv.models.tensorfile import Tensor, read_header

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


def test_header_longer_than_the_format_allows(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)  # sparse
    assert "expected at most 100 MB" in _read(tmp_path / "x")[1][0]


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


def test_unreadable(tmp_path):
    tensors, problems = _read(tmp_path)
    assert tensors == {}
    assert "cannot be read" in problems[0]
