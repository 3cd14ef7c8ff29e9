"""What users give a store: refused at once where it cannot be, and never looked at afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jkv.store import Device, Disk, Entry, Memory, Predictor, Remote, Store, Tier
from tests.store.fakes import check, entry, number

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def store():
    with Store([Memory()], chunk=4) as it:
        yield it


@pytest.mark.parametrize("key", [1, b"b", 1.5, True, ("a",), None, np.str_])
def test_keys_are_texts(store, key):
    """1 and "1" would be one, and b"b" and "b'b'"."""
    calls = [
        lambda: store.get(key),
        lambda: store.get_entry(key),
        lambda: store.get_many(["a", key]),
        lambda: store.open(key),
        lambda: store.open_many([key]),
        lambda: store.contains(key),
        lambda: store.remove(key),
        lambda: store.unpin(key),
        lambda: store.prefetch([key]),
        lambda: store.put("a", entry(1), tenant=key),
        lambda: store.get("a", tenant=key),
        lambda: store.longest_prefix(range(9), tenant=key),
    ]
    if key is not None:
        calls += [
            lambda: store.put(key, entry(1)),
            lambda: store.put_many([key], [entry(1)]),
        ]
    for call in calls:
        with pytest.raises(TypeError, match=r"(key|tenant) got .*; expected a text"):
            call()
    assert len(store) == 0
    check(store, accesses=0)


def test_keys_of_a_class_of_ones_own_are_their_texts(store):
    class Name(str):
        def __format__(self, spec):
            return "another"

    store.put(Name("k"), entry(1))
    assert number(store.get("k")) == 1


BAD_PUTS = [
    ({"seconds": NAN}, ValueError),
    ({"seconds": -1.0}, ValueError),
    ({"seconds": INF}, ValueError),
    ({"seconds": "1"}, TypeError),
    ({"seconds": True}, TypeError),
    ({"ttl": NAN}, ValueError),
    ({"ttl": -1}, ValueError),
    ({"ttl": INF}, ValueError),
    ({"ttl": [1]}, TypeError),
    ({"fingerprint": "text"}, TypeError),
    ({"fingerprint": 7}, TypeError),
    ({"pin": 1}, TypeError),
    ({"whole": "no"}, TypeError),
    ({"ephemeral": None}, TypeError),
    ({"tokens": [1.5]}, ValueError),
]


@pytest.mark.parametrize(("bad", "error"), BAD_PUTS, ids=[str(bad) for bad, _ in BAD_PUTS])
def test_a_bad_put_changes_nothing(store, bad, error):
    store.put("k", entry(1), tokens=range(8))
    for value in (entry(2), entry(2, seconds=bad["seconds"]) if "seconds" in bad else entry(2)):
        how = bad if value.meta.get("seconds") is None else {}
        with pytest.raises(error, match=f"{next(iter(bad))}.* got |tokens got"):
            store.put("k", value, **how)
    assert number(store.get("k")) == 1
    assert store.longest_prefix(range(8)).length == 8
    assert check(store)["puts"] == 1
    store.put("k", entry(3))
    assert number(store.get("k")) == 3


def test_one_bad_value_of_many_changes_nothing(store):
    with pytest.raises(ValueError, match="seconds got nan"):
        store.put_many(["a", "b"], [entry(1), entry(2)], seconds=[1.0, NAN])
    assert len(store) == 0
    check(store)


MAKERS = {
    "memory": lambda tmp, **how: Memory(**how),
    "device": lambda tmp, **how: Device(**how),
    "disk": lambda tmp, **how: Disk(tmp / "d", **how),
    "remote": lambda tmp, **how: Remote("memory://x/", **how),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", ["max_bytes", "max_entries"])
def test_limits_are_whole_numbers(tmp_path, maker, name):
    for bad, error in ((-1, ValueError), ("1MB", TypeError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"{name} got .*; expected a whole number from 0"):
            MAKERS[maker](tmp_path, **{name: bad})
        tier = MAKERS[maker](tmp_path)
        with Store([tier]) as store:
            with pytest.raises(error, match=f"{name} got"):
                store.resize(0, **{name: bad})
            assert getattr(tier, name) is None
        setattr(tier, name, bad)
        with pytest.raises(error, match=f"{name} of the tier"):
            Store([tier])
    assert not (tmp_path / "d" / "quarantine").exists()


BAD_STORES = [
    ("memory", TypeError, "tiers got 'memory'; expected a list"),
    (["memory"], TypeError, "expected objects such as"),
    (Memory(), TypeError, "tiers got .*; expected a list"),
    ([Memory], TypeError, "expected objects such as"),
    ([None], TypeError, "expected objects such as"),
    ([SimpleNamespace(name="memory")], TypeError, "delete, read, scan, write"),
    ({"memory": 1}, TypeError, "expected a list"),
    ([], ValueError, "at least one"),
    ([TIER := Memory(), TIER], ValueError, "one tier twice"),
]


@pytest.mark.parametrize(("tiers", "error", "words"), BAD_STORES)
def test_tiers_are_tiers(tiers, error, words):
    with pytest.raises(error, match=words):
        Store(tiers)


class Plain(Tier):
    """A tier of a user's own: no more than it must have."""

    def __init__(self):
        super().__init__(max_bytes=1000)
        self.kept = {}

    def scan(self):
        return {}

    def write(self, key, entry):
        self.kept[key] = entry
        return entry.nbytes

    def read(self, key):
        return self.kept.get(key)

    def delete(self, key):
        self.kept.pop(key, None)


