"""Whatever happens to a blob: a miss that is told and put aside, and never wrong data."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jkv.errors import CorruptError, TierError
from jkv.store import Disk, Entry, codec
from jkv.store.checksum import checksum
from jkv.store.codec import blob_name, decode, encode, measure

RNG = np.random.default_rng(0)
ENTRY = Entry(
    {
        "k": RNG.standard_normal((5, 7, 129)).astype(ml_dtypes.bfloat16),
        "n": np.arange(12_000),
        "none": np.zeros(0),
    },
    {"tokens": 129},
)
FORMS = pytest.mark.parametrize("compression", [None, "zstd"], ids=["plain", "zstd"])


class Bench:
    """One file in a directory, damaged in one way after the other."""

    def __init__(self, path: Path, compression: str | None) -> None:
        self.disk = Disk(path, compression=compression)
        self.disk.write("key", ENTRY)
        self.file = path / blob_name("key")
        self.blob = self.file.read_bytes()
        self.start, _ = measure(self.blob)
        self.aside = path / "quarantine"

    def damaged(self, blob: bytes) -> None:
        self.file.write_bytes(blob)
        with pytest.raises(CorruptError):
            self.disk.read("key")
        assert self.disk.read("key") is None
        (kept,) = self.aside.iterdir()
        assert kept.read_bytes() == blob
        kept.unlink()

    def flipped(self, bit: int) -> None:
        blob = bytearray(self.blob)
        blob[bit // 8] ^= 1 << bit % 8
        self.damaged(bytes(blob))

    def intact(self) -> None:
        self.file.write_bytes(self.blob)
        read = self.disk.read("key")
        assert read is not None
        assert read.arrays["k"].tobytes() == ENTRY.arrays["k"].tobytes()


@FORMS
def test_every_bit_of_the_header(tmp_path, compression):
    bench = Bench(tmp_path, compression)
    for bit in range(8 * bench.start):
        bench.flipped(bit)
    bench.intact()


@FORMS
@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.soak)])
def test_bits_of_the_payload(tmp_path, compression, count, found):
    bench = Bench(tmp_path, compression)
    first, last = 8 * bench.start, 8 * len(bench.blob)
    bits = np.random.default_rng(1).integers(first, last, count)
    for bit in [first, last - 1, *bits.tolist()]:
        bench.flipped(bit)
    bench.intact()
    found(bits_flipped=count + 2, served=0, put_aside=count + 2)


@FORMS
@pytest.mark.parametrize("step", [977, pytest.param(1, marks=pytest.mark.soak)])
def test_truncations(tmp_path, compression, step, found):
    bench = Bench(tmp_path, compression)
    edges = [0, 1, 7, 8, 63, 64, 65, bench.start - 1, bench.start, bench.start + 1]
    lengths = {*edges, *range(0, len(bench.blob), step), len(bench.blob) - 1}
    for length in lengths:
        bench.damaged(bench.blob[:length])
    for more in (b"\0", bytes(64), bench.blob):
        bench.damaged(bench.blob + more)
    bench.intact()
    found(lengths=len(lengths), served=0, put_aside=len(lengths))


@FORMS
def test_parts_that_moved_or_were_never_written(tmp_path, compression):
    """What file systems leave after a power cut: zeros, others' blocks, another order."""
    bench = Bench(tmp_path, compression)
    size = 4096
    for at in range(0, len(bench.blob) - size, size):
        for block in (bytes(size), b"\xff" * size, RNG.bytes(size)):
            bench.damaged(bench.blob[:at] + block + bench.blob[at + size :])
    blob = bytearray(bench.blob)
    blob[size : 2 * size], blob[-size:] = blob[-size:], blob[size : 2 * size]
    bench.damaged(bytes(blob))
    bench.intact()


