"""What the store costs, and what it saves: beside dictionaries, raw files, and computing again.

    python -m bench store --path /where/the/disk/is --json store.json

Sections: memory, disk, restart. On disk all ways take turns; shown are median speeds, and the
median share of raw files' speed in the same turn, which is the better figure where a machine does
other things as well. "read" is from the disk: what the system had in memory of the files is dropped
before (as far as the host of a virtual machine lets it); "read again" is from the system's memory.
Raw files are synced, renamed and their directory synced, as the tier does it; diskcache syncs
nothing. The processor's time, of a write and of a read, does not depend on what else the machine
does.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import jkv
from bench import disk, report
from jkv.models import Config, Rope
from jkv.store import Disk, Entry, Memory, Store

ENTRIES, LIMIT = 2000, 1000

LLAMA_42M = Config(
    vocab=32000,
    layers=8,
    width=512,
    heads=8,
    kv_heads=8,
    head_dim=64,
    feed_forward=1376,
    context=2048,
    rope=Rope(dims=64),
)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = report.parser("store", __doc__)
    add = parser.add_argument
    add("--path", type=Path, default=Path(), help="a directory on the disk that is asked about")
    add("--rounds", type=int, default=41, help="of entries of 4 MB; fewer of larger ones")
    add("--size", type=int, action="append", metavar="BYTES", help="of an entry; repeatable")
    add("--only", nargs="+", choices=("memory", "disk", "restart"), metavar="SECTION")
    add("--entries", type=int, default=20_000, help="in the directory that is scanned; 0: none")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measure, write, show."""
    options = parse(arguments)
    console = Console()
    made = report.Report("store", options)
    wanted = options.only or ("memory", "disk", "restart")
    with tempfile.TemporaryDirectory(dir=options.path, prefix="bench-store-") as name:
        if "memory" in wanted:
            rates = operations()
            made.add("memory", rates)
            console.print(operations_table(rates, "in memory: operations per second"))
        if "disk" in wanted:
            for section, found in measure_disk(Path(name), options, console).items():
                made.add(section, found)
        if "restart" in wanted:
            found = restart(Path(name) / "restart")
            made.add("restart", found)
            console.print(
                f"first token after {found['tokens']} tokens (42M parameters): computed "
                f"{found['cold']:.3f} s, from disk after a restart {found['warm']:.3f} s: "
                f"{found['warm'] / found['cold']:.2f}x"
            )
    report.show_machine(made.results, console)
    return 0


