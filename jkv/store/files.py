"""Files that are written whole or not at all, read without being mapped, and removed for good."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jkv.errors import CorruptError
from jkv.store import codec
from jkv.store.checksum import PIECE, Checksum
from jkv.store.entry import Entry, Private

if sys.platform != "win32":
    import fcntl

TEMPORARY = ".tmp-"
PRIVATE = 0o600  # conversations can be read from caches
_PIECES = 512  # buffers in one writev; POSIX promises 16, Linux and macOS take 1024
_FIRST = 1 << 16  # bytes read first: while they are looked at, the system fetches what follows
_BELIEVED = 1 << 26  # bytes of memory that a file may take before it is looked at
_FORGOTTEN = 24 * 3600.0  # seconds, where a file system has no locks to ask
_NAME = re.compile(re.escape(TEMPORARY) + "[0-9a-f]{24}")


class Temporary:
    """A file under a name that no reader looks for, locked while its writer lives.

    Args:
        start, payload, header: as `codec.prepare` has them; empty without.
        mode: permissions of the file, whatever the umask.

    Attributes:
        path: of the file; `file`: its descriptor.
        nbytes: that were written.
        renamed: whether it has become something that stays.

    Raises:
        OSError: as the system said; nothing is left.
    """

    def __init__(
        self,
        directory: str,
        start: int = 0,
        payload: Sequence[memoryview] = (),
        header: Callable[[], memoryview] | None = None,
        *,
        mode: int = PRIVATE,
    ) -> None:
        self.nbytes = start + sum(map(len, payload))
        self.renamed = False
        complete = False
        while not complete:
            self.path = os.path.join(directory, TEMPORARY + secrets.token_hex(12))
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self.file = os.open(self.path, flags, mode)
            try:
                _lock(self.file)
                status = os.fstat(self.file)
                if stat.S_IMODE(status.st_mode) != mode:  # the umask took some
                    os.fchmod(self.file, mode)
                if status.st_nlink:  # else a `scan` came between, and removed it
                    _write_all(self.file, payload, start)
                    if header is not None:
                        _begin_to_sync(self.file, start)
                        _write_all(self.file, [header()], 0)
                    complete = True
            finally:
                if not complete:
                    self.close()

    def close(self) -> None:
        """Let go of it; unless it was renamed it is removed."""
        if not self.renamed:
            with contextlib.suppress(OSError):  # the next `scan` removes it
                os.unlink(self.path)
        with contextlib.suppress(OSError):  # synced before: closing has nothing to add
            os.close(self.file)


def _begin_to_sync(file: int, start: int) -> None:
    """Let the disk begin with the payload while the header is made: a tenth of 1 MB's time.

    Linux does so when told that it is not needed in memory, where it stays until it is written. The
    page that the header is in is left out, or it would have to be written twice.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # the sync tells what is wrong
            os.posix_fadvise(file, -(-start // 4096) * 4096, 0, os.POSIX_FADV_DONTNEED)


def _write_all(file: int, pieces: Sequence[memoryview], at: int) -> None:
    """Write all pieces, however little the system takes at a time (Linux: 2 GiB)."""
    os.lseek(file, at, os.SEEK_SET)
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
def opened(path: str) -> Iterator[int | None]:
    """Open a file to read, None if there is none; a directory opens too, a pipe never hangs."""
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


def contents(file: int) -> tuple[codec.Header, Entry]:
    """Read a blob's header and its entry, on a boundary of 64 as XLA likes it.

    Read, and not mapped: a mapped file that is cut short ends the process. The header is
    read into while the system fetches the rest, and each piece is summed up while it is in the
    processor's cache.

    Raises:
        CorruptError: it is no blob, or not as it was written.
        UnsupportedError: it is compressed by what is not installed.
        OSError: as the system said.
    """
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise CorruptError("it is not a file")
    nbytes = status.st_size
    if nbytes > _BELIEVED:  # else it is as cheap to read on at once
        _check_length(os.pread(file, codec.PREFIX, 0), nbytes)
    whole = np.empty(nbytes + 64, np.uint8)
    room = whole.view(Private)
    skipped = -room.__array_interface__["data"][0] % 64
    inside = room[skipped : skipped + nbytes]
    view = inside.data
    done = _fill(file, view, 0, min(nbytes, _FIRST))
    start = _check_length(view[:done], nbytes)
    done = _fill(file, view, done, start)
    header = codec.read_header(view[:start])
    sums = Checksum()
    for at in range(start, nbytes, PIECE):
        done = _fill(file, view, done, min(at + PIECE, nbytes))
        sums.update(view[at : min(at + PIECE, nbytes)])
    for array in (inside, room, whole):
        array.flags.writeable = False  # nor can it be made so again
    return header, codec.entry(header, view[start:].toreadonly(), sums.finish())


def _check_length(head: bytes | memoryview, nbytes: int) -> int:
    """Return where the payload starts; refuse a blob that has not its file's length."""
    start, written = codec.measure(head)
    if nbytes != written:
        raise CorruptError(f"{nbytes} bytes where {written} were written")
    return start


def _fill(file: int, view: memoryview, done: int, until: int) -> int:
    """Read from `done` to `until`, which may be behind it; where that ended."""
    while done < until:
        if not (count := os.preadv(file, [view[done:until]], done)):
            raise CorruptError(f"cut off at {done} bytes of {len(view)} while it was read")
        done += count
    return done


def _lock(file: int) -> None:
    # Some network file systems have no locks; there, leftovers are told by their age.
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)


def is_live(directory: str, name: str) -> bool:
    """Tell whether the process is alive whose `Temporary` without contents has this name.

    Raises:
        OSError: it cannot be found out.
    """
    if not _NAME.fullmatch(name):
        return False  # the name comes from a file that any program may have written
    path = os.path.join(directory, name)
    try:
        remove_if_abandoned(path)
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def is_temporary(name: str) -> bool:
    """Tell whether a file's name is one that `Temporary` gives, and no user's."""
    return _NAME.fullmatch(name) is not None


def remove_if_abandoned(path: str) -> None:
    """Remove a temporary file that is not locked any more: a lock ends with its process.

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


def make_directory(path: str, mode: int) -> None:
    """Make a directory where there is none, and those that it is in, for whom `mode` says.

    Args:
        mode: permissions of the files in it; who may read those may look into it.

    Raises:
        OSError: as the system said.
    """
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
        if path == os.path.dirname(path):
            break
    for made in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.mkdir(made, 0o700)
            os.chmod(made, mode | (mode & 0o444) >> 2)
            sync_directory(os.path.dirname(made))
    if missing and not os.path.isdir(missing[0]):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), missing[0])


def sync_directory(path: str) -> None:
    """Make what was renamed and removed in a directory survive a power cut.

    Raises:
        OSError: as the system said.
    """
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        with contextlib.suppress(OSError):
            os.close(file)
