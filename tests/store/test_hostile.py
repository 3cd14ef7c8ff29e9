"""Entries and directories of foreign making: sealed as they should be, and odd."""

from __future__ import annotations

import json
import os
import tracemalloc
import types

import numpy as np
import pytest

from jkv.errors import CorruptError, TierError, UnsupportedError
from jkv.store import Disk, Entry, Memory, Remote, Store, codec, zstd
from jkv.store.checksum import checksum
from jkv.store.codec import blob_name
from tests.store.fakes import Fake, check, entry, number
from tests.store.test_corruption import reseal

ODD = {
    "no version": lambda put: put.pop("version"),
    "a version that is a number": lambda put: put.update(version=7),
    "a long version": lambda put: put.update(version="f" * 5000),
    "no time": lambda put: put.pop("updated"),
    "a time that is a text": lambda put: put.update(updated="today"),
    "a time that is NaN": lambda put: put.update(created=float("nan")),
    "a time without end": lambda put: put.update(updated=float("inf")),
    "expires soon": lambda put: put.update(expires="soon"),
    "expires never": lambda put: put.update(expires=float("nan")),
    "expires in lists": lambda put: put.update(expires=[[1]]),
    "NaN seconds": lambda put: put.update(seconds=float("nan")),
    "endless seconds": lambda put: put.update(seconds=float("inf")),
    "huge seconds": lambda put: put.update(seconds=10**400),
    "seconds below 0": lambda put: put.update(seconds=-1.0),
    "true seconds": lambda put: put.update(seconds=True),
    "no fingerprint": lambda put: put.update(fingerprint=None),
    "a fingerprint in no hexadecimals": lambda put: put.update(fingerprint="xy"),
    "tokens that are no base64": lambda put: put.update(tokens="!"),
    "a part of a token": lambda put: put.update(tokens="AAAA"),
    "tokens below 0": lambda put: put.update(tokens="/////w=="),
    "tokens in a list": lambda put: put.update(tokens=[1, 2]),
    "whole by a text": lambda put: put.update(whole="no"),
    "packed by a number": lambda put: put.update(packed=1),
    "pinned by None": lambda put: put.update(pinned=None),
    "a liveness lock of numbers": lambda put: put.update(lifeline=[1]),
    "another format": lambda put: put.update(format=2),
    "no format": lambda put: put.pop("format"),
}


def changed(blob, how):
    """A blob in which what the store wrote is other, sealed."""

    def change(said, prefix):
        how(said["meta"]["store"])

    return reseal(blob, change)


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    with Store([Disk(path)], chunk=4) as store:
        store.put("odd", entry(1), tokens=range(20), seconds=4.0)
        store.put("good", entry(2), tokens=range(50, 70))
    return {key: (path / blob_name(f"0::{key}")).read_bytes() for key in ("odd", "good")}


def tiers(kind, path):
    if kind == "disk":
        return [Disk(path)]
    return [Remote(f"file://{path}/")] if kind == "remote" else [Memory(), Disk(path)]


@pytest.mark.parametrize("odd", ODD)
def test_odd_meta_is_a_miss_counted_and_put_aside(tmp_path, blobs, odd):
    """By key, by content, when listed, and beside an entry that is good."""
    name = blob_name("0::odd")
    for limits in ({}, {"tenant_bytes": 10**6}):  # headers are read by a thread, or at once
        (tmp_path / name).write_bytes(changed(blobs["odd"], ODD[odd]))
        (tmp_path / blob_name("0::good")).write_bytes(blobs["good"])
        with Store([Disk(tmp_path)], chunk=4, **limits) as store:
            store.drain()
            assert store.longest_prefix([*range(20), 1]) is None
            with store.longest_prefix([*range(50, 70), 1]) as match:
                assert number(match.value) == 2
            assert store.contains("odd") is False
            assert store.get("odd") is None
            assert number(store.get("good")) == 2
            figures = check(store)
            assert figures["tiers"]["disk"]["corrupt"] == 1
            assert store.refresh() == 0
        assert not (tmp_path / name).exists()
    assert len(list((tmp_path / "quarantine").iterdir())) == 2