def operations_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Operations per second."""
    table = Table(title=title)
    whats = list(dict.fromkeys(row["what"] for row in rows))
    for column in ("way", *whats):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in dict.fromkeys(row["way"] for row in rows):
        rates = {row["what"]: row["per_second"] for row in rows if row["way"] == way}
        table.add_row(way, *(f"{rates[what]:,.0f}" if what in rates else "" for what in whats))
    return table


def measure_disk(path: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The disk tier beside raw files."""
    results = []
    for size in options.size or disk.SIZES:
        rounds = max(5, min(options.rounds, options.rounds * 16 * disk.MiB // size))
        below = path / str(size)
        below.mkdir()
        results += disk.measured(below, size, rounds)
    small = disk.operations(path)
    batch = disk.batches(path)
    scan = disk.scans(path, options.entries) if options.entries else None
    table = Table(title="disk tier: GB/s, and of raw files' speed")
    for column in ("bytes", "way", "write", "read", "read again", "ms of CPU"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for size in dict.fromkeys(row["bytes"] for row in results):
        for way in dict.fromkeys(row["way"] for row in results):
            cells = [
                f"{row['GB/s']:.2f} {row['of raw, pair by pair']:5.0%}"
                for what in ("write", "read", "read again")
                for row in results
                if (row["bytes"], row["way"], row["what"]) == (size, way, what)
            ]
            processor = [
                f"{1e3 * row['processor seconds']:.2f}"
                for what in ("write", "read")
                for row in results
                if (row["bytes"], row["way"], row["what"]) == (size, way, what)
            ]
            table.add_row(f"{size:,}", way, *cells, ", ".join(processor))
        table.add_section()
    console.print(table)
    title = f"on disk, {small[0]['bytes']:,} bytes each, synced: operations per second"
    console.print(operations_table(small, title))
    console.print(
        f"entries of {batch['bytes']:,} bytes: {1e3 * batch['single']:.2f} ms each written one by "
        f"one, {1e3 * batch['batch']:.2f} ms in batches of {batch['count']}"
    )
    if scan:
        console.print(f"{scan['entries']:,} entries found at a start in {scan['seconds']:.2f} s")
    return {"disk": results, "disk operations": small, "batch": batch, "scan": scan}


def operations(rounds: int = 7) -> list[dict[str, Any]]:
    """Operations per second: entries put with evictions, those read that are there, and not."""
    small = Entry({"x": np.zeros(64, np.uint8)}, {})
    keys = [f"sequence {i}" for i in range(ENTRIES)]
    absent = [f"other {i}" for i in range(ENTRIES)]
    ways: dict[str, Callable[[], tuple[Any, Any]]] = {"dict": _dictionary, "jkv.store": _store}
    if importlib.util.find_spec("cachetools"):
        ways["cachetools.LRUCache"] = _cachetools
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for way, make in ways.items():
            put, get = make()
            for what, call, asked in (
                ("put", lambda key, put=put: put(key, small), keys),
                ("get", get, keys[-LIMIT:] * 2),
                ("miss", get, absent),
            ):
                start = time.perf_counter()
                for key in asked:
                    call(key)
                seconds = time.perf_counter() - start
                times.setdefault((way, what), []).append(len(asked) / seconds)
    with Store(tiers=[Memory(max_entries=LIMIT)]) as store:
        batches = [keys[i : i + 50] for i in range(0, ENTRIES, 50)]
        for what, call in (
            ("put", lambda some: store.put_many(some, [small] * len(some))),
            ("get", store.get_many),
        ):
            start = time.perf_counter()
            for some in batches:
                call(some)
            rate = ENTRIES / (time.perf_counter() - start)
            times[("jkv.store, 50 at once", what)] = [rate]
    return [
        {"way": way, "what": what, "per_second": statistics.median(rates)}
        for (way, what), rates in times.items()
    ]


def _dictionary() -> tuple[Any, Any]:
    held: dict[str, Any] = {}
    return held.__setitem__, held.get


def _cachetools() -> tuple[Any, Any]:
    import cachetools

    held = cachetools.LRUCache(LIMIT)
    return held.__setitem__, held.get


def _store() -> tuple[Any, Any]:
    store = Store(tiers=[Memory(max_entries=LIMIT)])
    return store.put, store.get


def restart(path: Path, tokens: int = 1000, rounds: int = 5) -> dict[str, Any]:
    """Seconds to the first token after a prompt: computed, and from a directory written before.

    The model has 42M parameters; what is compiled is compiled before. Each round has a prompt of
    its own, and each store is opened anew on the directory.
    """
    model = jax.jit(lambda: jkv.Decoder(LLAMA_42M, rngs=nnx.Rngs(0)))()
    rng = np.random.default_rng(0)
    cold, warm, size = [], [], 0
    for _ in range(rounds + 1):
        prompt = rng.integers(3, LLAMA_42M.vocab, tokens).tolist()
        for times in (cold, warm):
            with Store(tiers=[Memory(1 << 30), Disk(path, 4 << 30)]) as store:
                out = jkv.generate(model, [prompt], max_new_tokens=1, stop=(), store=store)
                times.append(out.prefill_seconds)
                if times is warm and out.reused is not None and out.reused[0] < tokens - 1:
                    raise RuntimeError("nothing was found in the directory")
                size = max(size, store.stats()["bytes"])
    found = {"tokens": tokens, "bytes": size}
    return found | {"cold": statistics.median(cold[1:]), "warm": statistics.median(warm[1:])}
