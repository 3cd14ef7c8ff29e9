"""How entries move between tiers that say what they were asked, and what tiers get wrong."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from jkv.errors import TierError, UnsupportedError
from jkv.store import Device, Disk, Entry, Memory, Store
from tests.store.fakes import Clock, Fake, check, entry, names, number


def test_larger_than_a_tier_goes_below_and_larger_than_all_is_rejected():
    memory, disk = Fake(50), Fake(100, name="disk")
    with Store([memory, disk]) as store:
        assert store.put("a", entry(1, 80)) == "a"
        assert (names(memory), names(disk)) == ([], ["a"])
        assert store.put("b", entry(2, 101)) is None
        figures = check(store)
        assert figures["rejected"] == 1
        assert [t["rejected"] for t in figures["tiers"].values()] == [2, 1]
        # What was there under the key is not what was put last.
        assert store.put("a", entry(3, 101)) is None
        assert store.get("a") is None
        assert names(disk) == []
        check(store, accesses=1)


def test_the_least_recent_moves_down_and_what_is_read_moves_up():
    memory, disk = Fake(300), Fake(300, name="disk")
    with Store([memory, disk]) as store:
        for i, key in enumerate("abc"):
            store.put(key, entry(i))
        store.get("a")
        store.put("d", entry(3))
        store.drain()
        assert (names(memory), names(disk)) == (["a", "c", "d"], ["b"])
        assert number(store.get("b")) == 1
        store.drain()
        assert names(memory) == ["a", "b", "d"]
        assert names(disk) == ["b", "c"]
        for i, key in enumerate("efgh"):
            store.put(key, entry(i))
        store.drain()
        figures = check(store)
        assert len(disk.entries) == 3
        assert figures["evicted"] == figures["evictions"] == 8 - len(store)
        assert [t["promotions"] for t in figures["tiers"].values()] == [1, 0]


def test_a_failing_tier_is_an_error_and_nothing_more():
    memory, disk = Fake(1000), Fake(1000, name="disk")
    with Store([memory, disk], write_through=True) as store:
        memory.fail["write"] = 1
        assert store.put("a", entry(1)) == "a"  # the next tier has it
        assert (names(memory), names(disk)) == ([], ["a"])
        disk.fail["write"] = 1
        assert store.put("b", entry(2)) == "b"  # and so has the one above
        memory.fail["read"] = 1
        store.put("c", entry(3))
        assert number(store.get("c")) == 3  # from below
        memory.fail["read"] = 1
        assert store.get("b") is None  # there is no other, for now
        assert number(store.get("b")) == 2
        figures = check(store, accesses=3)
        assert figures["misses_by_reason"]["error"] == 1
        assert [t["errors"] for t in figures["tiers"].values()] == [3, 1]
        memory.fail["write"] = disk.fail["write"] = 1
        assert store.put("b", entry(4)) is None
        assert store.get("b") is None
        check(store)


def test_what_cannot_be_deleted_is_not_served_and_goes_later():
    tier = Fake(250, name="disk")
    with Store([tier]) as store:
        store.put("a", entry(1))
        tier.fail["delete"] = 2
        with pytest.raises(TierError, match="1 could not be deleted"):
            store.remove("a")
        assert names(tier) in ([], ["a"])
        assert store.get("a") is None
        assert not store.contains("a")
        figures = check(store)
        assert figures["tiers"]["disk"]["rubbish"] == 1
        assert figures["tiers"]["disk"]["bytes"] == 100  # it still takes room
        tier.fail["delete"] = 0
        store.put("b", entry(2))
        store.put("c", entry(3))
        assert names(tier) == ["b", "c"]  # and makes room first
        check(store)


def test_what_is_corrupt_is_a_miss_and_gone():
    memory, disk = Fake(100), Fake(1000, name="disk")
    with Store([memory, disk]) as store:
        store.put("a", entry(1))
        store.put("b", entry(2))
        store.drain()
        disk.corrupt.add("0::a")
        assert store.get("a") is None
        figures = check(store, accesses=1)
        assert figures["lost"] == figures["tiers"]["disk"]["corrupt"] == 1
        assert number(store.get("b")) == 2


def test_what_is_lost_on_the_way_down_is_said():
    memory, disk = Fake(100), Fake(1000, name="disk")
    with Store([memory, disk]) as store:
        store.put("a", entry(1))
        disk.fail["write"] = 1
        store.put("b", entry(2))
        store.drain()
        assert store.get("a") is None
        assert check(store)["lost"] == 1
    with Store([Fake(100), Fake(1000, name="disk")]) as store:  # and nothing is where it works
        store.put("a", entry(1))
        store.put("b", entry(2))
        store.drain()
        assert number(store.get("a")) == 1
        assert check(store)["lost"] == 0


def test_a_hit_slower_than_making_it_again_is_declined():
    timer = Clock(0)
    memory, disk = Fake(100), Fake(1000, name="disk")
    read = disk.read

    def slow(key):
        timer.now += 1  # 100 bytes per second
        return read(key)

    disk.read = slow
    with Store([memory, disk], timer=timer) as store:
        for i, key in enumerate("abcd"):
            store.put(key, entry(i), seconds=0.5)
        store.drain()
        assert number(store.get("a")) == 0  # nothing was measured yet
        store.drain()
        assert store.get("b") is None
        assert number(store.get("b", recompute_seconds=2)) == 1
        store.drain()
        assert store.get("c", recompute_seconds=0.9) is None
        assert number(store.get("b")) == 1  # in memory, which is fast
        figures = check(store, accesses=5)
        assert figures["misses_by_reason"]["declined"] == 2
        assert figures["seconds_saved"] == 1.5
        timer.now += 61  # what was measured long ago says nothing
        assert number(store.get("c")) == 2


def test_asking_whether_it_is_there_does_not_read_it(monkeypatch):
    timer = Clock(0)
    disk = Fake(1000, name="disk")
    with Store([disk]) as store:
        store.put_many(["a", "b"], [entry(1), entry(2)], seconds=[0.5, 0.5], fingerprint=b"x")
    read, describe, looked = disk.read, disk.describe, threading.Event()

    def slow(name):
        timer.now += 1  # 100 bytes per second
        return read(name)

    def later(name):  # the thread that looks through what is there has not come far
        if threading.current_thread() is not threading.main_thread():
            assert looked.wait(30)
        return describe(name)

    monkeypatch.setattr(disk, "read", slow)
    monkeypatch.setattr(disk, "describe", later)
    with Store([Fake(1000), disk], timer=timer) as store:
        disk.calls.clear()
        assert store.contains("a", fingerprint=b"x")
        assert not store.contains("b", fingerprint=b"y")
        assert timer.now == 0
        # So this is the first reading, of which nobody knows how long it takes.
        assert number(store.get("a", fingerprint=b"x")) == 1
        assert store.get("b", fingerprint=b"x") is None  # and this is known to be too slow
        looked.set()
        assert check(store, accesses=2)["misses_by_reason"]["declined"] == 1


def test_a_full_queue_is_the_callers_work():
    memory, disk = Fake(100), Fake(name="disk")
    disk.gate = threading.Event()
    store = Store([memory, disk], queue_entries=3)
    for i in range(4):  # one is written, two wait
        store.put(f"k{i}", entry(i))
    worker = store._tiering.workers[1]
    assert (len(worker), worker.peak_jobs, worker.nbytes) == (3, 3, 300)
    done = threading.Event()

    def more():
        store.put("last", entry(9))
        done.set()

    thread = threading.Thread(target=more)
    thread.start()
    assert not done.wait(0.1)  # it waits for the disk itself
    assert [number(store.get(f"k{i}")) for i in range(3)] == [0, 1, 2]  # nobody else does
    disk.gate.set()
    thread.join()
    store.drain()
    figures = check(store)
    assert figures["tiers"]["memory"]["demotions_by_caller"] >= 1
    assert worker.peak_jobs == 3
    assert figures["entries"] == 5
    store.close()
    assert len(disk.entries) == 5


def test_a_full_queue_up_leaves_entries_where_they_are():
    memory, disk = Fake(1000), Fake(name="disk")
    with Store([memory, disk], queue_bytes=150) as store:
        store.resize(0, max_bytes=0)
        for i in range(4):
            store.put(f"k{i}", entry(i))
        store.resize(0, max_bytes=1000)
        memory.gate = threading.Event()
        assert store.prefetch([f"k{i}" for i in range(4)] + ["unknown"]) == 1
        memory.gate.set()
        store.drain()
        assert names(memory) == ["k0"]
        assert check(store)["tiers"]["memory"]["promotions_dropped"] == 3
        assert store._tiering.workers[0].peak_bytes <= 150


def test_forms_are_of_a_tier_and_said():
    def convert(what, form):
        if what.meta["number"] == 3:
            raise UnsupportedError("not this one")
        return Entry({"x": what.arrays["x"][:10]}, {**what.meta, "form": form})

    memory, disk = Fake(100), Fake(name="disk")
    with Store([memory, disk], forms={"disk": "int8"}, convert=convert) as store:
        for i, key in enumerate("abcd"):
            store.put(key, entry(i))
        store.drain()
        got = store.get("a")
        assert (got.nbytes, got.meta["form"]) == (10, "int8")
        assert store.get("d").nbytes == 100
    assert disk.entries["0::a"].nbytes == 10
    assert disk.entries["0::d"].nbytes == 100  # it stays exact where it cannot be converted
    with pytest.raises(ValueError, match="convert="):
        Store([memory], forms={"memory": "int7"})
    with pytest.raises(ValueError, match="names of tiers"):
        Store([memory], forms={"tape": "int8"})


def test_closing_writes_what_only_this_process_has():
    memory, disk = Fake(1000), Fake(1000, name="disk")
    store = Store([memory, disk])
    store.put("a", entry(1))
    assert names(disk) == []
    store.close()
    store.close()
    assert names(disk) == ["a"]
    assert memory.closed
    assert store.stats()["puts"] == 1
    calls = (
        lambda: store.put("a", entry(1)),
        lambda: store.get("a"),
        lambda: store.longest_prefix([1]),
        lambda: store.remove("a"),
        store.sweep,
        store.drain,
        lambda: store.warm(["a"], entry),
        lambda: store.prefetch(["a"]),
        lambda: store.resize(0, max_bytes=1),
    )
    for call in calls:
        with pytest.raises(ValueError, match="closed"):
            call()
    assert not [t for t in threading.enumerate() if t.name.startswith("jkv-store")]
    with Store([Fake(1000), disk]) as store:
        assert number(store.get("a")) == 1
        assert check(store, accesses=1)["found"] == 1


def test_a_full_directory_and_a_smaller_limit(tmp_path):
    with Store([Disk(tmp_path, 100_000)]) as store:
        for i in range(10):
            store.put(f"k{i}", entry(i, 1000))
        size = store.stats()["bytes"]
        store.put("pinned", entry(77, 10), pin=True)
        store.put("k9", entry(9, 1000))
    with Store([Disk(tmp_path)]) as store:  # the oldest file, now
        assert store.get("pinned") is not None
        for i in range(10):
            store.put(f"k{i}", entry(i, 1000))
    with Store([Memory(10_000), Disk(tmp_path, size // 2)]) as store:
        figures = check(store)
        assert figures["tiers"]["disk"]["bytes"] <= size // 2
        assert (figures["found"], figures["evicted"]) == (11, 6)
        assert [number(store.get(f"k{i}")) for i in range(10)] == [None] * 6 + [6, 7, 8, 9]
        assert number(store.get("pinned")) == 77
        assert sum(f.stat().st_size for f in tmp_path.iterdir() if f.is_file()) <= size // 2


def test_an_older_copy_further_down_is_not_served():
    clock = Clock()
    disk, remote = Fake(name="disk"), Fake(name="remote")
    with Store([remote], clock=clock) as store:
        store.put("a", entry(1))
    clock.now += 1
    with Store([disk], clock=clock) as store:
        store.put("a", entry(2))
    with Store([disk, remote], clock=clock) as store:  # as after a crash between the two
        assert number(store.get("a")) == 2
        store.resize(0, max_bytes=50)
        assert number(store.get("a")) == 2  # it was written over, not left as it was
        check(store)
    assert number(remote.entries["0::a"]) == 2


def test_two_stores_on_one_directory(tmp_path):
    clock = Clock()
    with (
        Store([Memory(), Disk(tmp_path)], write_through=True, clock=clock) as one,
        Store([Disk(tmp_path)], clock=clock) as other,
    ):
        one.put("a", entry(1), tokens=range(20))
        assert number(other.get("a")) == 1
        clock.now += 1
        other.put("a", entry(2), tokens=range(40))
        one.resize(0, max_bytes=1)
        assert number(one.get("a")) == 2
        assert check(one)["found"] == 1
        one.put("b", entry(3), tokens=range(50, 90))
        assert other.longest_prefix(range(50, 90)) is None
        assert other.refresh() == 1
        with other.longest_prefix(range(50, 95)) as match:
            assert (match.key, match.length) == ("b", 40)
        one.remove("a")
        assert other.get("a") is None
        assert check(other)["lost"] == 1


def test_removed_while_a_reader_of_another_thread_finds_it(tmp_path, monkeypatch):
    with Store([Memory(), Disk(tmp_path)], write_through=True) as one, Store([Disk(tmp_path)]) as b:
        one.put("a", entry(1))
        unknown = b._removal.delete_unknown

        def late(name):
            assert number(b.get("a")) == 1
            return unknown(name)

        monkeypatch.setattr(b._removal, "delete_unknown", late)
        assert b.remove("a")
        assert b.get("a") is None
        assert check(b)["removed"] == 1
        assert not list(tmp_path.glob("*.*"))


def test_what_fits_but_for_its_header_is_rejected():
    tier = Fake(105, name="disk", header=7)
    with Store([tier]) as store:
        assert store.put("a", entry(1, 98)) == "a"
        assert store.put("b", entry(2, 100)) is None
        assert store.get("b") is None
        assert check(store)["rejected"] == 1
        assert not tier.entries


def test_from_the_device_to_the_disk_and_back(tmp_path):
    with Store([Device(250), Memory(250), Disk(tmp_path)]) as store:
        for i in range(6):
            store.put(f"k{i}", entry(i))
        store.drain()
        check(store)
        assert [t["entries"] for t in store.stats()["tiers"].values()] == [2, 2, 2]
        for i in range(6):
            got = store.get(f"k{i}")
            assert number(Entry({"x": np.asarray(got.arrays["x"])}, got.meta)) == i
        store.drain()
        assert check(store)["tiers"]["device"]["promotions"] > 0


def test_what_lasts_stays_until_it_lasts_below():
    disk, remote = Fake(100, name="disk"), Fake(name="remote")
    with Store([disk, remote]) as store:
        store.put("a", entry(1))
        remote.gate = threading.Event()
        thread = threading.Thread(target=store.put, args=("b", entry(2)))
        thread.start()
        for _ in range(100):
            if len(store) == 2 or "write" in remote.calls:
                break
            threading.Event().wait(0.002)
        assert names(disk) == ["a"]  # a crash now would lose nothing
        remote.gate.set()
        thread.join()
        assert (names(disk), names(remote)) == (["b"], ["a"])
        remote.fail["write"] = 1
        store.put("c", entry(3))
        assert check(store)["lost"] == 1  # there was no other place, and c is there
        assert number(store.get("c")) == 3


def test_what_is_replaced_makes_room_for_what_replaces_it():
    tier = Fake(200, 2)
    with Store([tier]) as store:
        for i, key in enumerate("abba"):
            assert store.put(key, entry(i))
        assert [number(store.get(key)) for key in "ab"] == [3, 2]
        assert check(store)["evicted"] == 0
        store.put("b", entry(9, 101))  # a little longer, and something has to go
        assert names(tier) == ["b"]
