"""What holds for every tier: what was written comes back, to the bit, under any key."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jkv.errors import CorruptError, TierError, UnsupportedError
from jkv.store import Device, Disk, Entry, Memory, Remote
from jkv.store.codec import blob_key, blob_name, is_blob_name
from jkv.store.remote import Breaker

KEYS = ["", "a", "A", "../x", "a/b", "/etc/passwd", ".", "..", "a\0b", "naïve 漢字 🙂", "\ud800"]
KEYS += ["k" * 180, "k" * 181, "é" * 5000, "a.jkv", ".tmp-1", "quarantine", "CON", "a_2f", "a%2f"]
DTYPES = [np.bool_, np.int8, np.uint8, np.int32, np.float16, np.float32, np.complex64]
DTYPES += [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4]

TIERS = {
    "memory": lambda path: Memory(),
    "device": lambda path: Device(),
    "disk": lambda path: Disk(path / "disk"),
    "disk, zstd": lambda path: Disk(path / "disk", compression="zstd"),
    "remote memory": lambda path: Remote("memory://some/"),
    "remote file": lambda path: Remote(f"file://{path}/remote"),
    "remote, zstd": lambda path: Remote("memory://", compression="zstd"),
}


@pytest.fixture(params=TIERS)
def tier(request, tmp_path: Path):
    tier = TIERS[request.param](tmp_path)
    yield tier
    tier.close()


def entry(seed: int = 0, size: int = 300) -> Entry:
    """A value that says of itself what it is."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((2, size)).astype(ml_dtypes.bfloat16)
    return Entry({"k": keys, "n": np.asarray(seed)}, {"tokens": size, "seconds": 0.25, "to": [1]})


def same(a: Entry | None, b: Entry) -> bool:
    if a is None or a.meta != b.meta or list(a.arrays) != list(b.arrays):
        return False
    return all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == y.tobytes()
        for x, y in zip(a.arrays.values(), b.arrays.values(), strict=True)
    )


def test_written_read_overwritten_deleted(tier):
    assert tier.read("a") is None
    assert tier.scan() == {}
    taken = tier.write("a", entry(1))
    assert same(tier.read("a"), entry(1))
    assert tier.scan() == {"a": taken}
    tier.write("b", entry(2))
    larger = tier.write("a", entry(3, 4000))
    assert larger > taken
    assert same(tier.read("a"), entry(3, 4000))
    assert same(tier.read("b"), entry(2))
    assert tier.scan()["a"] == larger
    tier.delete("a")
    tier.delete("a")
    tier.delete("never there")
    assert tier.read("a") is None
    assert list(tier.scan()) == ["b"]
    tier.write("a", entry(4))
    assert same(tier.read("a"), entry(4))


def test_any_text_is_a_key(tier, tmp_path):
    sizes = {key: tier.write(key, entry(i)) for i, key in enumerate(KEYS)}
    assert all(same(tier.read(key), entry(i)) for i, key in enumerate(KEYS))
    assert tier.scan() == sizes
    places = {path.parent for path in tmp_path.rglob("*") if path.is_file()}
    assert places <= {tmp_path / "disk", tmp_path / "remote"}
    for key in KEYS:
        tier.delete(key)
        assert tier.read(key) is None
    assert tier.scan() == {}


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7, 5)], ids=str)
def test_every_dtype_and_shape_to_the_bit(tier, shape):
    rng = np.random.default_rng(0)
    arrays = {}
    for dtype in map(np.dtype, DTYPES):
        bits = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
        if dtype.kind == "b":
            bits &= 1
        if dtype == ml_dtypes.int4:
            bits &= 15
        arrays[dtype.name] = np.ndarray(shape, dtype, buffer=bits.tobytes() or b"\0")
    arrays["transposed"] = rng.standard_normal((4, 6)).T
    arrays["stepped"] = np.arange(20)[::-3]
    written = Entry(arrays, {"": None})
    tier.write("k", written)
    assert same(tier.read("k"), written)


def test_no_arrays_and_much_meta(tier):
    meta = {"text": "é\ud800" * 999, "n": 2**80, "x": [None, True, {"deep": [1.5, -0.0]}], "": 0}
    tier.write("k", Entry({}, meta))
    read = tier.read("k")
    assert not read.arrays
    assert read.meta == meta