@pytest.mark.parametrize("kind", ["remote", "memory above"])
@pytest.mark.parametrize("odd", ["no version", "NaN seconds", "expires soon"])
def test_odd_meta_in_other_tiers(tmp_path, blobs, kind, odd):
    (tmp_path / blob_name("0::odd")).write_bytes(changed(blobs["odd"], ODD[odd]))
    (tmp_path / blob_name("0::good")).write_bytes(blobs["good"])
    with Store(tiers(kind, tmp_path), chunk=4) as store:
        store.drain()
        assert store.get_many(["odd", "good"])[0] is None
        assert store.get("odd") is None
        assert store.prefetch(["odd", "good"]) >= 1
        store.drain()
        assert number(store.get("good")) == 2
        store.put("odd", entry(3))
        assert number(store.get("odd")) == 3
        check(store)


@pytest.mark.parametrize("odd", ["no version", "NaN seconds", "expires soon"])
def test_a_tier_of_ones_own_that_answers_oddly(blobs, odd):
    whole = codec.decode(blobs["odd"])
    put = dict(whole.meta["store"])
    ODD[odd](put)
    tier = Fake(name="disk")
    for meta in ({**whole.meta, "store": put}, {**whole.meta, "store": "text"}):
        tier.entries["0::odd"] = Entry(whole.arrays, meta)
        for listed in (True, False):
            with Store([Fake(), tier], chunk=4) as store:
                if not listed:
                    store._index.records.clear()
                store.drain()
                assert store.get("odd") is None
                assert store.get_many(["odd", "odd"]) == [None, None]
                assert store.stats()["tiers"]["disk"]["corrupt"] >= 1
            tier.entries["0::odd"] = Entry(whole.arrays, meta)


def test_quarantine_keeps_to_its_own(tmp_path):
    """What lies there and jkv has not put there stays, however much there is of it."""
    disk = Disk(tmp_path)
    aside = tmp_path / "quarantine"
    aside.mkdir()
    others = ["notes.txt", "0", "00000000000000000001-notes.txt", "1-ka.jkv", f"{7:020d}-"]
    for other in others:
        (aside / other).write_text("mine")
    (aside / f"{1:020d}-kdirectory.jkv").mkdir()
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (aside / f"{2:020d}-klink.jkv").symlink_to(outside)
    for i in range(40):
        disk.write("k", entry(i))
        (tmp_path / blob_name("k")).write_bytes(b"%d" % i)
        with pytest.raises(CorruptError):
            disk.read("k")
    left = {path.name for path in aside.iterdir()}
    assert left >= {*others, f"{1:020d}-kdirectory.jkv", f"{2:020d}-klink.jkv"}
    own = sorted(path for path in aside.iterdir() if path.name.endswith("-kk.jkv"))
    assert [int(path.read_bytes()) for path in own] == list(range(8, 40))
    disk.purge(["k", "link", "directory"])
    assert {path.name for path in aside.iterdir()} == {
        *others,
        f"{1:020d}-kdirectory.jkv",
        f"{2:020d}-klink.jkv",
    }
    assert outside.read_text() == "mine"


def test_leftovers_are_of_names_that_a_store_gives(tmp_path):
    users = [".tmp-mine", ".tmp-", ".tmp-" + "x" * 24, "notes.jkv.__lock", "foo.__lock"]
    left = [".tmp-" + "a" * 24, f"{blob_name('0::a')}.__lock"]
    for name in users + left:
        (tmp_path / name).write_text("text")
    with Store([Disk(tmp_path)]):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(users)


def test_quarantine_that_is_a_link_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    kept = [elsewhere / f"{i:020d}-kk.jkv" for i in range(50)]
    for path in kept:
        path.write_text("mine")
    disk = Disk(tmp_path / "d")
    (tmp_path / "d" / "quarantine").symlink_to(elsewhere)
    disk.write("k", entry(1))
    (tmp_path / "d" / blob_name("k")).write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(CorruptError):
            disk.read("k")
    disk.purge(["k"])
    assert sorted(elsewhere.iterdir()) == kept
    disk.write("k", entry(2))
    assert number(disk.read("k")) == 2


def peak_of(run):
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bomb(nbytes, behind=b""):
    """A frame of zeros, and a header that says so; `behind` follows it."""
    zeros = Entry({"x": np.zeros(1000, np.uint8)}, {})
    blob = b"".join(codec.encode(zeros, "k", compression="zstd"))
    frame = zstd.compress(bytes(nbytes), "zstd") + behind
    start, _ = codec.measure(blob)

    def change(said, prefix):
        prefix[16:24] = len(frame).to_bytes(8, "little")
        prefix[24:40] = checksum([memoryview(frame)])
        said.update(arrays=[["x", "uint8", [nbytes]]], nbytes=nbytes)

    return reseal(blob[:start] + frame, change)