def test_the_checksum_sees_what_it_says():
    """Bursts, swaps of pages, single bits in all rows; and pieces make no difference."""
    rng = np.random.default_rng(2)
    data = bytearray(rng.bytes((1 << 18) + 3 * 4096 + 17))
    whole = checksum([memoryview(bytes(data))])
    cuts = [0, 1, 5000, 5001, 1 << 18, (1 << 18) + 100, len(data)]
    pieces = [memoryview(bytes(data[a:b])) for a, b in itertools.pairwise(cuts)]
    assert checksum(pieces) == whole
    seen = {whole}
    pages = range(0, len(data) - 4096, 4096)
    for at in pages:
        for bit in (0, 63):
            changed = bytearray(data)
            changed[at + bit // 8] ^= 1 << bit % 8
            seen.add(checksum([memoryview(changed)]))
        changed = bytearray(data)
        changed[at : at + 4096], changed[:4096] = data[:4096], data[at : at + 4096]
        seen.add(checksum([memoryview(changed)]))
    assert len(seen) == 3 * len(pages)  # the first page in its own place is no change
    # The highest bits of a column, two and two, which its sum does not see.
    for first, second in itertools.combinations(range(7, 64 * 4096, 4096 * 13), 2):
        changed = bytearray(data)
        changed[first] ^= 128
        changed[second] ^= 128
        assert checksum([memoryview(changed)]) != whole
    assert checksum([]) != checksum([memoryview(b"\0")]) != checksum([memoryview(bytes(2))])


def test_swapped_entries(tmp_path):
    disk = Disk(tmp_path)
    for key in ("a", "b", "c" * 500, "d"):
        disk.write(key, Entry({"x": np.frombuffer(key.encode(), np.uint8)}, {}))
    names = {key: tmp_path / blob_name(key) for key in ("a", "b", "c" * 500, "d")}
    a, b = names["a"].read_bytes(), names["b"].read_bytes()
    names["a"].write_bytes(b)
    names["b"].write_bytes(a)
    os.replace(names["d"], names["c" * 500])
    for key in ("a", "b"):
        with pytest.raises(CorruptError, match="holds the key"):
            disk.read(key)
    # Its name does not say the key, so it is looked into, and put aside.
    assert disk.scan() == {}
    assert len(list((tmp_path / "quarantine").iterdir())) == 3


def test_verify_names_what_is_wrong(tmp_path):
    disk = Disk(tmp_path)
    for key in "abcd":
        disk.write(key, ENTRY)
    assert disk.verify() == {}
    (tmp_path / "ka.jkv").write_bytes((tmp_path / "kb.jkv").read_bytes())
    with (tmp_path / "kc.jkv").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"?")
    problems = disk.verify()
    assert list(problems) == ["ka.jkv", "kc.jkv"]
    assert "of another file" in problems["ka.jkv"]
    assert "payload is damaged" in problems["kc.jkv"]
    assert disk.verify() == {}
    assert set(disk.scan()) == {"b", "d"}


def reseal(blob: bytes, change) -> bytes:
    """The blob with another header, properly sealed: what only a liar writes."""
    start, _ = measure(blob)
    length = int.from_bytes(blob[12:16], "little")
    said = json.loads(blob[64 : 64 + length])
    prefix = bytearray(blob[:40])
    said = change(said, prefix) or said
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    prefix[12:16] = len(text).to_bytes(4, "little")
    text += bytes(-len(text) % 64)
    seal = hashlib.sha256(bytes(prefix) + bytes(8) + text).digest()[:16]
    return bytes(prefix) + seal + bytes(8) + text + blob[start:]


def put(**values):
    return lambda said, prefix: said.update(values)


LIES = {
    "a huge shape": put(arrays=[["k", "float32", [1 << 40]]], nbytes=1 << 42),
    "a shape beyond 64 bits": put(arrays=[["k", "uint8", [1 << 47, 1 << 47]]], nbytes=1 << 94),
    "a negative size": put(arrays=[["k", "uint8", [-1]]], nbytes=-1),
    "a size that is true": put(arrays=[["k", "uint8", [True]]], nbytes=1),
    "a size that is a float": put(arrays=[["k", "uint8", [1.0]]], nbytes=1),
    "huge and empty": put(arrays=[["k", "uint8", [0, 1 << 47, 1 << 47]]], nbytes=0),
    "too many axes": put(arrays=[["k", "uint8", [1] * 99]], nbytes=1),
    "less than is there": put(arrays=[["k", "uint8", [1]]], nbytes=1),
    "no arrays": put(arrays=[]),
    "objects": put(arrays=[["k", "object", [1]]], nbytes=8),
    "records": put(arrays=[["k", "i4,i4", [1]]], nbytes=8),
    "one name twice": put(arrays=[["k", "uint8", [0]], ["k", "uint8", [0]]], nbytes=0),
    "a name that is no text": put(arrays=[[["k"], "uint8", [0]]], nbytes=0),
    "a dtype that is no text": put(arrays=[["k", ["uint8"], [0]]], nbytes=0),
    "a key that is no text": put(key=5),
    "meta that is a list": put(meta=[]),
    "an unknown compression": put(compression="pickle"),
    "no list": lambda said, prefix: b"7",
    "no JSON": lambda said, prefix: b"{",
    "deep JSON": lambda said, prefix: b"[" * 100_000,
    "not UTF-8": lambda said, prefix: b"\xff",
}


@FORMS
@pytest.mark.parametrize("lie", LIES)
def test_lying_headers(lie, compression):
    """Sealed as it should be, and still nothing is believed, nor memory taken for it."""
    blob = b"".join(encode(ENTRY, "key", compression=compression))
    assert decode(reseal(blob, lambda said, prefix: None)).meta == ENTRY.meta
    false = reseal(blob, LIES[lie])
    tracemalloc.start()
    with pytest.raises(CorruptError):
        decode(false, "key")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_a_frame_of_another_size_than_it_says():
    """A bomb: its sizes are looked at before it is opened."""
    zstandard = pytest.importorskip("zstandard")
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    endless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
    zeros = Entry({"x": np.zeros(1000, np.uint8)}, {})
    blob = b"".join(encode(zeros, compression="zstd"))
    start, _ = measure(blob)
    for frame in (bomb, endless, b"", b"no frame"):

        def change(said, prefix, frame=frame):
            prefix[16:24] = len(frame).to_bytes(8, "little")
            prefix[24:40] = checksum([memoryview(frame)])

        with pytest.raises(CorruptError):
            decode(reseal(blob[:start] + frame, change))


