"""The tier in a directory: one file per entry, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jkv.errors import CorruptError, TierError, UnsupportedError
from jkv.store import codec, zstd
from jkv.store.checksum import PIECE, Checksum
from jkv.store.entry import Entry
from jkv.store.names import SUFFIX, is_name, key_of, name_of

if sys.platform != "win32":
    import fcntl

QUARANTINE = "quarantine"
_KEPT_ASIDE = 32  # files in quarantine; the oldest go
_TEMPORARY = ".tmp-"
_FOREIGN_LOCK = SUFFIX + ".__lock"  # what tensorstore's file driver writes to before it renames
_PIECES = 512  # buffers in one writev; POSIX promises 16, Linux and macOS take 1024
_HEADER = 1 << 14  # bytes that most headers fit into
_BELIEVED = 1 << 26  # bytes of memory that a file may take before it is looked at
_BATCH = 64  # files open at once in a batch
_FORGOTTEN = 24 * 3600.0  # seconds, where a file system has no locks to ask


class Disk:
    """Entries in a directory, which several processes may share.

    A write goes to a temporary name, is synced (fsync), renamed, and the directory is synced: when
    it returns, the entry survives the end of the process, and a power cut as far as the disk keeps
    what it says. A reader sees an entry whole or not. Deleting does not wait for the disk: after a
    power cut a deleted entry may be back. Names are those of `jkv.store.names`; blobs carry their
    key and a checksum, and what is not as it was written is moved to ``quarantine/``, where the
    newest 32 are kept. Files of other names are left alone.

    The layout is that of tensorstore's file driver, so ``Remote("file:///...")`` reads and writes
    the same directory. It is not used here since it reads 64 MB at a third of a file's speed and
    writes at half: from Python, values are copied into pieces of 4 KiB, and out of a buffer again.

    Args:
        path: created if it is not there.
        max_bytes, max_entries: limits that a store is to keep; nothing is refused here.
        compression: None, or "zstd" (lossless) for what is written from now on.

    Raises:
        TierError: there is no such directory and none can be made.
        UnsupportedError: no zstd is installed, or the system is Windows.
    """

    name = "disk"
    persistent = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int | None = None,
        max_entries: int | None = None,
        *,
        compression: str | None = None,
    ) -> None:
        if os.name != "posix":
            raise UnsupportedError(
                "Disk needs POSIX renames and locks; Remote('file:///C:/...') does without"
            )
        zstd.check(compression)
        self.path = Path(path).absolute()
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.compression = compression
        try:
            if not self.path.is_dir():
                self.path.mkdir(parents=True, exist_ok=True)
                _sync_directory(self.path.parent)
        except OSError as error:
            raise TierError(error.errno, f"no directory for the disk tier: {error}") from error

    def scan(self) -> dict[str, int]:
        """Keys that are there and the bytes of their files, the least recently written first.

        Looks at names and sizes, and into the headers of keys too long for a name; not into
        payloads. Temporary files of dead writers are removed; what cannot be a blob is put aside.

        Raises:
            TierError: the directory cannot be read.
        """
        found = []
        try:
            for item in self._listed():
                try:
                    if item.name.startswith(_TEMPORARY) or item.name.endswith(_FOREIGN_LOCK):
                        _remove_if_abandoned(item.path)
                    elif is_name(item.name) and (key := self._listed_key(item)) is not None:
                        status = item.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, key, status.st_size))
                except OSError:  # gone meanwhile, or not ours to open: `read` says so, if asked
                    continue
        except OSError as error:
            raise TierError(error.errno, f"{self.path} cannot be read: {error}") from error
        return {key: size for _, key, size in sorted(found)}

    def write(self, key: str, entry: Entry) -> int:
        """Keep it; bytes of its file.

        Raises:
            TierError: it could not be kept. What was there before is; where only the last sync, of
                the directory, failed, nothing is.
            UnsupportedError: blobs cannot hold it.
        """
        result = self.write_many({key: entry})[key]
        if isinstance(result, TierError):
            raise result
        return result

    def write_many(self, entries: Mapping[str, Entry]) -> dict[str, int | TierError]:
        """Keep several, with one sync of the directory for every 64; for each its bytes or error.

        Raises:
            UnsupportedError: blobs cannot hold one of them; some may have been written.
        """
        results: dict[str, int | TierError] = {}
        items = list(entries.items())
        for at in range(0, len(items), _BATCH):
            results |= self._write_batch(items[at : at + _BATCH])
        return results

    def _write_batch(self, items: list[tuple[str, Entry]]) -> dict[str, int | TierError]:
        results: dict[str, int | TierError] = {}
        written: list[tuple[str, _Temporary]] = []
        renamed: list[str] = []
        try:
            for key, entry in items:
                pieces = codec.encode(entry, key, compression=self.compression)
                try:
                    written.append((key, _Temporary(self.path, pieces)))
                except OSError as error:
                    results[key] = self._failed("written", key, error)
            for key, file in written:  # all were begun, so that the disk has enough to do
                try:
                    os.fsync(file.file)
                    self._rename(file, name_of(key))
                except OSError as error:
                    results[key] = self._failed("written", key, error)
                else:
                    renamed.append(key)
                    results[key] = file.nbytes
            try:
                if renamed:
                    _sync_directory(self.path)
            except OSError as error:
                for key in renamed:
                    with contextlib.suppress(OSError):
                        os.unlink(self.path / name_of(key))
                    results[key] = self._failed("written", key, error)
        finally:
            for _, file in written:
                file.close()
        return results

    def _rename(self, file: _Temporary, name: str) -> None:
        try:
            os.rename(file.path, self.path / name)
        except IsADirectoryError:
            self._put_aside(name)
            os.rename(file.path, self.path / name)
        file.renamed = True

    def read(self, key: str) -> Entry | None:
        """The entry, its arrays read-only in memory of their own; None if there is none.

        Raises:
            CorruptError: what is there is not what was written; it is in quarantine now.
            TierError: it cannot be read now.
        """
        name = name_of(key)
        try:
            with _opened(self.path / name) as file:
                if file is None:
                    return None
                try:
                    data, found = _contents(file)
                    return codec.decode(data, key, found=found)
                except CorruptError as error:
                    self._put_aside(name, file)
                    raise CorruptError(f"{self.path / name}: {error}") from None
        except OSError as error:
            raise self._failed("read", key, error) from error
        except (MemoryError, UnsupportedError) as error:  # no room, or no zstd, in this process
            raise TierError(f"{key[:80]!r} not read in {self.path}: {error}") from error

    def describe(self, key: str) -> Mapping[str, Any] | None:
        """The meta of an entry, from its header alone; None if there is none.

        Raises:
            CorruptError: the header is damaged; `read` puts it aside.
            TierError: it cannot be read now.
        """
        try:
            with _opened(self.path / name_of(key)) as file:
                if file is None:
                    return None
                start, _ = codec.measure(os.pread(file, codec.PREFIX, 0))
                header = codec.read_header(os.pread(file, start, 0))
        except OSError as error:
            raise self._failed("read", key, error) from error
        return header.meta if header.key == key else None

    def read_many(self, keys: Iterable[str]) -> dict[str, Entry | CorruptError | TierError | None]:
        """What `read` gives or raises for each of them."""
        results: dict[str, Entry | CorruptError | TierError | None] = {}
        for key in keys:
            try:
                results[key] = self.read(key)
            except (CorruptError, TierError) as error:
                results[key] = error
        return results

    def delete(self, key: str) -> None:
        """Drop it; nothing happens if it is not there.

        Raises:
            TierError: it could not be dropped, and may still be there.
        """
        try:
            os.unlink(self.path / name_of(key))
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            self._put_aside(name_of(key))
        except OSError as error:
            raise self._failed("deleted", key, error) from error

    def verify(self) -> dict[str, str]:
        """Reads everything there is; what is wrong, by file name; what is damaged goes aside.

        Raises:
            TierError: the directory cannot be read.
        """
        problems = {}
        try:
            names = sorted(item.name for item in self._listed() if is_name(item.name))
        except OSError as error:
            raise TierError(error.errno, f"{self.path} cannot be read: {error}") from error
        for name in names:
            try:
                with _opened(self.path / name) as file:
                    if file is None:
                        continue
                    try:
                        data, found = _contents(file)
                        key = codec.read_header(data).key
                        if name_of(key) != name:
                            raise CorruptError(f"it holds the key {key[:80]!r} of another file")
                        codec.decode(data, found=found)
                    except CorruptError as error:
                        self._put_aside(name, file)
                        problems[name] = str(error)
            except (OSError, MemoryError, UnsupportedError) as error:  # left where it is
                problems[name] = f"cannot be read: {error}"
        return problems

    def close(self) -> None:
        """Nothing is held open between calls."""

    def _listed(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.path) as items:
            yield from items

    def _listed_key(self, item: os.DirEntry[str]) -> str | None:
        """The key of a blob, looked for in its header if it is too long for a name.

        None if it cannot be a blob, which is put aside.
        """
        is_file = item.is_file(follow_symlinks=False)
        if not is_file or item.stat(follow_symlinks=False).st_size < codec.PREFIX:
            self._put_aside(item.name)
            return None
        if (key := key_of(item.name)) is not None:
            return key
        with _opened(self.path / item.name) as file:
            if file is None:
                return None
            try:
                head = os.pread(file, _HEADER, 0)
                start, _ = codec.measure(head)
                key = codec.read_header(
                    head if len(head) >= start else os.pread(file, start, 0)
                ).key
                if name_of(key) == item.name:
                    return key
            except CorruptError:
                pass
            self._put_aside(item.name, file)
        return None

    def _put_aside(self, name: str, file: int | None = None) -> None:
        """Into quarantine, unless the name has meanwhile been given to another file."""
        path = self.path / name
        aside = self.path / QUARANTINE
        # What cannot be moved stays and is looked at again: the caller's error is the one to tell.
        with contextlib.suppress(OSError):
            if file is not None and not os.path.samestat(os.lstat(path), os.fstat(file)):
                return
            aside.mkdir(exist_ok=True)
            os.rename(path, aside / f"{time.time_ns():020d}-{name}")
            for old in sorted(item for item in aside.iterdir() if not item.is_dir())[:-_KEPT_ASIDE]:
                old.unlink()

    def _failed(self, what: str, key: str, error: OSError) -> TierError:
        return TierError(error.errno, f"{key[:80]!r} not {what} in {self.path}: {error.strerror}")


class _Temporary:
    """A file under a name that nobody looks for, locked while its writer lives.

    Raises:
        OSError: as the system said; nothing is left.
    """

    def __init__(self, directory: Path, pieces: list[memoryview]) -> None:
        self.nbytes = sum(map(len, pieces))
        self.renamed = False
        complete = False
        while not complete:
            self.path = directory / f"{_TEMPORARY}{secrets.token_hex(12)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self.file = os.open(self.path, flags, 0o666)
            try:
                _lock(self.file)
                if os.fstat(self.file).st_nlink:  # else a `scan` came between, and removed it
                    _write_all(self.file, pieces)
                    complete = True
            finally:
                if not complete:
                    self.close()

    def close(self) -> None:
        if not self.renamed:
            with contextlib.suppress(OSError):  # the next `scan` removes it
                os.unlink(self.path)
        with contextlib.suppress(OSError):  # synced before: closing has nothing to add
            os.close(self.file)


def _write_all(file: int, pieces: list[memoryview]) -> None:
    """All of them, however little the system takes at a time (2 GiB at most, on Linux)."""
    rest = [piece for piece in pieces if len(piece)]
    while rest:
        count = os.writev(file, rest[:_PIECES])
        done = 0
        while done < len(rest) and count >= len(rest[done]):
            count -= len(rest[done])
            done += 1
        rest = rest[done:]
        if count:
            rest[0] = rest[0][count:]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """The file to be read, None if there is none; a directory opens too, a pipe does not hang."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file = os.open(path, flags)
    except FileNotFoundError:
        yield None
        return
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # it was only read
            os.close(file)


