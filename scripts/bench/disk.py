"""The store's disk tier beside raw files of the same bytes, tensorstore's and diskcache."""

from __future__ import annotations

import importlib.util
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jkv.store import Disk, Entry, Store
from jkv.store.codec import blob_name, encode

KiB, MiB = 1 << 10, 1 << 20
SIZES = (64 * KiB, MiB, 4 * MiB, 16 * MiB, 64 * MiB)
ARRAYS = 24  # keys and values of twelve layers


def entry(nbytes: int, seed: int) -> Entry:
    """Random bytes as keys and values of twelve layers."""
    rng = np.random.default_rng(seed)
    part = -(-nbytes // ARRAYS // 64) * 64  # as those of keys and values are
    return Entry({str(i): np.frombuffer(rng.bytes(part), np.uint8) for i in range(ARRAYS)}, {})


class Raw:
    """A file written and read as the tier does it, and nothing else: the figure to hold against."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def write(self, key: str, blob: bytes) -> None:
        """Keeps it."""
        file = os.open(self.path / "temporary", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        done = 0
        while done < len(blob):
            done += os.write(file, memoryview(blob)[done:])
        os.fsync(file)
        os.rename(self.path / "temporary", self.path / key)
        directory = os.open(self.path, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        os.close(file)

    def read(self, key: str) -> bytes:
        """What was kept."""
        with open(self.path / key, "rb", buffering=0) as file:
            return file.read()


class TensorStore:
    """tensorstore's file driver, values as bytes."""

    def __init__(self, path: Path) -> None:
        import tensorstore

        self.store = tensorstore.KvStore.open({"driver": "file", "path": f"{path}/"}).result()

    def write(self, key: str, blob: bytes) -> None:
        """Keeps it."""
        self.store.write(key, blob).result()

    def read(self, key: str) -> bytes:
        """What was kept."""
        return self.store.read(key).result().value


class DiskCache:
    """diskcache: SQLite, and files beside it for what is large; neither is synced."""

    def __init__(self, path: Path) -> None:
        import diskcache

        self.cache = diskcache.Cache(str(path), size_limit=1 << 40)

    def write(self, key: str, blob: bytes) -> None:
        """Keeps it."""
        self.cache.set(key, blob)

    def read(self, key: str) -> Any:
        """What was kept."""
        return self.cache.get(key)


def forget(path: Path) -> None:
    """Drops what the system keeps in memory of the files below; they must have been synced."""
    for item in path.rglob("*"):
        if item.is_file():
            file = os.open(item, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def measured(path: Path, nbytes: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds to write and read one value, all ways in turn; medians, and shares of raw speed."""
    value = entry(nbytes, nbytes)
    blob = b"".join(encode(value, "k0"))
    ways: dict[str, tuple[Path, Any, Any]] = {
        "raw files": (path / "raw", Raw(path / "raw"), blob),
        "jkv Disk": (path / "jkv", Disk(path / "jkv"), value),
        "tensorstore": (path / "ts", TensorStore(path / "ts"), blob),
    }
    if importlib.util.find_spec("diskcache"):
        ways["diskcache"] = (path / "dc", DiskCache(path / "dc"), blob)
    times: dict[tuple[str, str], list[float]] = {}
    processor: dict[tuple[str, str], list[float]] = {}

    def timed(way: str, what: str, call: Callable[[], Any]) -> None:
        start, used = time.perf_counter(), time.process_time()
        call()
        times.setdefault((way, what), []).append(time.perf_counter() - start)
        processor.setdefault((way, what), []).append(time.process_time() - used)

    shuffled = random.Random(nbytes)
    order = list(ways)
    for _ in range(rounds):
        shuffled.shuffle(order)  # in turn, each would always come after the same other
        for way in order:
            _, tier, what = ways[way]
            os.sync()  # nobody pays for what another left unsynced
            timed(way, "write", lambda tier=tier, what=what: tier.write("k0", what))
        for way in order:
            place, tier, _ = ways[way]
            forget(place)
            timed(way, "read", lambda tier=tier: tier.read("k0"))
            timed(way, "read again", lambda tier=tier: tier.read("k0"))
    rows = []
    for (way, what), seconds in times.items():
        median = statistics.median(seconds)
        raw = statistics.median(times["raw files", what])
        pairs = zip(times["raw files", what], seconds, strict=True)
        share = statistics.median(a / b for a, b in pairs)
        rows.append(
            {
                "bytes": nbytes,
                "way": way,
                "what": what,
                "seconds": median,
                "processor seconds": statistics.median(processor[way, what]),
                "GB/s": nbytes / median / 1e9,
                "of raw": raw / median,
                "of raw, pair by pair": share,
                "rounds": rounds,
            }
        )
    return rows


def operations(path: Path, nbytes: int = 4 * KiB, count: int = 64, rounds: int = 5) -> list[Any]:
    """Puts and gets per second of small entries, all ways in turn; which of them are synced."""
    values = {f"k{i}": entry(nbytes, i) for i in range(count)}
    blobs = {key: b"".join(encode(value, key)) for key, value in values.items()}
    tier = Disk(path / "jkv small")
    store = Store([Disk(path / "jkv store")])
    raw = Raw(path / "raw small")

    def each(call: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
        def run() -> None:
            for each in zip(*arguments, strict=True):
                call(*each)

        return run

    ways = {
        "raw files": (each(raw.write, blobs, blobs.values()), each(raw.read, blobs)),
        "jkv Disk": (each(tier.write, values, values.values()), each(tier.read, values)),
        f"jkv Disk, {count} at once": (
            lambda: tier.write_many(values),
            lambda: tier.read_many(values),
        ),
        "jkv Store on Disk": (each(store.put, values, values.values()), each(store.get, values)),
        f"jkv Store on Disk, {count} at once": (
            lambda: store.put_many(list(values), list(values.values())),
            lambda: store.get_many(list(values)),
        ),
    }
    if importlib.util.find_spec("diskcache"):
        cache = DiskCache(path / "dc small")
        ways["diskcache, not synced"] = (
            each(cache.write, blobs, blobs.values()),
            each(cache.read, blobs),
        )
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for way, calls in ways.items():
            os.sync()
            for what, call in zip(("put", "get"), calls, strict=True):
                start = time.perf_counter()
                call()
                times.setdefault((way, what), []).append(time.perf_counter() - start)
    store.close()
    return [
        {
            "way": way,
            "what": what,
            "bytes": nbytes,
            "per_second": count / statistics.median(seconds),
        }
        for (way, what), seconds in times.items()
    ]


def batches(path: Path, nbytes: int = 64 * KiB, count: int = 64, rounds: int = 5) -> dict[str, Any]:
    """Seconds per entry, written one by one and in one batch."""
    tier = Disk(path / "batch")
    entries = {f"k{i}": entry(nbytes, i) for i in range(count)}
    single, batch = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        for key, value in entries.items():
            tier.write(key, value)
        middle = time.perf_counter()
        tier.write_many(entries)
        single.append((middle - start) / count)
        batch.append((time.perf_counter() - middle) / count)
    return {
        "bytes": nbytes,
        "count": count,
        "single": statistics.median(single),
        "batch": statistics.median(batch),
    }


def scans(path: Path, count: int) -> dict[str, Any]:
    """Seconds to look through a directory of so many entries; half of them with long keys."""
    tier = Disk(path / "scan")
    small = Entry({"x": np.zeros(8)}, {})
    keys = ["k" * (64 if i % 2 else 300) + str(i) for i in range(count)]
    for key in keys:  # written plainly: a million syncs are not what is measured
        (tier.path / blob_name(key)).write_bytes(b"".join(encode(small, key)))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = tier.scan()
        seconds.append(time.perf_counter() - start)
        if len(found) != count:
            raise RuntimeError(f"{len(found)} entries of {count} were found")
    return {"entries": count, "first": seconds[0], "seconds": statistics.median(seconds)}
