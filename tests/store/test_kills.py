"""Processes that are killed while they write, at random and at every system call of it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jkv.store import Disk
from tests.store.victim import KEYS, number_of, value

ROOT = Path(__file__).resolve().parents[2]
# What a write asks the system for, in this order: the call, and which one of that name it is.
CALLS = [
    ("openat", 1),  # the temporary file
    ("flock", 1),
    ("writev", 1),  # the payload
    ("fadvise64", 1),
    ("writev", 2),  # the header
    ("fsync", 1),
    ("rename", 1),
    ("openat", 2),  # the directory
    ("fsync", 2),
    ("close", 1),
    ("close", 2),
]


class Victim:
    """A process that forks others, and what they say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.store.victim", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.hear() == ["ready"]

    def tell(self, *words: object) -> int:
        """The child's id."""
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        word, child = self.hear()
        assert word == "child"
        return int(child)

    def hear(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def rest(self) -> tuple[list[list[str]], int]:
        """What a child still says, and how it ended."""
        lines = []
        while (line := self.hear())[0] != "ended":
            lines.append(line)
        return lines, int(line[1])

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    if not sys.platform.startswith("linux"):
        pytest.skip("kills and traces as Linux does them")
    victim = Victim(tmp_path / "disk")
    yield victim
    victim.close()


def leftovers(path: Path) -> list[str]:
    return [file.name for file in path.iterdir() if file.name.startswith(".tmp-")]


@pytest.mark.parametrize("rounds", [8, pytest.param(200, marks=pytest.mark.soak)])
def test_killed_at_random(victim, rounds, found):
    rng = np.random.default_rng(0)
    newest: dict[str, int] = {}
    number = unfinished = 0
    for _ in range(rounds):
        child = victim.tell("loop", number)
        heard = [victim.hear() for _ in range(rng.integers(1, 4))]  # it has got somewhere
        time.sleep(rng.uniform(0, 0.01))  # and is anywhere now
        os.kill(child, signal.SIGKILL)
        said, status = victim.rest()
        said = heard + said
        assert status == -signal.SIGKILL
        for word, acknowledged in said:
            assert word == "ack"
            number = int(acknowledged) + 1
            newest[KEYS[int(acknowledged) % len(KEYS)]] = int(acknowledged)
        unfinished += len(leftovers(victim.path))
        # The next start: what was acknowledged is there, or what was being written when it ended.
        disk = Disk(victim.path)
        assert set(newest) <= set(disk.scan()) <= {*newest, KEYS[number % len(KEYS)]}
        assert leftovers(victim.path) == []
        for key in KEYS:
            read = number_of(disk.read(key))
            maybe = {number} if key == KEYS[number % len(KEYS)] else set()
            assert read in {newest.get(key)} | maybe
            if read == number:
                newest[key] = read
        number += 1
    assert number >= 2 * rounds  # one that is acknowledged and one that is not, of each
    assert not (victim.path / "quarantine").exists()
    found(
        kills=rounds,
        entries_written=number,
        acknowledged_and_lost=0,  # the first one fails this test, as
        corrupt_ones_served=0,
        leftovers_found_and_removed=unfinished,
    )


@contextlib.contextmanager
def traced(child: int, tmp_path: Path, *options: str) -> Iterator[Path]:
    """The trace of a running process; skips where tracing is not to be had."""
    if (strace := shutil.which("strace")) is None:
        pytest.skip("strace is not installed: no faults at a chosen system call")
    log = tmp_path / "trace"
    tracer = subprocess.Popen(
        [strace, "-f", "-y", "-o", str(log), "-p", str(child), *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert tracer.stderr is not None
        if "attached" not in (line := tracer.stderr.readline()):
            os.kill(child, signal.SIGKILL)
            pytest.skip(f"strace may not trace here: {line}")
        yield log
    finally:
        assert tracer.stderr is not None
        tracer.wait(30)
        tracer.stderr.close()


class Round:
    """One write of a value over another, with a fault at one of its system calls."""

    def __init__(self, victim: Victim, tmp_path: Path, *options: str) -> None:
        go = tmp_path / "go"
        go.unlink(missing_ok=True)
        Disk(victim.path).write("key", value(1))
        child = victim.tell("write", "key", 2, go)
        with traced(child, tmp_path, *options) as log:
            go.touch()
            self.said, self.status = victim.rest()
        self.trace = log.read_text()


def test_what_a_write_asks_for(victim, tmp_path):
    """It is synced before it has its name, and the directory after; these calls are all."""
    trace = Round(victim, tmp_path, "-etrace=%file,%desc,flock").trace
    lines = [re.sub(r"^\d+ +", "", line) for line in trace.splitlines()]
    begun = next(i for i, line in enumerate(lines) if line.startswith("openat") and ".tmp-" in line)
    ended = next(i for i, line in enumerate(lines) if i > begun and "key_27" in line)
    others = re.compile("(new)?fstat|lseek|fcntl|m(un)?map")
    calls = [line for line in lines[begun:ended] if not others.match(line)]
    assert [call.split("(")[0] for call in calls[: len(CALLS)]] == [call for call, _ in CALLS]
    assert ".tmp-" in calls[5]  # fsync
    assert re.search(r"disk>?\"?", calls[8])
    assert ".tmp-" not in calls[8]


def test_killed_at_every_call(victim, tmp_path):
    """The value from before, or the new one; never another, and nothing is left lying."""
    found = []
    for call, n in CALLS:
        this = Round(victim, tmp_path, f"-einject={call}:signal=KILL:when={n}")
        assert this.status == -signal.SIGKILL
        assert this.said == []
        disk = Disk(victim.path)
        found.append((len(leftovers(victim.path)), number_of(disk.read("key"))))
        assert set(disk.scan()) == {"key"}
        assert leftovers(victim.path) == []
        disk.write("key", value(3))
        assert number_of(disk.read("key")) == 3
    # Calls that were entered when the signal came are done, or not: the kernel's choice. From the
    # call after the renaming on it is the new value.
    assert {number for _, number in found[:6]} == {1}
    assert {number for _, number in found[7:]} == {2}
    assert {left for left, _ in found[2:6]} == {1}
    assert not (victim.path / "quarantine").exists()


ERRORS = ["ENOSPC", *(pytest.param(name, marks=pytest.mark.soak) for name in ("EIO", "EACCES"))]


@pytest.mark.parametrize("error", ERRORS)
def test_failed_at_every_call(victim, tmp_path, error, found):
    """Refused by the system itself: it is told, the value from before stays, and life goes on."""
    outcomes = []
    for call, n in CALLS:
        this = Round(victim, tmp_path, f"-einject={call}:error={error}:when={n}")
        assert "(INJECTED)" in this.trace
        assert this.status == 0
        (words,) = this.said
        *said, before, after = words
        assert after == "3"  # the next operation of the same process
        outcomes.append((" ".join(said).split()[0], before))
        disk = Disk(victim.path)
        disk.scan()
        assert leftovers(victim.path) == []
        read = number_of(disk.read("key"))
        assert str(read) == before
    assert outcomes == [
        ("error", "1"),  # no file
        ("ok", "2"),  # no lock: nothing depends on it but who cleans up
        ("error", "1"),
        ("ok", "2"),  # the disk was not told to begin, and began later
        ("error", "1"),
        ("error", "1"),
        ("error", "1"),  # not renamed
        ("error", "None"),  # not sure to survive a power cut: nobody's
        ("error", "None"),
        ("ok", "2"),  # not closed: it was synced
        ("ok", "2"),
    ]
    found(calls_that_failed=len(CALLS), outcomes=outcomes)
