"""`jkv store stats`, `ls`, `verify` and `gc`: what is in a directory of the store."""

from __future__ import annotations

import collections
import datetime
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from jkv._bytes import parse_bytes
from jkv._tables import columns
from jkv.cli import options, process
from jkv.errors import CorruptError

Directory = Annotated[
    Path, typer.Argument(help="A directory of the disk tier.", exists=True, file_okay=False)
]


def stats(path: Directory, as_json: options.AsJson = False) -> None:
    """Tell how much is there, and whose."""
    found = entries(path)
    now = time.time()
    by_tenant: dict[str, dict[str, int]] = collections.defaultdict(collections.Counter)  # pyright: ignore[reportAssignmentType]
    for entry in found:
        tenant = by_tenant[entry["tenant"]]
        tenant["entries"] += 1
        tenant["bytes"] += entry["bytes"]
        tenant["tokens"] += entry.get("tokens") or 0
    written = [entry["updated"] for entry in found if entry.get("updated")]
    report = {
        "entries": len(found),
        "bytes": sum(entry["bytes"] for entry in found),
        "tokens": sum(entry.get("tokens") or 0 for entry in found),
        "expired": sum((entry.get("expires") or now + 1) <= now for entry in found),
        "damaged": sum(entry["damaged"] for entry in found),
        "oldest": min(written, default=None),
        "newest": max(written, default=None),
        "tenants": {name: dict(counts) for name, counts in by_tenant.items()},
    }
    if as_json:
        print(json.dumps(report))
        return
    rows = [["", "entries", "size", "tokens"]]
    owners = {"all": report} | {f"tenant {n!r}": t for n, t in report["tenants"].items() if n}
    for name, of in owners.items():
        size = process.size(of["bytes"])
        rows.append([name, f"{of['entries']:,}", size, f"{of['tokens']:,}"])
    print("\n".join(columns(rows)))
    if written:
        print(f"written from {_time(report['oldest'])} to {_time(report['newest'])}")
    if report["expired"] or report["damaged"]:
        print(f"{report['expired']} expired, {report['damaged']} damaged")


def ls(
    path: Directory,
    tenant: Annotated[str | None, typer.Option(help="Only those of this tenant.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """List the entries, the oldest first."""
    found = [e for e in entries(path) if tenant is None or e["tenant"] == tenant]
    if as_json:
        print(json.dumps({"entries": found}))
        return
    rows = [["key", "tenant", "size", "tokens", "form", "written"]]
    for entry in found:
        tokens = "" if entry.get("tokens") is None else f"{entry['tokens']:,}"
        form = "damaged" if entry["damaged"] else entry["form"]
        size, when = process.size(entry["bytes"]), _time(entry.get("updated"))
        rows.append([_plain(entry["key"]), _plain(entry["tenant"]), size, tokens, form, when])
    print("\n".join(columns(rows, left=2)))


def verify(path: Directory, as_json: options.AsJson = False) -> int:
    """Read everything and check it. What is damaged is moved to quarantine/; the status is 1."""
    from jkv.store import Disk

    disk = Disk(path)
    problems = disk.verify()
    good = len(disk.scan())
    if as_json:
        print(json.dumps({"good": good, "problems": problems}))
    else:
        for name, problem in problems.items():
            print(f"{name}: {problem}")
        print(f"{good} good, {len(problems)} put into quarantine/")
    return 1 if problems else 0


def gc(
    path: Directory,
    older_than: Annotated[
        float | None, typer.Option(help="Days: entries written longer ago go.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Bytes to keep, such as 100GiB: the oldest go.")
    ] = None,
    max_entries: Annotated[int | None, typer.Option(help="Entries to keep.", min=0)] = None,
    as_json: options.AsJson = False,
) -> None:
    """Remove entries that are expired, too old or too many.

    What belonged to a process that has ended goes too. Pinned entries stay.
    """
    from jkv.store import Disk, Store

    limit = None if max_bytes is None else parse_bytes(max_bytes, "--max-bytes")
    before = Disk(path).scan()
    with Store([Disk(path)]) as store:
        store.drain()
        store.sweep(None if older_than is None else older_than * 86400)
        store.resize(0, max_bytes=limit, max_entries=max_entries)
        after = store.stats()
    report = {
        "removed": len(before) - after["entries"],
        "freed": sum(before.values()) - after["bytes"],
        "entries": after["entries"],
        "bytes": after["bytes"],
    }
    if as_json:
        print(json.dumps(report))
    else:
        print(
            f"{report['removed']} removed, {process.size(report['freed'])} freed; "
            f"{report['entries']} left, {process.size(report['bytes'])}"
        )


def entries(path: Path) -> list[dict[str, Any]]:
    """List what a directory holds, from headers alone, the oldest first; nothing is changed."""
    from jkv.store import Disk
    from jkv.store.keys import split_name
    from jkv.store.schema import META

    disk = Disk(path)
    found = []
    for name, size in disk.scan().items():
        tenant, key = split_name(name)
        entry: dict[str, Any] = {"key": key, "tenant": tenant, "bytes": size, "damaged": False}
        try:
            meta = disk.describe(name)
        except CorruptError:
            entry["damaged"] = True
            meta = None
        if meta is not None:
            known = meta.get(META) or {}
            tokens = known.get("tokens")
            entry["form"] = str(meta.get("form", "exact"))
            # Four bytes each, as base64.
            entry["tokens"] = None if tokens is None else len(tokens) * 3 // 4 // 4
            for what in ("created", "updated", "expires", "seconds", "pinned"):
                entry[what] = known.get(what)
        elif not entry["damaged"]:
            continue  # gone meanwhile
        found.append(entry)
    return found


def _time(seconds: int | float | None) -> str:
    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def _plain(text: str) -> str:
    """Put a text on one line, whatever it holds."""
    return text if text.isprintable() else repr(text)
