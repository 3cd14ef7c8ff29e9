"""What ends with its process, however that ends; and what was removed stays so."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from jkv.errors import TierError
from jkv.store import Disk, Memory, Remote, Store, disk, files
from jkv.store.codec import blob_name
from tests.store.fakes import Clock, Fake, check, entry, names, number

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import sys
import numpy as np
from jkv.engine.swap import PageStore
from jkv.store import Disk, Memory, Store
from tests.store.fakes import entry

store = Store([Memory(10), Disk(sys.argv[1])])  # there is no room in memory
kept = PageStore(store, b"model")
kept.save_request(kept.key_of(7), [(np.arange(50), np.arange(50))], 50)
print(kept.key_of(7), flush=True)
store.put("lasts", entry(1), pin=True)
print("ready", flush=True)
sys.stdin.readline()
store.close()
"""


@pytest.fixture
def child(tmp_path):
    """A process in which a request waits; it ends when its input does."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("waiting/")
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def there(path):
    with Store([Disk(path)]) as store:
        store.drain()
        check(store)
        return sorted(key.split("/")[0] for key, _ in store.hot())


def test_requests_that_wait_go_with_their_process_only(tmp_path, child):
    assert there(tmp_path) == ["lasts", "waiting"]  # a second start harms nobody
    child.kill()  # SIGKILL: nothing is cleaned up
    child.wait()
    assert len(list(tmp_path.glob(".tmp-*"))) == 1
    assert there(tmp_path) == ["lasts"]
    assert [path.name for path in tmp_path.iterdir()] == [blob_name("0::lasts")]


def test_engines_of_two_containers_do_not_share_a_name(monkeypatch):
    """Their processes have the same numbers, and so have their engines and requests."""
    from jkv.engine import swap

    with Store([Memory()]) as store:
        keys = []
        for _ in range(2):
            monkeypatch.setattr(swap, "_engines", itertools.count())
            own = swap.PageStore(store, b"model")
            keys.append(own.key_of(0))
            assert own.save_request(keys[-1], [(np.arange(5), np.arange(5))], 5)
        assert len(set(keys)) == len(store) == 2


def test_what_an_engine_needs_of_a_store_is_asked_for_at_once():
    from jkv.engine.swap import PageStore

    with pytest.raises(TypeError, match="without contains, get, put, remove; expected a jkv"):
        PageStore(Mock(spec=["put_many", "get_many"]), b"model")


def test_a_store_that_closes_leaves_nothing_of_its_own(tmp_path):
    with Store([Memory(), Disk(tmp_path)], write_through=True) as store:
        store.put("mine", entry(1), ephemeral=True, pin=True)
        store.put("all", entry(2))
        assert number(store.get("mine")) == 1
    assert [path.name for path in tmp_path.iterdir()] == [blob_name("0::all")]
    with Store([Memory(), Disk(tmp_path)]) as store:  # nor is it written at the end
        store.put("mine", entry(1), ephemeral=True)
    assert [path.name for path in tmp_path.iterdir()] == [blob_name("0::all")]


def test_another_process_that_looks_while_it_lives(tmp_path):
    """Of entries that come while it runs, those of the dead go and those of the living stay."""
    with Store([Disk(tmp_path)]) as store, Store([Disk(tmp_path)]) as one:
        two = Store([Disk(tmp_path)])
        one.put("one", entry(1), ephemeral=True)
        two.put("two", entry(2), ephemeral=True)
        two._index.tiers[0].tier.close()  # as at its death
        assert store.refresh() == 2
        assert number(store.get("one")) == 1
        assert store.get("two") is None
        assert check(store)["expired"] == 1
        two.close()


def test_a_remote_does_not_ask_who_lives(tmp_path):
    """On the same directory: there only their time ends them."""
    with Store([Disk(tmp_path)], clock=Clock()) as store:
        store.put("mine", entry(1), ephemeral=True, tokens=range(20), ttl=100)
        clock = Clock()
        with Store([Remote(f"file://{tmp_path}")], tenant_bytes=10_000, clock=clock) as other:
            with other.longest_prefix(range(20)) as match:
                assert number(match.value) == 1
            clock.now += 100
            assert other.sweep() == 1
            check(other)


@pytest.mark.parametrize(
    "lie", ["../victim", ".tmp-../../victim", "victim", "", ".tmp-" + "0" * 23]
)
def test_a_liveness_lock_is_no_path(tmp_path, lie):
    (tmp_path / "victim").touch()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "victim").touch()
    tier = Disk(tmp_path / "d")
    assert not tier.is_live(lie)
    assert (tmp_path / "victim").exists()
    assert (tmp_path / "d" / "victim").exists()
    assert tier.is_live(tier.liveness_lock())
    assert tier.liveness_lock() == tier.liveness_lock()


def test_no_liveness_lock_is_an_error_and_nothing_more(tmp_path, monkeypatch):
    tier = Disk(tmp_path)

    def failing():
        raise TierError("no")

    monkeypatch.setattr(tier, "liveness_lock", failing)
    with Store([tier]) as store:
        assert store.put("a", entry(1), ephemeral=True) == "a"
        assert check(store)["tiers"]["disk"]["errors"] == 1


class Observed:
    """The system's calls on files, in their order."""

    def __init__(self, fail: str = "") -> None:
        self.calls: list[tuple[str, str]] = []
        self.fail = fail

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("unlink", "fsync", "rename"):
            return real

        def call(what, *rest):
            place = os.readlink(f"/proc/self/fd/{what}") if name == "fsync" else str(what)
            self.calls.append((name, os.path.basename(place)))
            if name == self.fail:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(what, *rest)

        return call


