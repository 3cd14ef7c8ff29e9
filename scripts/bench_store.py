"""What the store's tiers cost: the disk tier beside raw files, tensorstore and diskcache.

    python scripts/bench_store.py --path /where/the/disk/is --json store.json

All ways take turns; shown are median speeds, and the median share of raw files' speed in the same
turn, which is the better figure where a machine does other things as well. "read" is from the disk:
what the system had in memory of the files is dropped before (as far as the host of a virtual
machine lets it); "read again" is from the system's memory. Raw files are synced, renamed and their
directory synced, as the tier does it; diskcache syncs nothing. The processor's time, of a write and
of a read, does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import disk, machine


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--path", type=Path, default=Path(), help="a directory on the disk that is asked about")
    add("--rounds", type=int, default=41, help="of entries of 4 MB; fewer of larger ones")
    add("--size", type=int, action="append", metavar="BYTES", help="of an entry; repeatable")
    add("--entries", type=int, default=20_000, help="in the directory that is scanned; 0: none")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    console = Console()
    results = []
    with tempfile.TemporaryDirectory(dir=options.path, prefix="bench_store-") as name:
        for size in options.size or disk.SIZES:
            rounds = max(5, min(options.rounds, options.rounds * 16 * disk.MiB // size))
            below = Path(name) / str(size)
            below.mkdir()
            results += disk.measured(below, size, rounds)
        batch = disk.batches(Path(name))
        scan = disk.scans(Path(name), options.entries) if options.entries else None

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
    console.print(
        f"entries of {batch['bytes']:,} bytes: {1e3 * batch['single']:.2f} ms each written one by "
        f"one, {1e3 * batch['batch']:.2f} ms in batches of {batch['count']}"
    )
    if scan:
        console.print(f"{scan['entries']:,} entries found at a start in {scan['seconds']:.2f} s")
    if options.json:
        said = {"machine": machine.describe(), "disk": results, "batch": batch, "scan": scan}
        options.json.write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
