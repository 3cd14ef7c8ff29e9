"""Several stores over one directory: puts have an order, whatever the clocks say."""

from __future__ import annotations

import os
import stat

import pytest

from jkv.errors import CorruptError, TierError
from jkv.store import Disk, Memory, Remote, Store, codec
from jkv.store.codec import blob_name
from tests.store.fakes import Clock, Fake, check, entry, number
from tests.store.test_corruption import reseal

AHEAD, BEHIND = Clock(5000.0), Clock(1000.0)


@pytest.fixture(params=["disk", "memory above", "remote"])
def pair(request, tmp_path):
    """Two stores on one directory, whose clocks are an hour apart."""

    def tiers():
        if request.param == "remote":
            return [Remote(f"file://{tmp_path}/")]
        return [Memory(), Disk(tmp_path)] if request.param == "memory above" else [Disk(tmp_path)]

    with (
        Store(tiers(), clock=AHEAD, write_through=True) as ahead,
        Store(tiers(), clock=BEHIND, write_through=True) as behind,
    ):
        yield ahead, behind


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["ahead first", "behind first"])
def test_the_later_put_stands(pair, order):
    first, second = (pair[i] for i in order)
    first.put("k", entry(1))
    second.put("k", entry(2))
    for store in (first, second, first):
        assert number(store.get("k")) == 2
    first.put("k", entry(3))
    assert number(second.get("k")) == 3
    for store in pair:
        store.sweep()
        store.drain()
        check(store)
        assert number(store.get("k")) == 3


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["ahead first", "behind first"])
def test_what_another_put_since_is_not_deleted(pair, order):
    """Expired, evicted or swept is what this one knew, and not what came after it."""
    first, second = (pair[i] for i in order)
    for reason in ("expired", "evicted", "swept"):
        first.put(reason, entry(1), ttl=10.0 if reason == "expired" else None)
        second.put(reason, entry(2))
        if reason == "expired":
            first._index.clock.now += 20
            assert first.sweep() == 1
        elif reason == "evicted":
            for tier in range(len(first._index.tiers)):
                first.resize(tier, max_entries=0)
                first.resize(tier, max_entries=100)
        else:
            first._index.clock.now += 20
            first.sweep(older_than=10.0)
        first.drain()
        check(first)
        for store in (second, first):
            assert number(store.get(reason)) == 2, reason


@pytest.mark.parametrize("how", ["remove", "clear"])
def test_removing_removes_what_another_has_put_since(pair, how):
    first, second = pair
    first.put("k", entry(1))
    second.put("k", entry(2))
    assert first.remove("k") if how == "remove" else first.clear() == 1
    assert first.get("k") is None
    if len(second._index.tiers) == 1:  # else it is in the other's memory, as is documented
        assert second.get("k") is None
    check(first)


def test_removing_what_only_another_has_on_disk(tmp_path):
    with Store([Memory(), Disk(tmp_path)]) as a, Store([Disk(tmp_path)]) as b:
        a.put("k", entry(1))
        b.put("k", entry(2))
        assert a.remove("k")
        assert a.get("k") is None
        assert b.get("k") is None
        assert not list(tmp_path.glob("*.jkv"))


def test_what_was_in_memory_only_does_not_overwrite_what_came_after_it(tmp_path):
    """Neither when it is evicted from there, nor at the end."""
    for way in ("close", "evict"):
        with Store([Memory(), Disk(tmp_path)]) as a, Store([Disk(tmp_path)]) as b:
            a.put(way, entry(1))  # in memory
            a.put(way, entry(2))
            b.put(way, entry(3))
            if way == "evict":
                a.resize(0, max_entries=0)
                a.drain()
                check(a)
            a.close()
            assert number(b.get(way)) == 3


def test_what_was_there_before_a_put_is_overwritten_by_it(tmp_path):
    with Store([Memory(), Disk(tmp_path)]) as a, Store([Disk(tmp_path)]) as b:
        for known in (False, True):
            b.put("k", entry(1))
            if known:
                assert number(a.get("k")) == 1
                b.put("k", entry(2))
            a.put("k", entry(3))
            assert b.get("k") is None  # in the other's memory, and nothing of before is served
            assert number(a.get("k")) == 3
            check(a)
        a.close()
        assert number(b.get("k")) == 3


def test_what_cannot_be_deleted_is_not_taken_for_newer(tmp_path, monkeypatch):
    disk = Disk(tmp_path)
    with Store([Memory(), disk]) as a, Store([Disk(tmp_path)]) as b:
        b.put("k", entry(1))

        def refuses(key, version=None):
            raise TierError("no")

        monkeypatch.setattr(disk, "delete_put", refuses)
        a.put("k", entry(2))
        assert number(a.get("k")) == 2
        b.put("k", entry(3))
        assert number(a.get("k")) == 3
        monkeypatch.undo()
        a.sweep()
        check(a)
        assert number(b.get("k")) == 3


def test_tokens_of_an_older_put_are_still_right(tmp_path):
    """What is found by content says itself what it is; only its key has another meaning now."""
    tokens = list(range(40))
    with Store([Memory(), Disk(tmp_path)]) as a, Store([Disk(tmp_path)]) as b:
        a.put("k", entry(1), tokens=tokens)
        b.put("k", entry(2), tokens=tokens[::-1])
        with a.longest_prefix(tokens) as match:
            assert (match.length, number(match.value)) == (40, 1)
        assert number(a.get("k")) == 2
        assert a.longest_prefix(tokens) is None


