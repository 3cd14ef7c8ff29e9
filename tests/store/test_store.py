"""The store over tiers that say what they were asked."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest

import jkv.store
from jkv.errors import TierError, UnsupportedError
from jkv.store import LRU, Device, Disk, Entry, Memory, Store
from tests.store.fakes import Batched, Clock, Fake, check, entry, number

ROOT = Path(__file__).parents[2]


def names(tier):
    return sorted(name.split(":")[-1] for name in tier.entries)


def test_what_is_put_is_got():
    with Store([Fake(1000)]) as store:
        assert store.put("a", entry(1)) == "a"
        assert number(store.get("a")) == 1
        assert set(store.get("a").meta) == {"number"}  # and nothing of the store's own
        assert store.get("b") is None
        assert store.get("b", "nothing") == "nothing"
        assert store.contains("a")
        assert not store.contains("b")
        assert store.remove("a")
        assert not store.remove("a")
        assert store.get("a") is None
        figures = check(store, accesses=5)
        assert (figures["hits"], figures["misses"], figures["removed"]) == (2, 3, 1)


def test_values_that_are_packed_come_back_unpacked(monkeypatch):
    module = types.ModuleType("jkv.store.packing")
    module.pack = lambda cache: entry(cache["n"])
    module.unpack = lambda entry: {"n": entry.meta["number"]}
    monkeypatch.setitem(sys.modules, "jkv.store.packing", module)
    tier = Fake(1000, name="disk")
    with Store([tier]) as store:
        store.put("a", {"n": 7})
        store.put("b", entry(8))
        assert store.get_many(["a"]) == [{"n": 7}]
        assert isinstance(store.get_entry("a"), Entry)
        assert isinstance(store.get("b"), Entry)
    with Store([tier]) as store:  # the entry says so, in the next process too
        assert store.get("a") == {"n": 7}


def test_a_cache_of_another_version_is_a_miss(monkeypatch):
    from jkv.errors import CorruptError

    def unpack(_):
        raise CorruptError("version")

    module = types.ModuleType("jkv.store.packing")
    module.pack, module.unpack = lambda cache: entry(cache), unpack
    monkeypatch.setitem(sys.modules, "jkv.store.packing", module)
    with Store([Fake(1000)]) as store:
        store.put("a", 1)
        assert store.get("a") is None
        figures = check(store, accesses=1)
        assert figures["lost"] == figures["misses_by_reason"]["error"] == 1


def test_a_put_replaces_and_says_when_it_was_first_made():
    clock = Clock(10)
    with Store([Fake(1000)], clock=clock) as store:
        store.put("a", entry(1))
        clock.now = 15
        store.put("a", entry(2, 30), seconds=0.5)
        assert number(store.get("a")) == 2
        (it,) = store.stats(detailed=True)["by_entry"]
        assert (it["created"], it["updated"], it["bytes"], it["hits"]) == (10, 15, 30, 1)
        assert check(store)["replaced"] == 1


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


def test_limits_by_entries_and_resizing():
    memory, disk = Fake(max_entries=2), Fake(name="disk")
    with Store([memory, disk]) as store:
        for i, key in enumerate("abcd"):
            store.put(key, entry(i))
        store.drain()
        assert len(memory.entries) == 2
        store.resize("memory", max_entries=1)
        store.drain()
        assert (names(memory), memory.max_entries) == (["d"], 1)
        store.resize(1, max_bytes=150)
        assert len(disk.entries) == 1
        assert [number(store.get(key)) for key in "abcd"] == [None, None, 2, 3]
        with pytest.raises(ValueError, match="expected one of"):
            store.resize("tape", max_bytes=1)
        check(store)


@pytest.mark.parametrize("made", [Fake, Batched])
def test_batches(made):
    memory, disk = made(1000), made(1000, name="disk")
    with Store([memory, disk], write_through=True) as store:
        keys = list("abcd")
        assert store.put_many(keys, [entry(i) for i in range(4)]) == keys
        memory.entries.clear()  # somebody else did that: the next tier has them
        assert [number(x) for x in store.get_many([*keys, "x", "a"])] == [0, 1, 2, 3, None, 0]
        if made is Batched:
            assert ("write_many", 4) in memory.calls
            assert ("write_many", 4) in disk.calls
            assert ("read_many", 4) in disk.calls  # "a" once
        store.drain()
        check(store, accesses=6)
        # A key twice: the last one stays.
        store.put_many(["a", "a"], [entry(7), entry(8)], seconds=[1, 2])
        assert number(store.get("a")) == 8
        check(store)
        with pytest.raises(ValueError, match=r"shorter|longer"):
            store.put_many(["a"], [])
        with pytest.raises(TypeError, match="expected several"):
            store.get_many("abc")


def test_a_batch_larger_than_the_tier_makes_room_for_itself():
    tier = Batched(250)
    with Store([tier]) as store:
        kept = store.put_many(list("abcde"), [entry(i) for i in range(5)])
        assert kept == list("abcde")
        assert len(tier.entries) in (1, 2)
        assert check(store)["evicted"] == 5 - len(tier.entries)


def test_one_of_a_batch_fails_and_the_others_do_not():
    tier = Batched(1000)
    tier.fail["write"] = 1
    with Store([tier]) as store:
        assert store.put_many(list("abc"), [entry(i) for i in range(3)]) == [None, "b", "c"]
        figures = check(store)
        assert (figures["rejected"], figures["tiers"]["memory"]["errors"]) == (1, 1)


def test_tenants_share_no_keys_and_keep_to_their_bytes():
    tier = Fake(10_000)
    with Store([tier], tenant_bytes={"x": 250}) as store:
        store.put("a", entry(1), tenant="x")
        store.put("a", entry(2), tenant="y")
        store.put("a", entry(3))
        assert [number(store.get("a", tenant=t)) for t in ("x", "y", "")] == [1, 2, 3]
        assert store.get("a", tenant="x:a") is None
        for i in range(5):
            for tenant in ("x", "y"):
                store.put(f"k{i}", entry(i), tenant=tenant)
        figures = check(store)
        assert figures["tenants"]["x"]["entries"] == 2
        assert figures["tenants"]["y"]["entries"] == 6
        assert store.put("big", entry(0, 251), tenant="x") is None
        assert store.put("big", entry(0, 251), tenant="y") == "big"
        assert store.put_many(list("abc"), [entry(i) for i in range(3)], tenant="x")[-1] == "c"
        assert check(store)["tenants"]["x"]["bytes"] in (100, 200)
        assert store.clear(tenant="y") == 7
        assert check(store)["tenants"]["y"]["entries"] == 0
        assert store.get("a") is not None


def test_entries_end_with_their_time():
    clock = Clock()
    tier = Fake(1000, name="disk")
    with Store([tier], ttl=10, clock=clock) as store:
        store.put("a", entry(1))
        store.put("b", entry(2), ttl=30)
        clock.now += 9.9
        assert number(store.get("a")) == 1
        clock.now += 0.1
        assert not store.contains("a")
        assert store.get("a") is None
        assert number(store.get("b")) == 2
        assert names(tier) == ["b"]
        figures = check(store, accesses=3)
        assert figures["misses_by_reason"]["expired"] == figures["expired"] == 1
    with Store([tier], clock=clock) as store:
        clock.now += 19
        assert number(store.get("b")) == 2
        clock.now += 1
        assert store.sweep() == 1
        assert store.get("b") is None
        check(store)


def test_what_is_pinned_or_read_does_not_go():
    tier = Fake(300)
    with Store([tier], ttl=None) as store:
        store.put("pinned", entry(1), pin=True)
        store.put("read", entry(2))
        handle = store.open("read")
        for i in range(5):
            assert store.put(f"k{i}", entry(i))
        assert names(tier) == ["k4", "pinned", "read"]
        assert number(handle.entry) == 2
        assert store.put("two", entry(9, 200)) is None  # there is no room for it
        assert names(tier) == ["pinned", "read"]
        with handle:
            pass
        store.unpin("pinned")
        assert store.put("two", entry(9, 200)) == "two"
        assert len(tier.entries) == 2
        assert store.put("three", entry(9, 300)) == "three"
        check(store)
        with pytest.raises(KeyError, match="no entry 'nothing'"):
            store.open("nothing")
        store.put("two", entry(8), tokens=range(5))
        handles = store.open_many(["two", "nothing", "two"])
        assert [h and number(h.value) for h in handles] == [8, None, 8]
        assert handles[0].tokens.tolist() == [0, 1, 2, 3, 4]


def test_a_handle_that_nobody_released():
    tier = Fake(100)
    with Store([tier]) as store:
        store.put("a", entry(1))
        handle = store.open("a")
        assert store.put("b", entry(2)) is None
        del handle
        gc.collect()
        assert store.put("b", entry(2)) == "b"


def test_an_error_on_the_way_to_the_reader_leaves_nothing_held(monkeypatch):
    """Such as a device without room for the cache: what was read can go all the same."""
    tier = Fake(300)
    with Store([tier]) as store:
        store.put("a", entry(1), tokens=range(20))
        store.put("b", entry(2), tokens=range(50, 70))
        store.put("c", entry(3), tokens=range(50, 70))

        def full(*_):
            raise MemoryError("no room")

        reads = {
            "made of it": lambda: store.get_many(["a", "nothing", "b"]),
            "read": lambda: store.get_many(["a", "b"]),
            "searched": lambda: store.longest_prefix_many([range(20), range(50, 70)]),
        }
        for what, read in reads.items():
            read_one, errors = tier.read, [TierError("no"), MemoryError("no room")]
            if what == "read":
                errors.pop(0)

            def failing(name, read_one=read_one, errors=errors):
                if name.endswith("a"):
                    return read_one(name)
                raise errors.pop(0)  # another candidate is tried after the first of them

            with monkeypatch.context() as patch:
                if what == "made of it":
                    patch.setattr("jkv.store.reads.value_of", full)
                else:
                    patch.setattr(tier, "read", failing)
                with pytest.raises(MemoryError):
                    read()
            held = [record.holds for record in store._inner.index.values()]
            assert held == [0, 0, 0], what
        for key in "def":
            assert store.put(key, entry(4)) == key
        check(store)


def test_a_reader_keeps_what_it_reads_while_it_is_replaced_and_removed():
    with Store([Fake(1000)]) as store:
        store.put("a", entry(1))
        with store.open("a") as handle:
            store.put("a", entry(2))
            assert number(handle.entry) == 1
            assert number(store.get("a")) == 2
            store.remove("a")
            assert number(handle.entry) == 1
        check(store)


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


def test_a_full_queue_is_the_callers_work():
    memory, disk = Fake(100), Fake(name="disk")
    disk.gate = threading.Event()
    store = Store([memory, disk], queue_entries=3)
    for i in range(4):  # one is written, two wait
        store.put(f"k{i}", entry(i))
    mover = store._inner.movers[1]
    assert (len(mover), mover.peak_jobs, mover.nbytes) == (3, 3, 300)
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
    assert mover.peak_jobs == 3
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
        assert store._inner.movers[0].peak_bytes <= 150


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


def test_tenants_limits_hold_after_a_restart(tmp_path):
    with Store([Disk(tmp_path)]) as store:
        for i in range(4):
            store.put(f"k{i}", entry(i, 1000), tenant="x")
    with Store([Disk(tmp_path)], tenant_bytes=5000) as store:
        assert check(store)["tenants"]["x"]["entries"] in (2, 3)


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
        unknown = b._inner.delete_unknown

        def late(name):
            assert number(b.get("a")) == 1
            return unknown(name)

        monkeypatch.setattr(b._inner, "delete_unknown", late)
        assert b.remove("a")
        assert b.get("a") is None
        assert check(b)["removed"] == 1
        assert not list(tmp_path.glob("*.*"))


def test_sweeping():
    clock = Clock()
    with Store([Fake()], clock=clock) as store:
        for key in "abc":
            store.put(key, entry(1), pin=key == "c")
        handle = store.open("a")
        clock.now += 60
        store.get("b")
        clock.now += 1
        assert store.sweep(older_than=61) == 0  # it is being read
        handle.release()
        assert store.sweep(older_than=62) == 0
        assert store.sweep(older_than=61) == 1
        assert [store.contains(key) for key in "abc"] == [False, True, True]
        assert store.sweep(older_than=1) == 1
        assert [store.contains(key) for key in "abc"] == [False, False, True]
        assert check(store)["removed"] == 2


def test_a_sweeper_stops_with_the_store():
    clock = Clock()
    store = Store([Fake()], ttl=5, sweep_every=0.01, clock=clock)
    store.put("a", entry(1))
    clock.now += 5
    for _ in range(500):
        if not len(store):
            break
        threading.Event().wait(0.01)
    assert store.stats()["expired"] == 1
    assert "jkv-store-sweep" in [t.name for t in threading.enumerate()]
    store.close()
    assert "jkv-store-sweep" not in [t.name for t in threading.enumerate()]


def test_what_it_tells():
    from rich.console import Console

    memory, disk = Fake(100), Fake(5 << 20, name="disk")
    with Store([memory, disk]) as store:
        for i, key in enumerate("ab"):
            store.put(key, entry(i), seconds=2, tenant='t"1')
        store.drain()
        for _ in range(3):
            store.get("b", tenant='t"1')
        store.get("a", tenant='t"1')
        assert store.hot(1) == [("b", 3)]
        figures = check(store, accesses=4)
        assert figures["hit_rate"] == 1
        assert figures["seconds_saved"] == 8
        assert figures["tiers"]["disk"]["hits"] == 1
        assert figures["tiers"]["disk"]["accesses"] == 1
        assert figures["bytes_read"] >= 400
        page = io.StringIO()
        Console(file=page, width=120).print(store.report())
        for text in ("hit rate", "100.0%", "5 MiB", "disk", "tenant"):
            assert text in page.getvalue()
        lines = store.prometheus().splitlines()
        assert "jkv_store_hits_total 4" in lines
        assert 'jkv_store_tenant_hits_total{tenant="t\\"1"} 4' in lines
        assert 'jkv_store_gone_total{why="lost"} 0' in lines
        families = [line.split()[2] for line in lines if line.startswith("# TYPE")]
        assert len(families) == len(set(families))
        for line in lines:
            if not line.startswith("#"):
                assert line.split("{")[0].split()[0] in families


def test_mistakes_are_said():
    with pytest.raises(ValueError, match="at least one"):
        Store([])
    with pytest.raises(ValueError, match="chunk"):
        Store([Fake()], chunk=0)
    with Store([Fake()], LRU()) as store:
        with pytest.raises(ValueError, match="no key and no tokens"):
            store.put(None, entry(1))
        with pytest.raises(ValueError, match="one row of token ids"):
            store.put("a", entry(1), tokens=[[1, 2]])
        with pytest.raises(ValueError, match="from 0"):
            store.put("a", entry(1), tokens=[-1])
        with pytest.raises(ValueError, match="one row"):
            store.longest_prefix([0.5])
        check(store, accesses=0)


def test_imports_fast_and_without_jax():
    code = (
        "import sys, time; t = time.process_time(); import jkv.store; "
        "from jkv.store import Store, Memory, Disk, LRU; t = time.process_time() - t; "
        "print('jax' in sys.modules, t)"
    )
    done = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        for _ in range(3)
    ]
    assert {d.stdout.split()[0] for d in done} == {"False"}, done[0].stderr
    assert min(float(d.stdout.split()[1]) for d in done) < 0.3


def test_no_module_has_the_name_of_something_public():
    """Once it is imported, ``jkv.store.name`` would be the module."""
    modules = {path.stem for path in (ROOT / "jkv" / "store").glob("*.py")}
    assert len(modules) > 20
    assert not modules & set(jkv.store.__all__)


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


def test_closing_waits_for_who_is_reading(monkeypatch):
    tier = Fake(name="disk")
    store = Store([tier])
    store.put("a", entry(1))
    begun, go, got = threading.Event(), threading.Event(), []
    read = tier.read

    def slow(key):
        begun.set()
        assert go.wait(30)
        assert not tier.closed
        return read(key)

    monkeypatch.setattr(tier, "read", slow)
    reader = threading.Thread(target=lambda: got.append(number(store.get("a"))))
    closer = threading.Thread(target=store.close)
    reader.start()
    assert begun.wait(30)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    assert not tier.closed
    go.set()
    reader.join()
    closer.join()
    assert got == [1]
    assert tier.closed