def _contents(file: int) -> tuple[memoryview, bytes]:
    """All bytes of a blob, on a boundary of 64 as XLA likes it, and its payload's checksum.

    Read, and not mapped: a mapped file that somebody cuts short ends the process. Each piece is
    summed up while it is in the processor's cache, and the system reads on meanwhile.

    Raises:
        CorruptError: it is no blob by its first bytes, or not as long as they say.
        OSError: as the system said.
    """
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise CorruptError("it is not a file")
    nbytes = status.st_size
    if nbytes > _BELIEVED:  # else it is as cheap to read it at once: one wait for the disk
        _check_length(os.pread(file, codec.PREFIX, 0), nbytes)
    room = np.empty(nbytes + 64, np.uint8)
    skipped = -room.ctypes.data % 64
    view = room[skipped : skipped + nbytes].data
    sums, summed, done = Checksum(), 0, 0
    while done < nbytes:
        if not (count := os.preadv(file, [view[done : done + PIECE]], done)):
            raise CorruptError(f"cut off at {done} bytes of {nbytes} while it was read")
        done += count
        if not summed and done >= min(codec.PREFIX, nbytes):
            summed = _check_length(view[:done], nbytes)
        whole = done if done == nbytes else summed + (done - summed) // PIECE * PIECE
        if whole > summed > 0:
            sums.update(view[summed:whole])
            summed = whole
    return view.toreadonly(), sums.finish()


def _check_length(head: bytes | memoryview, nbytes: int) -> int:
    """Where the payload starts; CorruptError where a blob has not the length of its file."""
    start, written = codec.measure(head)
    if nbytes != written:
        raise CorruptError(f"{nbytes} bytes where {written} were written")
    return start


def _lock(file: int) -> None:
    # Some network file systems have no locks; there, leftovers are told by their age.
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)


def _remove_if_abandoned(path: str) -> None:
    """Removes a temporary file that nobody holds a lock on: the lock goes with its process.

    Raises:
        OSError: it cannot be opened or removed.
    """
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if sys.platform == "linux":  # tensorstore's kind of lock, which flock does not see
                lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
            abandoned = True
        except OSError as error:
            held = error.errno in (errno.EAGAIN, errno.EACCES)
            abandoned = not held and time.time() - os.fstat(file).st_mtime > _FORGOTTEN
        if abandoned:
            os.unlink(path)
    finally:
        os.close(file)


def _sync_directory(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        with contextlib.suppress(OSError):
            os.close(file)