def test_a_tier_of_one_s_own_needs_four_methods(tmp_path):
    with pytest.raises(TypeError, match="abstract"):
        Tier()
    own = Plain()
    with Store([own, Disk(tmp_path)], write_through=True) as store:
        assert [*store.stats()["tiers"]] == ["tier", "disk"]
        store.put_many(["a", "b"], [entry(1), entry(2)], tokens=[[1] * 20, [2] * 20])
        assert len(own.kept) == 2
        assert [number(got) for got in store.get_many(["a", "b", "a", "c"])] == [1, 2, 1, None]
        store.put("c", entry(3), ephemeral=True)
        assert store.refresh() == 0
        assert store.reject("b")
        assert store.remove("a")
        assert len(own.kept) == 1
        check(store)


BAD_OPTIONS = [
    ({"ttl": NAN}, ValueError),
    ({"ttl": "1"}, TypeError),
    ({"ttl": -5}, ValueError),
    ({"sweep_every": 0}, ValueError),
    ({"sweep_every": -1.0}, ValueError),
    ({"sweep_every": NAN}, ValueError),
    ({"sweep_every": "1h"}, TypeError),
    ({"fingerprint": "text"}, TypeError),
    ({"tenant_bytes": -1}, ValueError),
    ({"tenant_bytes": 1.5}, TypeError),
    ({"tenant_bytes": {"a": -1}}, ValueError),
    ({"tenant_bytes": {1: 5}}, TypeError),
    ({"chunk": 0}, ValueError),
    ({"chunk": 1.5}, TypeError),
    ({"queue_entries": 0}, ValueError),
    ({"queue_bytes": -1}, ValueError),
    ({"queue_bytes": "1MB"}, TypeError),
    ({"write_through": 1}, TypeError),
    ({"policy": "lru"}, TypeError),
    ({"forms": "int8"}, TypeError),
    ({"predictor": True}, TypeError),
    ({"predictor": "markov"}, TypeError),
    ({"clock": 5}, TypeError),
    ({"timer": None}, TypeError),
    ({"convert": "int8"}, TypeError),
]


@pytest.mark.parametrize(("bad", "error"), BAD_OPTIONS, ids=[str(bad) for bad, _ in BAD_OPTIONS])
def test_options_of_a_store(bad, error):
    with pytest.raises(error, match=rf"{next(iter(bad))}.* got .*; expected"):
        Store([Memory()], **bad)