def test_a_small_frame_does_not_become_a_large_entry(tmp_path):
    pytest.importorskip("zstandard")
    disk = Disk(tmp_path, max_bytes=1 << 20)
    (tmp_path / blob_name("k")).write_bytes(blob := bomb(1 << 28))
    assert len(blob) < 40_000

    def read():
        with pytest.raises(CorruptError, match="would become"):
            disk.read("k")

    assert peak_of(read) < 4 << 20
    (tmp_path / blob_name("k")).write_bytes(bomb(1 << 20))  # and what is small may be all zeros
    assert disk.read("k") is not None


BEHIND = {
    "a large frame": lambda: zstd.compress(bytes(1 << 28), "zstd"),
    "a frame of nothing": lambda: zstd.compress(b"", "zstd"),
    "a frame to be skipped": lambda: b"\x50\x2a\x4d\x18" + bytes(4),
    "no frame": lambda: b"x",
}


@pytest.mark.parametrize("behind", BEHIND)
def test_what_follows_a_frame_is_not_decompressed(tmp_path, behind):
    """The size that is checked is the first frame's; some libraries would go on with all."""
    pytest.importorskip("zstandard")
    disk = Disk(tmp_path)
    (tmp_path / blob_name("k")).write_bytes(bomb(1000, BEHIND[behind]()))

    def read():
        with pytest.raises(CorruptError, match="not to be decompressed"):
            disk.read("k")

    assert peak_of(read) < 4 << 20


@pytest.mark.parametrize("nbytes", [1 << 20, 1 << 23])
def test_what_is_written_compressed_can_be_read(tmp_path, nbytes):
    pytest.importorskip("zstandard")
    disk = Disk(tmp_path, compression="zstd")
    disk.write("k", Entry({"x": np.zeros(nbytes, np.uint8)}, {}))
    assert disk.read("k").nbytes == nbytes


def sealed(text, payload=b""):
    blob = b"".join(codec.encode(Entry({}, {}), "k"))

    def change(said, prefix):
        prefix[16:24] = len(payload).to_bytes(8, "little")
        return text

    return reseal(blob, change) + payload


HEADERS = {
    "as long as nothing needs": b'{"meta": {"x": "' + b"a" * (2 << 20) + b'"}}',
    "a million lists": b"[" + b"[]," * 1_000_000 + b"[]]",
    "a name twice": b'{"key": "k", "key": "k", "arrays": [], "meta": {}, "compression": null, '
    b'"nbytes": 0}',
    "deep meta": b'{"key": "k", "arrays": [], "meta": {"x": '
    + b"[" * 300
    + b"]" * 300
    + b'}, "compression": null, "nbytes": 0}',
    "a long dtype": json.dumps({"arrays": [["x", "d" * 900_000, []]]}).encode(),
    "a long name": json.dumps({"arrays": [["x" * 900_000, "int8", [-1]]]}).encode(),
    "many axes": json.dumps({"arrays": [["x", "int8", [1] * 300_000]]}).encode(),
    "huge and empty": json.dumps({"arrays": [["x", "int8", [0, 1 << 47, 1 << 47]]]}).encode(),
    "a long compression": json.dumps({"compression": "z" * 900_000, "arrays": []}).encode(),
    "a long size": json.dumps({"nbytes": "9" * 900_000, "arrays": []}).encode(),
    "a long form of the store": json.dumps(
        {"arrays": [], "meta": {"store": {"format": "f" * 900_000}}}
    ).encode(),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_take_no_more_than_entries_need(tmp_path, kind):
    text = HEADERS[kind]
    rest = {"key": "k", "arrays": [], "meta": {}, "compression": None, "nbytes": 0}
    if text.startswith(b'{"') and b'"key"' not in text:
        text = json.dumps({**rest, **json.loads(text)}).encode()
    disk = Disk(tmp_path)
    path = tmp_path / blob_name("k")
    for call in (disk.describe, disk.read):
        path.write_bytes(sealed(text))
        errors = []

        def run(call=call, errors=errors):
            with pytest.raises(CorruptError) as caught:
                call("k")
            errors.append(str(caught.value))

        assert peak_of(run) < 16 << 20
        assert len(errors[0]) < 1000


def test_meta_that_is_too_much_is_refused_when_it_is_written(tmp_path):
    disk = Disk(tmp_path)
    with pytest.raises(UnsupportedError, match="put large values into arrays"):
        disk.write("k", Entry({}, {"x": "a" * (2 << 20)}))
    large = Entry({"x": np.zeros(3 << 20, np.uint8)}, {"x": "a" * (2 << 20)})
    disk.write("k", large)
    assert disk.read("k").meta == large.meta
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UnsupportedError, match="JSON"):
        disk.write("k", Entry({}, {"x": deep}))