def test_one_that_was_only_listed_does_not_replace_one_that_is_known(tmp_path):
    """Left over below from before: it stays where it is, and is not served beside a newer one."""
    upper, lower = Disk(tmp_path / "a"), Disk(tmp_path / "b")
    with Store([lower]) as old:
        old.put("k", entry(1))
    with Store([upper]) as new:
        new.put("k", entry(2))
    with Store([upper, lower]) as store:
        store.drain()
        calls = iter([TierError("busy")])
        read = upper.read

        def busy(key):
            for error in calls:
                raise error
            return read(key)

        upper.read = busy
        assert store.get("k") is None
        assert number(store.get("k")) == 2
        assert lower.read(store._index.records["0::k"].name) is not None
        check(store)


def test_looking_costs_one_opened_file(tmp_path, monkeypatch):
    with Store([Memory(), Disk(tmp_path)], write_through=True) as store:
        store.put("k", entry(1))
        opened = []
        monkeypatch.setattr(os, "open", lambda *a, real=os.open: opened.append(a) or real(*a))
        assert number(store.get("k")) == 1
        assert len(opened) == 1


def test_what_is_shared_says_which_put_it_is(tmp_path):
    disk = Disk(tmp_path)
    assert disk.version_of("k") is None
    disk.write("k", entry(1))  # by hand
    assert disk.version_of("k") is None
    with Store([disk]) as store:
        store.put("k", entry(2))
        version = store._index.records["0::k"].version
        assert disk.version_of("0::k") == version
        assert not disk.delete_put("0::k", "0" * 16)
        assert disk.read("0::k") is not None
        assert disk.delete_put("0::k", version)
        assert disk.delete_put("0::k", version)
        assert disk.read("0::k") is None


def modes(path):
    return {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.rglob("*")}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_files_are_for_their_owner_alone(tmp_path, umask):
    before = os.umask(umask)
    try:
        disk = Disk(tmp_path / "x" / "y")
        disk.write("k", entry(1))
        disk.liveness_lock()
        (tmp_path / "x/y" / blob_name("k")).write_bytes(b"damaged")
        with pytest.raises(CorruptError):
            disk.read("k")
        disk.write("k", entry(1))
        found = modes(tmp_path)
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o700
    finally:
        os.umask(before)
    assert found.pop("quarantine") == found.pop("x") == found.pop("y") == 0o700
    assert set(found.values()) == {0o600}
    disk.close()


def test_a_directory_for_a_group(tmp_path):
    disk = Disk(tmp_path / "d", mode=0o640)
    disk.write("k", entry(1))
    assert modes(tmp_path) == {"d": 0o750, blob_name("k"): 0o640}
    for mode in (0o400, 0o777, 0o1600, -1):
        with pytest.raises(ValueError, match="mode got"):
            Disk(tmp_path / "e", mode=mode)
    assert not (tmp_path / "e").exists()


def test_a_remote_directory_is_made_for_its_owner_alone(tmp_path):
    remote = Remote(f"file://{tmp_path}/made/here/")
    remote.write("k", entry(1))
    assert stat.S_IMODE((tmp_path / "made" / "here").stat().st_mode) == 0o700


def test_blobs_without_a_stamp_are_read_and_deleted_as_others(tmp_path):
    """Those that versions up to 0.1 wrote."""
    with Store([Disk(tmp_path)]) as store:
        store.put("k", entry(1), tokens=range(20))
        version = store._index.records["0::k"].version
    path = tmp_path / blob_name("0::k")
    path.write_bytes(reseal(path.read_bytes(), lambda said, prefix: None))
    disk = Disk(tmp_path)
    assert disk.version_of("0::k") is None
    assert not disk.delete_put("0::k", "0" * 16)
    with Store([Memory(), disk]) as store:
        assert number(store.get("k")) == 1
        assert store.longest_prefix(range(20)).length == 20
        store.put("k", entry(2))
        assert number(store.get("k")) == 2
        check(store)
    assert disk.version_of("0::k") not in (None, version)


def two_disks(tmp_path):
    """A newer put above, and one left over below."""
    upper, lower = Disk(tmp_path / "a"), Disk(tmp_path / "b")
    with Store([lower]) as old:
        old.put("k", entry(1))
    return upper, lower


def test_what_is_copied_up_does_not_overwrite_what_came_since(tmp_path):
    upper, lower = two_disks(tmp_path)
    with Store([upper, lower]) as store, Store([Disk(tmp_path / "a")]) as other:
        store.drain()
        other.put("k", entry(2))
        assert store.prefetch(["k"]) == 1
        store.drain()
        assert number(other.get("k")) == 2
        assert number(store.get("k")) == 2
        check(store)


def test_one_that_was_listed_is_served_where_no_other_is_left(tmp_path):
    upper, lower = two_disks(tmp_path)
    with Store([upper]) as new:
        new.put("k", entry(2))
    with Store([upper, lower]) as store:
        store.drain()
        upper.delete("0::k")  # by somebody else
        assert number(store.get("k")) == 1
        check(store)


def test_what_was_removed_and_could_not_be_deleted_is_not_found_again():
    disk = Fake(name="disk")
    with Store([Fake(), disk], write_through=True) as store:
        store.put("k", entry(1))
        disk.fail["delete"] = 7  # the first leaves it there
        assert store.remove("k", sync=False)
        assert "0::k" in disk.entries
        assert store.get("k") is None
        check(store)


def test_a_put_that_comes_while_another_is_deleted_stays(tmp_path, monkeypatch):
    disk, other = Disk(tmp_path), Disk(tmp_path)
    with Store([other]) as store:
        store.put("k", entry(1))
        version = store._index.records["0::k"].version
        look = codec.version_of

        def replaced(prefix):
            monkeypatch.undo()
            store.put("k", entry(2))
            return look(prefix)

        monkeypatch.setattr(codec, "version_of", replaced)
        assert not disk.delete_put("0::k", version)
        assert number(store.get("k")) == 2
