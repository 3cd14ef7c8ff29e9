"""What the store costs, and what it saves: beside dictionaries, raw files, and computing again.

    python scripts/bench_store.py --path /where/the/disk/is --json store.json

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
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import disk, kept, machine


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--path", type=Path, default=Path(), help="a directory on the disk that is asked about")
    add("--rounds", type=int, default=41, help="of entries of 4 MB; fewer of larger ones")
    add("--size", type=int, action="append", metavar="BYTES", help="of an entry; repeatable")
    add("--only", nargs="+", choices=("memory", "disk", "restart"), metavar="SECTION")
    add("--entries", type=int, default=20_000, help="in the directory that is scanned; 0: none")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    console = Console()
    said: dict[str, Any] = {"machine": machine.describe()}
    wanted = options.only or ("memory", "disk", "restart")
    with tempfile.TemporaryDirectory(dir=options.path, prefix="bench_store-") as name:
        if "memory" in wanted:
            said["memory"] = kept.operations()
            title = "in memory: operations per second"
            console.print(operations_table(said["memory"], title))
        if "disk" in wanted:
            said |= measure_disk(Path(name), options, console)
        if "restart" in wanted:
            found = said["restart"] = kept.restart(Path(name) / "restart")
            console.print(
                f"first token after {found['tokens']} tokens (42M parameters): computed "
                f"{found['cold']:.3f} s, from disk after a restart {found['warm']:.3f} s: "
                f"{found['warm'] / found['cold']:.2f}x"
            )
    if options.json:
        options.json.write_text(json.dumps(said, indent=2) + "\n")


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
    operations = disk.operations(path)
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
    title = f"on disk, {operations[0]['bytes']:,} bytes each, synced: operations per second"
    console.print(operations_table(operations, title))
    console.print(
        f"entries of {batch['bytes']:,} bytes: {1e3 * batch['single']:.2f} ms each written one by "
        f"one, {1e3 * batch['batch']:.2f} ms in batches of {batch['count']}"
    )
    if scan:
        console.print(f"{scan['entries']:,} entries found at a start in {scan['seconds']:.2f} s")
    return {"disk": results, "disk operations": operations, "batch": batch, "scan": scan}


if __name__ == "__main__":
    main()