def test_what_was_written_cannot_change(tier):
    mine = np.arange(10.0)
    view = mine[:8]
    view.flags.writeable = False
    tier.write("k", Entry({"own": mine, "view": view}, {}))
    mine[:] = -1
    read = tier.read("k")
    assert read.arrays["own"].tolist() == list(range(10))
    assert read.arrays["view"].tolist() == list(range(8))
    for array in read.arrays.values():
        with pytest.raises((ValueError, TypeError), match=r"read-only|immutable"):
            array[0] = 5


def test_threads_see_whole_values(tier):
    """Eight of them write, read and delete four keys: a value is one that was written, or none."""
    valid = {str(key): [entry(10 * key + i, 64 + i) for i in range(3)] for key in range(4)}
    start = threading.Barrier(8)

    def work(seed: int) -> int:
        rng = np.random.default_rng(seed)
        start.wait(30)
        hits = 0
        for _ in range(25):
            key = str(rng.integers(4))
            match rng.integers(4):
                case 0 | 1:
                    tier.write(key, valid[key][rng.integers(3)])
                case 2:
                    if (read := tier.read(key)) is not None:
                        assert any(same(read, value) for value in valid[key])
                        hits += 1
                case 3 if rng.random() < 0.2:
                    tier.delete(key)
        return hits

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) > 0
    assert set(tier.scan()) <= set(valid)


@pytest.mark.parametrize("name", ["disk", "remote file", "remote memory"])
def test_refuses_what_a_blob_cannot_say(name, tmp_path):
    tier = TIERS[name](tmp_path)
    for wrong in (np.array(["text"]), np.array([None]), np.zeros(3, ">f4"), np.zeros(2, "M8[s]")):
        with pytest.raises(UnsupportedError, match="which blobs do not hold"):
            tier.write("k", Entry({"x": wrong}, {}))
    with pytest.raises(UnsupportedError, match="JSON"):
        tier.write("k", Entry({}, {"x": {1, 2}}))
    with pytest.raises(UnsupportedError, match="'zstd'"):
        Disk(tmp_path, compression="gzip")
    assert tier.scan() == {}
    tier.write("k", entry())
    assert same(tier.read("k"), entry())


def test_names():
    made = {key: blob_name(key) for key in KEYS}
    assert len(set(made.values())) == len(KEYS)
    for key, name in made.items():
        assert is_blob_name(name)
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.")
        assert len(name) + len(".__lock") <= 255
        assert blob_key(name) == (key if name.startswith("k") else None)
    assert made["a"] == "ka.jkv"
    strangers = [
        "",
        "a.jkv",
        "kA.jkv",
        "k_.jkv",
        "k_zz.jkv",
        "k_61.jkv",
        "k_ff.jkv",
        "ka",
        "ha.jkv",
    ]
    assert not any(map(is_blob_name, [*strangers, "README.md", "ka.jkv.__lock", "k..jkv"]))


def test_disk_and_remote_share_a_directory(tmp_path):
    disk, remote = Disk(tmp_path), Remote(f"file://{tmp_path}")
    disk.write("a/b", entry(1))
    remote.write("c" * 300, entry(2))
    for tier in (disk, remote):
        assert same(tier.read("a/b"), entry(1))
        assert same(tier.read("c" * 300), entry(2))
        assert set(tier.scan()) == {"a/b", "c" * 300}
        assert tier.verify() == {}
    assert disk.scan() == remote.scan()


def test_compressed_and_plain_are_read_alike(tmp_path):
    plain, packed = Disk(tmp_path), Disk(tmp_path, compression="zstd")
    zeros = Entry({"z": np.zeros((64, 1024), ml_dtypes.bfloat16)}, {})
    assert packed.write("z", zeros) < zeros.nbytes / 100
    assert plain.write("p", zeros) > zeros.nbytes
    noise = Entry({"n": np.frombuffer(np.random.default_rng(0).bytes(4096), np.uint8)}, {})
    assert packed.write("n", noise) < 4096 + 300  # not made larger
    for tier in (plain, packed):
        assert same(tier.read("z"), zeros)
        assert same(tier.read("p"), zeros)
        assert same(tier.read("n"), noise)


def test_without_zstd(tmp_path, monkeypatch):
    """What to install is said at once; what is there already is no miss and no crash."""
    from jkv.store import zstd

    Disk(tmp_path, compression="zstd").write("k", Entry({"z": np.zeros(1000)}, {}))

    def missing():
        raise UnsupportedError("pip install 'jkv-jax[zstd]'")

    monkeypatch.setattr(zstd, "_zstd", missing)
    with pytest.raises(UnsupportedError, match="pip install"):
        Disk(tmp_path, compression="zstd")
    with pytest.raises(TierError, match="pip install"):
        Disk(tmp_path).read("k")
    assert list(Disk(tmp_path).scan()) == ["k"]