def test_arguments_of_reads(store):
    store.put("k", entry(1), tokens=range(8), seconds=1.0)
    calls = [
        (lambda: store.get("k", recompute_seconds=NAN), "recompute_seconds"),
        (lambda: store.get("k", recompute_seconds=-1), "recompute_seconds"),
        (lambda: store.longest_prefix(range(8), recompute_seconds=NAN), "recompute_seconds"),
        (lambda: store.longest_prefix(range(8), limit=-1), "limit"),
        (lambda: store.sweep(NAN), "older_than"),
        (lambda: store.sweep(-1), "older_than"),
    ]
    for call, name in calls:
        with pytest.raises(ValueError, match=f"{name} got"):
            call()
    for call in (
        lambda: store.get("k", fingerprint="text"),
        lambda: store.longest_prefix(range(8), fingerprint="text"),
        lambda: store.longest_prefix(range(8), limit=1.5),
        lambda: store.get("k", recompute_seconds="1"),
        lambda: store.sweep("1"),
        lambda: store.resize(False, max_bytes=1),
    ):
        with pytest.raises((TypeError, ValueError), match="got"):
            call()
    assert number(store.get("k", recompute_seconds=INF)) == 1
    check(store, accesses=1)


@pytest.mark.parametrize("timeout", [0, -1, NAN, INF, "5", None, True])
def test_timeouts_of_a_remote(timeout):
    with pytest.raises((TypeError, ValueError), match="timeout got"):
        Remote("memory://x/", timeout=timeout)


def changing(kind):
    """An array whose memory its owner can change, and how."""
    if kind == "bytearray":
        owner = bytearray(80)
        return np.frombuffer(owner, np.int64), owner
    if kind == "bytearray, read-only":
        owner = bytearray(80)
        return np.frombuffer(memoryview(owner).toreadonly(), np.int64), owner
    owner = np.zeros(1024, np.int64)
    if kind == "numpy":
        return owner, owner
    if kind == "numpy, a read-only view":
        view = owner.view()
        view.flags.writeable = False
        return view, owner
    if kind == "numpy, by a buffer that is read-only":
        return np.frombuffer(owner.data.toreadonly(), np.int64), owner
    room = np.zeros(1024 + 16, np.float32)
    owner = room[-room.ctypes.data % 64 // 4 :][:1024]  # where JAX takes it without a copy
    array = jax.device_put(owner)
    return (array if kind == "jax" else np.asarray(array)), owner


KINDS = [
    "bytearray",
    "bytearray, read-only",
    "numpy",
    "numpy, a read-only view",
    "numpy, by a buffer that is read-only",
    "jax",
    "jax, as numpy has it",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tier", [Memory, Device])
def test_what_was_put_is_what_it_was(kind, tier):
    array, owner = changing(kind)
    meta = {"list": [1]}
    with Store([tier()]) as store:
        store.put("k", Entry({"x": array}, meta))
        owner[:8] = bytes([1] * 8) if isinstance(owner, bytearray) else 1
        meta["list"].append(2)
        got = store.get("k")
        assert not np.asarray(got.arrays["x"]).any()
        assert got.meta == {"list": [1]}


def test_tokens_are_copied():
    tokens = np.arange(8)
    with Store([Memory()], chunk=4) as store:
        store.put("k", entry(1), tokens=tokens)
        tokens[:] = 0
        assert store.longest_prefix(range(8)).length == 8


def test_what_a_tier_has_read_is_not_copied(tmp_path):
    disk, memory = Disk(tmp_path), Memory()
    disk.write("k", Entry({"x": np.arange(1000), "y": np.zeros(9)}, {}))
    read = disk.read("k")
    memory.write("k", read)
    for name in ("x", "y"):
        assert memory.read("k").arrays[name] is read.arrays[name]
        with pytest.raises(ValueError, match="WRITEABLE"):
            read.arrays[name].flags.writeable = True


def test_a_predictor_is_one():
    with Store([Memory()], predictor=Predictor()) as store:
        assert "prediction" in store.stats()