@contextlib.contextmanager
def observed(monkeypatch, fail=""):
    calls = Observed(fail)
    with monkeypatch.context() as patch:
        for module in (disk, files):
            patch.setattr(module, "os", calls)
        yield calls.calls


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_what_is_removed_is_synced_once_and_what_is_evicted_is_not(tmp_path, monkeypatch):
    path = tmp_path / "d"
    with Store([Disk(path, max_entries=5)]) as store:
        for key in "abcde":
            store.put(key, entry(1))
        with observed(monkeypatch) as calls:
            assert store.remove("a")
        assert calls == [("unlink", blob_name("0::a")), ("fsync", "d")]
        with observed(monkeypatch) as calls:  # of another process, perhaps
            assert not store.remove("a")
        assert calls == [("unlink", blob_name("0::a")), ("fsync", "d")]
        with observed(monkeypatch) as calls:
            assert store.remove("b", sync=False)
            store.resize(0, max_entries=2)
        assert [call for call, _ in calls] == ["unlink", "unlink"]
        with observed(monkeypatch) as calls:
            assert store.clear() == 2
        assert [call for call, _ in calls] == ["unlink", "unlink", "fsync"]
        with observed(monkeypatch) as calls:
            assert store.clear() == 0
        assert calls == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_a_batch_is_synced_once(tmp_path, monkeypatch):
    path = tmp_path / "d"
    with Store([Disk(path)]) as store, observed(monkeypatch) as calls:
        store.put_many(list("abcde"), [entry(i) for i in range(5)])
        files_synced = [place for call, place in calls if call == "fsync" and place != "d"]
        assert len(files_synced) == 5  # each before it has its name, and the directory after all
        assert [call for call, place in calls if place == "d"] == ["fsync"]
        assert calls[-1] == ("fsync", "d")


def test_what_was_put_aside_of_it_goes_too(tmp_path):
    with Store([Disk(tmp_path)]) as store:
        for key in ("a", "b"):
            store.put(key, entry(1))
            (tmp_path / blob_name(f"0::{key}")).write_bytes(b"x" * 100)
            assert store.get(key) is None
        aside = tmp_path / "quarantine"
        assert len(list(aside.iterdir())) == 2
        store.remove("a")
        (left,) = aside.iterdir()
        assert left.name.endswith(blob_name("0::b"))


def test_what_may_come_back_is_not_said_to_be_gone(tmp_path, monkeypatch):
    with Store([Disk(tmp_path)]) as store:
        for key in "abc":
            store.put(key, entry(1))
        for fail in ("fsync", "unlink"):
            with observed(monkeypatch, fail), pytest.raises(TierError, match="not served any more"):
                store.remove("a")
            assert store.get("a") is None
        with observed(monkeypatch, "unlink"):
            with pytest.raises(TierError, match="3 could not be deleted from disk"):
                store.clear()
            with pytest.raises(TierError, match="1 could not be"):  # of one that it does not know
                store.remove("unknown")
        assert number(store.get("b")) is None
        assert not store.remove("b")  # tries again, and so does
        assert store.clear() == 0
        assert list(tmp_path.iterdir()) == []
        check(store)


def test_a_remote_that_does_not_answer_is_no_removal():
    remote = Fake(name="remote")
    with Store([Fake(), remote], write_through=True, clock=Clock()) as store:
        store.put("a", entry(1))
        remote.fail["delete"] = 1
        with pytest.raises(TierError, match="1 could not be deleted from remote"):
            store.remove("a")
        assert not store.remove("a")
        assert not remote.entries
        check(store)


def test_what_has_expired_is_not_moved_down_to_make_room():
    clock = Clock(1000.0)
    upper, lower = Fake(max_entries=1), Fake(name="disk")
    with Store([upper, lower], clock=clock) as store:
        store.put("late", entry(1), ttl=10)
        clock.now += 20
        store.put("new", entry(2))
        store.drain()
        assert names(lower) == []
        figures = check(store)
        assert (figures["expired"], figures["evicted"]) == (1, 0)
        store.put("newer", entry(3))  # and what has not is
        store.drain()
        assert names(lower) == ["new"]