def test_a_future_version(tmp_path):
    disk = Disk(tmp_path)
    disk.write("k", ENTRY)
    file = tmp_path / blob_name("k")

    def change(said, prefix):
        prefix[8:12] = (2).to_bytes(4, "little")

    file.write_bytes(reseal(file.read_bytes(), change))
    with pytest.raises(CorruptError, match="format 2 by a newer jkv; this one reads 1"):
        disk.read("k")
    assert disk.read("k") is None
    disk.write("k", ENTRY)
    assert disk.read("k") is not None


def test_what_else_may_lie_in_the_directory(tmp_path):
    """A restart among strangers: they stay, what claims to be a blob and is none goes aside."""
    disk = Disk(tmp_path)
    disk.write("good", ENTRY)
    disk.write("h" * 400, ENTRY)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "kx.jkv").write_bytes(b"")
    (tmp_path / "k_zz.jkv").write_bytes(b"not a name of ours")
    (tmp_path / "kempty.jkv").write_bytes(b"")
    (tmp_path / "kdirectory.jkv").mkdir()
    (tmp_path / "kdirectory.jkv" / "inside").write_bytes(b"kept")
    (tmp_path / "klink.jkv").symlink_to(tmp_path / blob_name("good"))
    (tmp_path / ("h" + "0" * 64 + ".jkv")).write_bytes(bytes(1000))
    os.mkfifo(tmp_path / "kpipe.jkv")
    (tmp_path / f".tmp-{0xDEAD:024x}").write_bytes(b"half of an en")
    (tmp_path / "kgood.jkv.__lock").write_bytes(b"half of another")
    disk = Disk(tmp_path)
    assert set(disk.scan()) == {"good", "h" * 400}
    left = {path.name for path in tmp_path.iterdir()}
    strangers = {"README.md", "sub", "k_zz.jkv", "quarantine"}
    assert left == strangers | {blob_name("good"), blob_name("h" * 400)}
    assert (tmp_path / "sub" / "kx.jkv").exists()
    aside = {path.name[21:]: path for path in (tmp_path / "quarantine").iterdir()}
    assert len(aside) == 5
    assert (aside["kdirectory.jkv"] / "inside").read_bytes() == b"kept"


@pytest.mark.parametrize("action", ["read", "write", "delete"])
def test_a_directory_in_the_place_of_a_file(tmp_path, action):
    disk = Disk(tmp_path)
    (tmp_path / blob_name("k") / "x").mkdir(parents=True)
    if action == "read":
        with pytest.raises(CorruptError, match="not a file"):
            disk.read("k")
    elif action == "write":
        disk.write("k", ENTRY)
        assert disk.read("k") is not None
    else:
        disk.delete("k")
        assert disk.read("k") is None
    disk.write("k", ENTRY)
    assert disk.read("k") is not None
    assert len(list((tmp_path / "quarantine").iterdir())) == 1


def test_quarantine_does_not_grow(tmp_path):
    disk = Disk(tmp_path)
    for i in range(40):
        disk.write("k", ENTRY)
        (tmp_path / blob_name("k")).write_bytes(f"{i}".encode())
        with pytest.raises(CorruptError):
            disk.read("k")
    kept = sorted((tmp_path / "quarantine").iterdir())
    assert [int(path.read_bytes()) for path in kept] == list(range(8, 40))


def test_a_directory_that_went_away(tmp_path):
    disk = Disk(tmp_path / "d")
    disk.write("k", ENTRY)
    os.rename(tmp_path / "d", tmp_path / "e")
    assert disk.read("k") is None
    disk.delete("k")
    for call in (disk.scan, disk.verify, lambda: disk.write("k", ENTRY)):
        with pytest.raises(TierError):
            call()
    (tmp_path / "d").mkdir()
    disk.write("k", ENTRY)
    assert disk.read("k") is not None


def test_nothing_that_is_read_is_executed():
    """No module of the store knows pickle or the like, and none evaluates texts."""
    known = re.compile(
        r"\b(?:pickle|marshal|shelve|dill|np\.load)\b|(?<!re\.)\b(?:eval|exec|compile)\("
    )
    assert known.findall("pickle.loads(x), eval(x), re.compile(x)") == ["pickle", "eval("]
    modules = sorted(Path(codec.__file__).parent.glob("*.py"))
    assert len(modules) > 20
    assert {path.name: hits for path in modules if (hits := known.findall(path.read_text()))} == {}
