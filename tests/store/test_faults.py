"""Calls that fail, at every call of every operation: told, nothing is lost, and life goes on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jkv.errors import CorruptError, TierError
from jkv.store import Disk, Memory, Remote, Store, disk, files
from jkv.store.codec import blob_name
from tests.store.fakes import check, number
from tests.store.fakes import entry as whole
from tests.store.victim import number_of, value

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = {
    "write a new one": lambda tier: tier.write("new", value(7)),
    "write over": lambda tier: tier.write("old", value(2)),
    "write two": lambda tier: tier.write_many({"new": value(7), "old": value(2)}),
    "read": lambda tier: tier.read("old"),
    "read a damaged one": lambda tier: tier.read("damaged"),
    "delete": lambda tier: tier.delete("old"),
    "purge": lambda tier: tier.purge(["old", "put aside"]),
    "look which put": lambda tier: tier.version_of("old"),
    "delete a put": lambda tier: tier.delete_put("old", "0" * 16),
    "begin to live": lambda tier: tier.liveness_lock(),
    "look who lives": lambda tier: tier.is_live(f".tmp-{0:024}"),
    "scan": lambda tier: tier.scan(),
    "verify": lambda tier: tier.verify(),
}
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}


class Faulty:
    """A module, or an object, of which the n-th call fails."""

    def __init__(self, real: Any, names: str, counter: list[int], error: Exception) -> None:
        self._real, self._names, self._counter, self._error = real, names.split(), counter, error

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if name not in self._names:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self._counter[0] -= 1
            if self._counter[0] == 0:
                raise self._error
            return real(*args, **kwargs)

        return call


def faulty(patch: pytest.MonkeyPatch, system: Faulty) -> None:
    """What the tier calls the system by."""
    for module in (disk, files):
        patch.setattr(module, "os", system)


def prepared(path: Path) -> Disk:
    tier = Disk(path)
    tier.write("old", value(1))
    tier.write("long " * 100, value(5))
    tier.write("damaged", value(3))
    with (path / blob_name("damaged")).open("r+b") as file:
        file.write(b"?")
    (path / f".tmp-{1:024}").write_bytes(b"by somebody")
    (path / f".tmp-{0:024}").touch()  # a process that ended
    tier.write("put aside", value(6))
    os.truncate(path / blob_name("put aside"), 100)
    with pytest.raises(CorruptError):
        tier.read("put aside")
    return tier


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_disk_fails_at_every_call(tmp_path, monkeypatch, operation, error):
    calls = "open close fstat lstat stat lseek writev posix_fadvise fsync rename unlink scandir"
    calls += " pread preadv"
    for n in range(1, 100):
        path = tmp_path / str(n)
        tier = prepared(path)
        counter = [n]
        failure = OSError(ERRORS[error], os.strerror(ERRORS[error]))
        with monkeypatch.context() as patch:
            faulty(patch, Faulty(os, calls, counter, failure))
            patch.setattr(files, "fcntl", Faulty(files.fcntl, "flock fcntl", counter, failure))
            try:
                result = OPERATIONS[operation](tier)
            except (TierError, CorruptError) as raised:
                result = raised
        if counter[0] > 0:
            assert n > 1
            break  # fewer calls than that: every one has had its turn
        assert not isinstance(result, TierError) or result.errno == ERRORS[error]

        # What was there is, or what was written, or nothing where the tier says so: nothing else.
        wrote = operation.startswith("write")
        allowed = {1, 2, None} if operation in ("write over", "write two") else {1}
        allowed |= {None} if operation.startswith("delete") else set()
        old, new = (number_of(tier.read(key)) for key in ("old", "new"))
        assert old in allowed
        assert new in ({7, None} if wrote else {None})
        results = result if isinstance(result, dict) and operation == "write two" else {}
        results = results or {
            "write over": {"old": result},
            "write a new one": {"new": result},
        }.get(operation, {})
        for key, told in results.items():
            assert (number_of(tier.read(key)) in (2, 7)) == (not isinstance(told, TierError))
        if operation == "delete" and not isinstance(result, TierError):
            assert old is None
        if operation == "purge":
            aside = [name.partition("-")[2] for name in os.listdir(path / "quarantine")]
            assert isinstance(result, TierError) or blob_name("put aside") not in aside
        if operation == "look who lives":
            assert isinstance(result, bool | TierError)  # True where there are no locks to ask

        # The next operation works, and the next start finds no leftovers.
        tier.write("old", value(4))
        assert number_of(tier.read("old")) == 4
        assert number_of(tier.read("long " * 100)) == 5
        scanned = Disk(path).scan()
        assert {"old", "long " * 100} <= set(scanned) <= {"old", "long " * 100, "new", "damaged"}
        assert [name for name in os.listdir(path) if name.startswith(".tmp-")] == []
        with pytest.raises(CorruptError) if "damaged" in scanned else pytest.MonkeyPatch.context():
            assert tier.read("damaged") is None
    else:
        pytest.fail("it never ended")


STORE_OPERATIONS = {
    "put": lambda store: store.put("new", whole(7)),
    "put over": lambda store: store.put("old", whole(8)),
    "put what pushes others out": lambda store: [store.put(f"more {i}", whole(9)) for i in "ab"],
    "get": lambda store: store.get("old"),
    "find": lambda store: store.longest_prefix(range(20)),
    "remove": lambda store: store.remove("old"),
    "clear": lambda store: store.clear(),
    "refresh": lambda store: store.refresh(),
    "close": lambda store: store.close(),
}


@pytest.mark.parametrize("operation", STORE_OPERATIONS)
def test_a_store_on_a_disk_that_fails_at_every_call(tmp_path, monkeypatch, operation):
    """What is not said to be lost is served; figures agree; the next operation works."""
    calls = "open close fstat lstat stat lseek writev posix_fadvise fsync rename unlink scandir"
    calls += " pread preadv"
    for n in range(1, 100):
        path = tmp_path / str(n)
        store = Store([Memory(max_entries=1), Disk(path)], chunk=8)
        store.put("old", whole(1), tokens=range(20))
        store.put("kept", whole(2))  # in memory: the other is on disk
        store.drain()
        counter = [n]
        result = None
        with monkeypatch.context() as patch:
            faulty(patch, Faulty(os, calls, counter, OSError(errno.EIO, "EIO")))
            try:
                result = STORE_OPERATIONS[operation](store)
            except TierError:
                assert operation in ("remove", "clear")
            if operation != "close":
                store.drain()
        figures = check(store)
        if operation == "close":
            store = Store([Memory(max_entries=1), Disk(path)], chunk=8)
        gone = operation in ("remove", "clear")
        allowed = {"old": {8 if operation == "put over" else 1, None}, "kept": {2, None}}
        got = {key: number(store.get(key)) for key in allowed}
        assert all(got[key] in allowed[key] for key in got), (n, got)
        if gone:
            assert got["old"] is None
        elif operation != "close":  # at most one call failed: one is lost, and that is counted
            missing = sum(value is None for value in got.values())
            assert missing <= figures["lost"] + figures["rejected"]
        if operation == "put" and result is not None and figures["lost"] == 0:
            assert number(store.get("new")) == 7
        assert store.put("next", whole(3)) == "next"
        assert number(store.get("next")) == 3
        store.drain()
        check(store)
        store.close()
        if counter[0] > 0:
            assert n > 1
            break
    else:
        pytest.fail("it never ended")


def test_failures_in_a_batch_are_its_own(tmp_path, monkeypatch):
    tier = Disk(tmp_path)
    counter = [5]  # two for each: payload and header
    failure = OSError(errno.ENOSPC, "full")
    with monkeypatch.context() as patch:
        faulty(patch, Faulty(os, "writev", counter, failure))
        results = tier.write_many({str(i): value(i) for i in range(5)})
    assert [key for key, told in results.items() if isinstance(told, TierError)] == ["2"]
    assert [number_of(tier.read(str(i))) for i in range(5)] == [0, 1, None, 3, 4]


def test_little_is_taken_at_a_time(tmp_path, monkeypatch):
    """Systems may write and read less than asked, and do, beyond 2 GiB."""

    class Slow(Faulty):
        def writev(self, file: int, pieces: list[memoryview]) -> int:
            return os.write(file, pieces[0][:100])

        def preadv(self, file: int, views: list[memoryview], at: int) -> int:
            return os.preadv(file, [views[0][:99]], at)

    tier = Disk(tmp_path)
    with monkeypatch.context() as patch:
        faulty(patch, Slow(os, "", [0], OSError()))
        tier.write("k", value(3))
        assert number_of(tier.read("k")) == 3
    assert number_of(tier.read("k")) == 3


def test_a_file_cut_short_while_it_is_read(tmp_path, monkeypatch):
    tier = Disk(tmp_path)
    tier.write("k", value(3))

    class Cut(Faulty):
        def preadv(self, file: int, views: list[memoryview], at: int) -> int:
            os.truncate(tmp_path / blob_name("k"), 1000)
            return os.preadv(file, views, at)

    with monkeypatch.context() as patch:
        faulty(patch, Cut(os, "", [0], OSError()))
        with pytest.raises(CorruptError, match="while it was read"):
            tier.read("k")
    assert tier.read("k") is None


def test_no_memory_is_no_crash(tmp_path, monkeypatch):
    tier = Disk(tmp_path)
    tier.write("k", value(3))
    with monkeypatch.context() as patch:
        patch.setattr(files, "np", Faulty(np, "empty", [1], MemoryError()))
        with pytest.raises(TierError):
            tier.read("k")
    assert number_of(tier.read("k")) == 3


def test_a_writer_at_work_is_left_alone(tmp_path, monkeypatch):
    """A scan, of this process or another, while a write has its temporary file half full."""
    tier, other = Disk(tmp_path), Disk(tmp_path)
    scanned = []

    class Pausing(Faulty):
        def fsync(self, file: int) -> None:
            scanned.append(other.scan())
            os.fsync(file)

    (tmp_path / f".tmp-{0xDEAD:024x}").write_bytes(b"half")
    with monkeypatch.context() as patch:
        faulty(patch, Pausing(os, "", [0], OSError()))
        tier.write("k", value(1))
    assert scanned[0] == {}
    assert set(scanned[1]) == {"k"}
    assert number_of(other.read("k")) == 1
    assert os.listdir(tmp_path) == [blob_name("k")]


def test_a_file_damaged_and_replaced_at_once(tmp_path, monkeypatch):
    """Between reading it and putting it aside another process wrote it anew: that one stays."""
    tier = Disk(tmp_path)
    tier.write("k", value(1))
    with (tmp_path / blob_name("k")).open("r+b") as file:
        file.write(b"?")

    class Replaced(Faulty):
        def lstat(self, path: Path) -> os.stat_result:
            new = files.Temporary(str(tmp_path), 0, [memoryview(good)])
            Disk(tmp_path)._rename(new, blob_name("k"))
            return os.lstat(path)

    Disk(tmp_path / "other").write("k", value(2))
    good = (tmp_path / "other" / blob_name("k")).read_bytes()
    with monkeypatch.context() as patch:
        faulty(patch, Replaced(os, "", [0], OSError()))
        with pytest.raises(CorruptError):
            tier.read("k")
    assert number_of(tier.read("k")) == 2


def test_remote_fails_at_every_call():
    for operation in ("write a new one", "write over", "read", "delete", "scan", "verify"):
        for n in range(1, 20):
            tier = Remote("memory://")
            tier.write("old", value(1))
            counter = [n]
            real, error = tier._kvstore, ValueError("UNAVAILABLE: no")
            tier._kvstore = Faulty(real, "read write list", counter, error)
            told = None
            try:
                OPERATIONS[operation](tier)
            except TierError as raised:
                told = str(raised)
            tier._kvstore = real
            if counter[0] > 0:
                assert told is None
                break
            assert "UNAVAILABLE" in str(told)
            assert number_of(tier.read("old")) == 1
            assert tier.read("new") is None
            tier.write("old", value(4))
            assert number_of(tier.read("old")) == 4
            assert tier.stats()["failures"] == 1
        else:
            pytest.fail("it never ended")


OTHER = """
import sys
from jkv.store import Disk
from tests.store.victim import number_of, value
disk = Disk(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
seen = set()
for i in range(60):
    disk.write(f"theirs {i}", value(i))
    disk.write("both", value(i))
    number_of(disk.read("both"))
    if number_of(disk.read(f"ours {i}")) is not None:
        seen.add(i)
    if i % 10 == 0:
        disk.scan()
sys.stdin.readline()
print(all(number_of(disk.read(f"ours {i}")) == i for i in range(60)), len(seen))
"""


def test_two_processes_on_one_directory(tmp_path):
    tier = Disk(tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    other.stdin.write("\n")
    other.stdin.flush()
    for i in range(60):
        tier.write(f"ours {i}", value(i))
        tier.write("both", value(i))
        assert number_of(tier.read("both")) in range(60)
        if i % 10 == 0:
            tier.scan()
    other.stdin.write("\n")
    other.stdin.flush()
    said = other.stdout.readline().split()
    assert other.wait(30) == 0
    other.stdin.close()
    other.stdout.close()
    assert said[0] == "True"
    # What the other wrote is there without a scan, and a scan finds it, and nothing was broken.
    assert [number_of(tier.read(f"theirs {i}")) for i in range(60)] == list(range(60))
    assert len(tier.scan()) == 121
    assert tier.verify() == {}
    assert sorted(os.listdir(tmp_path)) == sorted(map(blob_name, tier.scan()))


def test_threads_share_one_directory_with_scans(tmp_path):
    """Scans clean up while eight threads write: no temporary file of theirs is taken away."""
    tier = Disk(tmp_path)
    stop = threading.Event()
    problems: list[BaseException] = []

    def scan() -> None:
        other = Disk(tmp_path)
        while not stop.is_set():
            try:
                other.scan()
            except TierError as error:
                problems.append(error)
            time.sleep(0.0005)

    def write(thread: int) -> None:
        try:
            for i in range(20):
                tier.write(f"{thread} {i}", value(i))
        except TierError as error:
            problems.append(error)

    scanner = threading.Thread(target=scan)
    scanner.start()
    writers = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join(60)
    stop.set()
    scanner.join(60)
    assert problems == []
    assert len(tier.scan()) == 160
    assert tier.verify() == {}
