"""`jkv store stats`, `ls`, `verify` and `gc` on a directory."""

from __future__ import annotations

import json
import time

import pytest

from jkv.cli import main
from jkv.store import Disk, Entry, Store
from jkv.store.codec import blob_name
from tests.store.fakes import Clock, entry
from tests.store.test_corruption import reseal


@pytest.fixture
def path(tmp_path):
    clock = Clock(1_700_000_000)
    with Store([Disk(tmp_path)], clock=clock) as store:
        store.put("a", entry(1, 1000), tokens=range(41), seconds=2.5)
        store.put("b\nc", entry(2, 1000), tenant="x", ttl=60)
        store.put("c", entry(3, 5000), pin=True)
    return tmp_path


def run(capsys, *arguments, status=0):
    with pytest.raises(SystemExit) as end:
        main(["store", *map(str, arguments)])
    said = capsys.readouterr()
    assert end.value.code == status, said.err
    return said.out


def test_stats(path, capsys):
    said = json.loads(run(capsys, "stats", path, "--json"))
    assert (said["entries"], said["tokens"], said["expired"], said["damaged"]) == (3, 41, 1, 0)
    assert said["tenants"]["x"]["entries"] == 1
    assert said["bytes"] == sum(f.stat().st_size for f in path.glob("*.jkv"))
    text = run(capsys, "stats", path)
    assert "tenant 'x'" in text
    assert "1 expired" in text
    assert len(Disk(path).scan()) == 3  # looking changes nothing


def test_ls(path, capsys):
    found = json.loads(run(capsys, "ls", path, "--json"))["entries"]
    assert [(e["key"], e["tenant"], e["tokens"]) for e in found] == [
        ("a", "", 41),
        ("b\nc", "x", None),
        ("c", "", None),
    ]
    assert found[0]["seconds"] == 2.5
    assert found[0]["form"] == "exact"
    text = run(capsys, "ls", path, "--tenant", "x")
    assert len(text.splitlines()) == 2
    assert "'b\\nc'" in text


def test_verify(path, capsys):
    assert "3 good, 0 put" in run(capsys, "verify", path)
    file = max(path.glob("*.jkv"), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    said = json.loads(run(capsys, "verify", path, "--json", status=1))
    assert said["good"] == 2
    assert list(said["problems"]) == [file.name]
    assert "2 good" in run(capsys, "verify", path)


def test_a_damaged_header_is_listed(path, capsys):
    file = min(path.glob("*.jkv"))
    data = bytearray(file.read_bytes())
    data[70] ^= 1
    file.write_bytes(data)
    assert json.loads(run(capsys, "stats", path, "--json"))["damaged"] == 1
    assert "damaged" in run(capsys, "ls", path)


def test_gc(path, capsys):
    assert json.loads(run(capsys, "gc", path, "--json"))["removed"] == 1  # expired
    assert "0 removed" in run(capsys, "gc", path, "--older-than", "100000")
    # The pinned entry stays, though it does not fit.
    assert "1 removed" in run(capsys, "gc", path, "--max-bytes", "1KiB")
    assert [e["key"] for e in json.loads(run(capsys, "ls", path, "--json"))["entries"]] == ["c"]
    assert "0 removed" in run(capsys, "gc", path, "--older-than", "1")


def test_gc_of_what_is_old(path, capsys):
    assert "2 removed" in run(capsys, "gc", path, "--older-than", "1")


def test_days_are_days(tmp_path, capsys):
    with Store([Disk(tmp_path)], clock=Clock(time.time() - 3 * 86400)) as store:
        store.put("a", entry(1, 1000))
    assert "0 removed" in run(capsys, "gc", tmp_path, "--older-than", "4")
    assert "1 removed" in run(capsys, "gc", tmp_path, "--older-than", "2")


def test_a_trace_of_few_bytes(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"key": "a", "tokens": 5}\n' * 2)
    results = json.loads(run(capsys, "simulate", trace, "--json"))["results"]
    assert sorted({result["capacity"] for result in results}) == [1, 2, 5]


def test_mistakes(tmp_path, capsys):
    run(capsys, "stats", tmp_path / "nothing", status=2)
    run(capsys, "gc", tmp_path, "--max-bytes", "much", status=2)
    assert not (tmp_path / "nothing").exists()


def test_gc_of_what_a_process_left_that_ended(tmp_path, capsys):
    tier = Disk(tmp_path)
    store = Store([tier])
    store.put("waits", entry(1), ephemeral=True, pin=True)
    assert "0 removed" in run(capsys, "gc", tmp_path)
    tier.close()  # as the process's end would
    assert "1 removed" in run(capsys, "gc", tmp_path)
    assert store.get("waits") is None
    store.close()


def test_entries_of_others_making(path, capsys):
    """Odd meta, forms that are no texts, times that are none: shown as damaged, and put aside."""
    for number, how in enumerate(
        (
            lambda meta: meta["store"].update(updated="today"),
            lambda meta: meta["store"].update(updated=1e14),
            lambda meta: meta["store"].update(tokens=7),
            lambda meta: meta.update(store=[1]),
        )
    ):
        disk = Disk(path)
        disk.write(f"0::odd{number}", disk.read("0::a"))
        file = path / blob_name(f"0::odd{number}")
        file.write_bytes(reseal(file.read_bytes(), lambda said, prefix, how=how: how(said["meta"])))
    disk = Disk(path)
    disk.write("0::strange", Entry({}, {"form": ["x"], "length": "many"}))  # by hand
    found = json.loads(run(capsys, "ls", path, "--json"))["entries"]
    assert sum(e["damaged"] for e in found) == 4
    assert json.loads(run(capsys, "stats", path, "--json"))["damaged"] == 4
    assert run(capsys, "ls", path).count("damaged") == 4
    run(capsys, "stats", path)
    said = json.loads(run(capsys, "verify", path, "--json", status=1))
    assert (said["good"], len(said["problems"])) == (4, 4)
    run(capsys, "gc", path, "--older-than", "1")
