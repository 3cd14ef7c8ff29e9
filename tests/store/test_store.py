"""The store over tiers that say what they were asked."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

import jkv.store
from jkv.errors import TierError
from jkv.store import LRU, Disk, Entry, Store
from tests.store.fakes import Batched, Clock, Fake, check, entry, names, number

ROOT = Path(__file__).parents[2]


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
                    patch.setattr("jkv.store.reader.value_of", full)
                else:
                    patch.setattr(tier, "read", failing)
                with pytest.raises(MemoryError):
                    read()
            held = [record.holds for record in store._index.records.values()]
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


def test_tenants_limits_hold_after_a_restart(tmp_path):
    with Store([Disk(tmp_path)]) as store:
        for i in range(4):
            store.put(f"k{i}", entry(i, 1000), tenant="x")
    with Store([Disk(tmp_path)], tenant_bytes=5000) as store:
        assert check(store)["tenants"]["x"]["entries"] in (2, 3)


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


def test_imports_little_and_without_jax():
    """What takes long is imported by what needs it."""
    code = (
        "import sys, jkv.store; from jkv.store import Store, Memory, Disk, Remote, LRU; "
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    heavy = {"jax", "jaxlib", "flax", "tensorstore", "zstandard", "rich", "scipy", "safetensors"}
    assert {"jkv", "numpy"} <= set(done.stdout.split()), done.stderr
    assert not heavy & set(done.stdout.split())


def test_no_module_has_the_name_of_something_public():
    """Once it is imported, ``jkv.store.name`` would be the module."""
    modules = {path.stem for path in (ROOT / "jkv" / "store").glob("*.py")}
    assert len(modules) > 20
    assert not modules & set(jkv.store.__all__)


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