def test_pipes_and_devices(tmp_path):
    disk = Disk(tmp_path)
    name = blob_name("k")
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        make(tmp_path / name)
        for call in (disk.describe, disk.version_of, disk.read):
            with pytest.raises((CorruptError, TierError)):
                call("k")
        disk.delete("k")


class Wire:
    """A kvstore of which some replies come damaged, each in its own way."""

    def __init__(self, kvstore, bad):
        self._kvstore, self.bad, self.reads = kvstore, bad, 0

    def __getattr__(self, name):
        return getattr(self._kvstore, name)

    def read(self, name, **options):
        future = self._kvstore.read(name, **options)
        self.reads += 1
        return Reply(future, self.reads) if self.bad(self.reads) else future


class Reply:
    """What was read, with a byte changed on the way."""

    def __init__(self, future, number):
        self._future, self._number = future, number

    def result(self, timeout):
        result = self._future.result(timeout=timeout)
        if result.state != "value":
            return result
        damaged = type("Damaged", (), {})()
        damaged.state, damaged.stamp = result.state, result.stamp
        damaged.value = result.value[:-1] + bytes([result.value[-1] ^ self._number])
        return damaged

    def cancel(self):
        self._future.cancel()


def test_a_bad_reply_is_asked_for_again(tmp_path):
    remote, other = Remote(f"file://{tmp_path}/"), Remote(f"file://{tmp_path}/")
    remote.write("k", entry(1))
    remote._kvstore = Wire(remote._kvstore, lambda n: n == 1)
    assert number(remote.read("k")) == 1
    assert number(other.read("k")) == 1


def test_bad_replies_remove_nothing_that_others_share(tmp_path):
    remote, other = Remote(f"file://{tmp_path}/"), Remote(f"file://{tmp_path}/")
    remote.write("0::k", entry(1))
    remote._kvstore = Wire(remote._kvstore, lambda n: True)
    with Store([remote]) as store:
        assert store.get("k") is None
        with pytest.raises(CorruptError, match="still there"):
            remote.read("0::k")
        assert "still there" in remote.verify()[blob_name("0::k")]
        assert number(other.read("0::k")) == 1
        remote._kvstore.bad = lambda n: False
        assert number(store.get("k")) == 1
        check(store)


def test_what_is_written_while_a_damaged_one_is_put_aside_stays(tmp_path):
    remote, other = Remote(f"file://{tmp_path}/"), Remote(f"file://{tmp_path}/")
    remote.write("k", entry(1))
    (tmp_path / blob_name("k")).write_bytes(b"damaged" * 20)
    ask = remote._ask

    def asked(what, start):
        if what == "delete":
            other.write("k", entry(2))
        return ask(what, start)

    remote._ask = asked
    with pytest.raises(CorruptError):
        remote.read("k")
    assert number(other.read("k")) == 2


@pytest.mark.parametrize("damaged", [b"", bytes(64)])
def test_no_put_is_deleted_because_of_one_reply(tmp_path, damaged):
    remote = Remote(f"file://{tmp_path}/")
    with Store([remote]) as store:
        store.put("k", entry(1))
    read, replies = remote._ask_all, []

    def asked(what, start):
        (result,) = read(what, start)
        if what == "look":
            replies.append(result)
            if len(replies) == 1:
                return [types.SimpleNamespace(state="value", value=damaged, stamp=result.stamp)]
        return [result]

    remote._ask_all = asked
    assert not remote.delete_put("0::k", "0" * 16)
    assert len(replies) == 2
    assert number(remote.read("0::k")) == 1


def test_of_a_remote_one_put_is_deleted_and_no_other(tmp_path):
    remote = Remote(f"file://{tmp_path}/")
    assert remote.delete_put("k", "0" * 16)
    with Store([remote]) as store:
        store.put("k", entry(1))
        version = store._index.records["0::k"].version
        assert not remote.delete_put("0::k", "0" * 16)
        assert remote.read("0::k") is not None
        assert remote.delete_put("0::k", version)
        assert remote.read("0::k") is None
