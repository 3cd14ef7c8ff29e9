"""A process that writes and is killed or failed on the way; starts others of its kind by fork.

Commands on its standard input, answers on its standard output:

``write KEY VALUE GO``   a child waits until the file GO exists, writes entry VALUE under KEY, then
                         VALUE + 1 under KEY + "'", reads both, and says what came of it
``loop FIRST``           a child writes entries FIRST, FIRST + 1, ... under keys in turn, and says
                         each one that was acknowledged, until somebody ends it
"""

from __future__ import annotations

import ctypes
import os
import sys
import time

import numpy as np

from jkv.errors import TierError
from jkv.store.disk import Disk
from jkv.store.entry import Entry

KEYS = [f"key/{i}" for i in range(4)]


def value(number: int) -> Entry:
    """An entry that says of itself which it is."""
    size = 100 + 7919 * (number % 5)
    return Entry({"x": np.full(size, number), "y": np.arange(number % 3)}, {"number": number})


def number_of(entry: Entry | None) -> int | None:
    """Which entry it is; ValueError if it is none that was ever written."""
    if entry is None:
        return None
    wanted = value(entry.meta["number"])
    for name, array in wanted.arrays.items():
        if not np.array_equal(entry.arrays[name], array):
            raise ValueError(f"not as it was written: {entry.meta}")
    return entry.meta["number"]


def say(*words: object) -> None:
    # One call: lines of two processes do not mix.
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def write(disk: Disk, key: str, number: int, go: str) -> None:
    # Anybody may trace it, where only one's own children may be traced.
    ctypes.CDLL(None).prctl(0x59616D61, -1, 0, 0, 0)
    while not os.path.exists(go):
        time.sleep(0.001)
    try:
        disk.write(key, value(number))
        said = "ok"
    except TierError as error:
        said = f"error {error.errno}"
    before = number_of(disk.read(key))
    disk.write(f"{key}'", value(number + 1))
    say(said, before, number_of(disk.read(f"{key}'")))


def loop(disk: Disk, number: int) -> None:
    while True:
        disk.write(KEYS[number % len(KEYS)], value(number))
        say("ack", number)
        number += 1


def main(path: str) -> None:
    disk = Disk(path)
    say("ready")
    for line in sys.stdin:
        command, *words = line.split()
        announced, announce = os.pipe()
        child = os.fork()
        if not child:
            os.read(announced, 1)  # what it says comes after its number
            if command == "write":
                write(disk, words[0], int(words[1]), words[2])
            else:
                loop(disk, int(words[0]))
            os._exit(0)
        say("child", child)
        os.write(announce, b".")
        os.close(announced)
        os.close(announce)
        _, status = os.waitpid(child, 0)
        say("ended", os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(sys.argv[1])