def test_batches_are_as_single_calls(tmp_path):
    disk = Disk(tmp_path)
    entries = {f"key {i}": entry(i, 20) for i in range(70)}
    sizes = disk.write_many(entries)
    assert disk.scan() == sizes
    read = disk.read_many([*entries, "none"])
    assert all(same(read[key], value) for key, value in entries.items())
    assert read["none"] is None


def test_arrays_lie_as_xla_likes_them(tmp_path):
    disk = Disk(tmp_path)
    disk.write("k", Entry({str(n): np.ones(n, np.int8) for n in (1, 3, 64, 65, 1000)}, {}))
    assert all(array.ctypes.data % 64 == 0 for array in disk.read("k").arrays.values())


def test_disk_scans_the_least_recently_written_first(tmp_path):
    import os

    disk = Disk(tmp_path)
    for at, key in enumerate(["b", "c" * 400, "a"]):
        disk.write(key, entry())
        os.utime(tmp_path / blob_name(key), (at, at))
    assert list(disk.scan()) == ["b", "c" * 400, "a"]


def test_memory_keeps_arrays_that_nobody_can_write_to():
    memory = Memory()
    frozen = np.arange(1000)
    frozen.flags.writeable = False
    small = np.frombuffer(bytes(100_000), np.uint8)[:10]  # holds much more than it shows
    memory.write("k", Entry({"x": frozen}, {}))
    memory.write("s", Entry({"x": small}, {}))
    assert memory.read("k").arrays["x"] is frozen
    assert memory.read("s").arrays["x"].base is None
    writeable = np.ndarray(10, np.uint8, buffer=(buffer := bytearray(10)))
    writeable.flags.writeable = False
    memory.write("b", Entry({"x": writeable}, {}))
    buffer[:] = b"x" * 10
    assert not memory.read("b").arrays["x"].any()


def test_a_breaker_opens_tries_and_closes():
    now = [0.0]
    breaker = Breaker(failures=2, wait=1.0, longest=3.0, clock=lambda: now[0])
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    assert breaker.allow()
    breaker.failed()
    assert breaker.is_open
    waits = []
    for _ in range(4):  # every trial fails: it waits longer, up to a point
        since = now[0]
        while not breaker.allow():
            now[0] += 0.125
        waits.append(now[0] - since)
        assert not breaker.allow()  # one trial, not two
        breaker.failed()
    assert waits == [1, 2, 3, 3]
    now[0] += 3
    assert breaker.allow()
    breaker.succeeded()
    assert breaker.allow()
    assert breaker.allow()
    counts = breaker.stats()
    assert (counts["failures"], counts["opened"], counts["trials"], counts["open"]) == (7, 1, 5, 0)
    with pytest.raises(ValueError, match="failures >= 1"):
        Breaker(failures=0)


def test_remote_says_what_it_cannot_open(tmp_path):
    for url in ("nonsense", "ftp://somewhere/", "s3://", {"driver": "none"}):
        with pytest.raises(TierError, match="no remote tier at"):
            Remote(url)
    with pytest.raises(ValueError, match="seconds above 0"):
        Remote("memory://", timeout=0.0)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TierError, match="no directory for the disk tier"):
        Disk(tmp_path / "file")
    with pytest.raises(TierError, match="no directory"):
        Disk(tmp_path / "file" / "below")


def test_remote_puts_aside_what_is_damaged():
    remote = Remote("memory://x")
    remote.write("a", entry(1))
    blob = remote._kvstore[blob_name("a")]
    remote._kvstore[blob_name("a")] = blob[:-1]
    remote._kvstore[blob_name("b")] = blob
    remote._kvstore[blob_name("c")] = b""
    remote._kvstore["README"] = b"somebody else's"
    assert "b" not in remote.scan() or remote.scan()["b"] == len(blob)
    with pytest.raises(CorruptError, match="bytes where"):
        remote.read("a")
    assert remote.read("a") is None
    assert remote._kvstore["quarantine/ka.jkv"] == blob[:-1]
    assert set(remote.verify()) == {blob_name("b"), blob_name("c")}
    assert remote.scan() == {}
    assert remote._kvstore["README"] == b"somebody else's"
    remote.write("a", entry(2))
    assert same(remote.read("a"), entry(2))
