"""The tier in a directory: one file per entry, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jkv._text import brief
from jkv.errors import CorruptError, TierError, UnsupportedError
from jkv.store import codec, files, zstd
from jkv.store.checks import Limit, check_count
from jkv.store.codec import SUFFIX, blob_key, blob_name, is_blob_name
from jkv.store.entry import Entry
from jkv.store.schema import META
from jkv.store.tier import Tier

QUARANTINE = "quarantine"
_KEPT_ASIDE = 32  # files in quarantine; the oldest go
_ASIDE = re.compile(r"\d{20}-(.+)", re.DOTALL)  # their names: when it was, in nanoseconds, and what
_FOREIGN_LOCK = SUFFIX + ".__lock"  # what tensorstore's file driver writes to before it renames
_HEADER = 1 << 14  # bytes that most headers fit into
_BATCH = 64  # files open at once in a batch


class Disk(Tier):
    """Entries in a directory, which several processes may share.

    A write goes to a temporary name, is synced (fsync), renamed, and the directory is synced: when
    it returns, the entry survives the end of the process, and a power cut as far as the disk keeps
    what it says. A reader sees an entry whole or not. `delete` does not wait for the disk: until
    `purge` a power cut may bring back what it deleted. Names are those of `blob_name`; blobs
    carry their key and a checksum, and what is not as it was written is moved to ``quarantine/``,
    where the newest 32 are kept. Files of other names are left alone, and no link is followed.

    Caches tell what was said: files are their owner's alone (0600, whatever the umask), and so are
    directories that are made (0700). One that is there stays as it is. For several accounts to
    share a directory, pass ``mode=0o660`` (a group) or ``0o644`` (others may read).

    The layout is that of tensorstore's file driver, so ``Remote("file:///...")`` reads and writes
    the same directory. It is not used here since it reads 64 MB at a third of a file's speed and
    writes at half: from Python, values are copied into pieces of 4 KiB, and out of a buffer again.

    Args:
        path: created if it is not there.
        max_bytes, max_entries: limits that a store is to keep; nothing is refused here.
        compression: None, or "zstd" (lossless) for what is written from now on.
        mode: permissions of the files; directories that are made can be entered by whom may read.

    Example:
        >>> disk = jkv.store.Disk("caches", max_bytes=2**34, compression="zstd")
        >>> store = jkv.store.Store([jkv.store.Memory(2**30), disk])

    Raises:
        TierError: there is no such directory and none can be made.
        TypeError, ValueError: a limit or mode that cannot be.
        UnsupportedError: no zstd is installed, or the system is Windows.
    """

    name = "disk"
    persistent = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: Limit = None,
        max_entries: Limit = None,
        *,
        compression: str | None = None,
        mode: int = files.PRIVATE,
    ) -> None:
        if os.name != "posix":
            raise UnsupportedError(
                "Disk needs POSIX renames and locks; Remote('file:///C:/...') does without"
            )
        super().__init__(max_bytes, max_entries)
        zstd.check(compression)
        self.path = Path(path).absolute()
        self._directory = str(self.path)  # joining paths as texts takes a fifth of the time
        self._liveness_lock: files.Temporary | None = None
        self._lock = threading.Lock()
        self.compression = compression
        self.mode = check_count("mode", mode)
        if mode & ~0o666 or mode & files.PRIVATE != files.PRIVATE:
            raise ValueError(
                f"mode got {mode:#o}; expected permissions of files that their owner can read and "
                "write, such as 0o600, 0o660 or 0o644"
            )
        try:
            files.make_directory(self._directory, mode)
        except OSError as error:
            raise TierError(error.errno, f"no directory for the disk tier: {error}") from error

    def scan(self) -> dict[str, int]:
        """List the keys that are there and the bytes of their files, the oldest first.

        Looks at names and sizes, and into the headers of keys too long for a name; not into
        payloads. Temporary files of dead writers are removed; what cannot be a blob is put aside.

        Raises:
            TierError: the directory cannot be read.
        """
        found = []
        try:
            for item in self._listed():
                try:
                    if _is_leftover(item.name):
                        files.remove_if_abandoned(item.path)
                    elif is_blob_name(item.name) and (key := self._listed_key(item)) is not None:
                        status = item.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, key, status.st_size))
                except OSError:  # gone meanwhile, or not ours to open: `read` says so, if asked
                    continue
        except OSError as error:
            raise TierError(error.errno, f"{self.path} cannot be read: {error}") from error
        return {key: size for _, key, size in sorted(found)}

    def write(self, key: str, entry: Entry) -> int:
        """Keep an entry; bytes of its file.

        Raises:
            TierError: it could not be kept. What was there before is; where only the last sync, of
                the directory, failed, nothing is.
            UnsupportedError: blobs cannot hold it.
        """
        result = self.write_many({key: entry})[key]
        if isinstance(result, int):
            return result
        raise result

    def write_many(
        self, entries: Mapping[str, Entry]
    ) -> dict[str, int | TierError | UnsupportedError]:
        """Keep several, with one sync of the directory for every 64; for each its bytes or error.

        Raises:
            UnsupportedError: blobs cannot hold one of them; some may have been written.
        """
        results: dict[str, int | TierError | UnsupportedError] = {}
        items = list(entries.items())
        for at in range(0, len(items), _BATCH):
            results |= self._write_batch(items[at : at + _BATCH])
        return results

    def _write_batch(
        self, items: list[tuple[str, Entry]]
    ) -> dict[str, int | TierError | UnsupportedError]:
        results: dict[str, int | TierError | UnsupportedError] = {}
        written: list[tuple[str, files.Temporary]] = []
        renamed: list[str] = []
        try:
            for key, entry in items:
                blob = codec.prepare(entry, key, compression=self.compression)
                try:
                    written.append((key, files.Temporary(self._directory, *blob, mode=self.mode)))
                except OSError as error:
                    results[key] = self._failed("written", key, error)
            for key, file in written:  # all were begun, so that the disk has enough to do
                try:
                    os.fsync(file.file)
                    self._rename(file, blob_name(key))
                except OSError as error:
                    results[key] = self._failed("written", key, error)
                else:
                    renamed.append(key)
                    results[key] = file.nbytes
            try:
                if renamed:
                    files.sync_directory(self._directory)
            except OSError as error:
                for key in renamed:
                    with contextlib.suppress(OSError):
                        os.unlink(self._file(key))
                    results[key] = self._failed("written", key, error)
        finally:
            for _, file in written:
                file.close()
        return results

    def _rename(self, file: files.Temporary, name: str) -> None:
        path = os.path.join(self._directory, name)
        try:
            os.rename(file.path, path)
        except IsADirectoryError:
            self._put_aside(name)
            os.rename(file.path, path)
        file.renamed = True

    def read(self, key: str) -> Entry | None:
        """Return the entry, its arrays read-only in memory of their own; None if there is none.

        Raises:
            CorruptError: what is there is not what was written; it is in quarantine now.
            TierError: it cannot be read now.
        """
        path = self._file(key)
        try:
            with files.opened(path) as file:
                if file is None:
                    return None
                try:
                    header, entry = files.contents(file)
                    header.check(key)
                    return entry
                except CorruptError as error:
                    self._put_aside(blob_name(key), file)
                    raise CorruptError(f"{path}: {error}") from None
        except OSError as error:
            raise self._failed("read", key, error) from error
        except (MemoryError, UnsupportedError) as error:  # no room, or no zstd, in this process
            raise TierError(f"{brief(key[:80])} not read in {self.path}: {error}") from error

    def describe(self, key: str) -> Mapping[str, Any] | None:
        """Return an entry's meta, from its header alone; None if there is none."""
        try:
            with files.opened(self._file(key)) as file:
                if file is None:
                    return None
                start, _ = codec.measure(os.pread(file, codec.PREFIX, 0))
                header = codec.read_header(os.pread(file, start, 0))
        except OSError as error:
            raise self._failed("read", key, error) from error
        return header.meta if header.key == key else None

    def delete(self, key: str) -> None:
        """Delete an entry; nothing happens if it is not there."""
        try:
            os.unlink(self._file(key))
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            self._put_aside(blob_name(key))
        except OSError as error:
            raise self._failed("deleted", key, error) from error

    def version_of(self, key: str) -> str | None:
        """Return which put is there, from 64 bytes; None where they do not say it."""
        try:
            with files.opened(self._file(key)) as file:
                return None if file is None else codec.version_of(os.pread(file, codec.PREFIX, 0))
        except OSError as error:
            raise self._failed("looked at", key, error) from error

    def delete_put(self, key: str, version: str) -> bool:
        """Delete one put of a key; whether it has gone, and is not another process's by now."""
        path = self._file(key)
        try:
            with files.opened(path) as file:
                if file is None:
                    return True
                there = codec.version_of(os.pread(file, codec.PREFIX, 0))
                if there is None:  # of a jkv that wrote no stamp: the meta says it
                    meta = self.describe(key) or {}
                    put = meta.get(META) or {}
                    there = put.get("version")
                if there not in (None, version) or not _same(path, file):
                    return False
                os.unlink(path)
        except CorruptError:
            return False  # `read` puts it aside
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            self._put_aside(blob_name(key))
        except OSError as error:
            raise self._failed("deleted", key, error) from error
        return True

    def put_aside(self, key: str, version: str | None) -> None:
        """Move one put of a key, or any, into quarantine; what cannot be moved stays."""
        with contextlib.suppress(OSError), files.opened(self._file(key)) as file:
            if file is not None and (version is None or self.version_of(key) in (None, version)):
                self._put_aside(blob_name(key), file)

    def purge(self, keys: Sequence[str]) -> None:
        """Wait until these keys stay deleted after a power cut; quarantine loses them too.

        Raises:
            TierError: something of them may still be there, or come back.
        """
        names = {blob_name(key) for key in keys}
        try:
            with self._quarantine() as aside:
                if aside is not None:
                    found = [name for name, of in _aside_names(aside) if of in names]
                    for name in found:
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(name, dir_fd=aside)
                    if found:
                        os.fsync(aside)
            files.sync_directory(self._directory)
        except OSError as error:
            raise TierError(
                error.errno, f"not sure to be gone from {self.path}: {error.strerror}"
            ) from error

    def liveness_lock(self) -> str:
        """Return the name of a file that is there while this process lives and the tier is open."""
        with self._lock:
            try:
                if self._liveness_lock is None:
                    self._liveness_lock = files.Temporary(self._directory, mode=self.mode)
            except OSError as error:
                raise TierError(error.errno, f"no file in {self.path}: {error.strerror}") from error
            return os.path.basename(self._liveness_lock.path)

    def is_live(self, lock: str) -> bool:
        """Tell whether a process that has named this `liveness_lock`, here, is alive.

        Where a file system has no locks it is believed to, for a day.
        """
        try:
            return files.is_live(self._directory, lock)
        except OSError as error:
            raise TierError(error.errno, f"{self.path}: {error.strerror}") from error

    def verify(self) -> dict[str, str]:
        """Read everything; what is wrong, by file name. What is damaged is put aside.

        Raises:
            TierError: the directory cannot be read.
        """
        problems = {}
        try:
            names = sorted(item.name for item in self._listed() if is_blob_name(item.name))
        except OSError as error:
            raise TierError(error.errno, f"{self.path} cannot be read: {error}") from error
        for name in names:
            try:
                with files.opened(os.path.join(self._directory, name)) as file:
                    if file is None:
                        continue
                    try:
                        key = files.contents(file)[0].key
                        if blob_name(key) != name:
                            raise CorruptError(f"it holds the key {brief(key)} of another file")
                    except CorruptError as error:
                        self._put_aside(name, file)
                        problems[name] = str(error)
            except (OSError, MemoryError, UnsupportedError) as error:  # left where it is
                problems[name] = f"cannot be read: {error}"
        return problems

    def close(self) -> None:
        """Let go of the liveness lock; nothing else is open between calls."""
        with self._lock:
            if self._liveness_lock is not None:
                self._liveness_lock.close()
                self._liveness_lock = None

    def _file(self, key: str) -> str:
        return os.path.join(self._directory, blob_name(key))

    def _listed(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.path) as items:
            yield from items

    def _listed_key(self, item: os.DirEntry[str]) -> str | None:
        """Return the key of a blob, from its header if it is too long for a name.

        None if it cannot be a blob, which is put aside.
        """
        is_file = item.is_file(follow_symlinks=False)
        if not is_file or item.stat(follow_symlinks=False).st_size < codec.PREFIX:
            self._put_aside(item.name)
            return None
        if (key := blob_key(item.name)) is not None:
            return key
        with files.opened(item.path) as file:
            if file is None:
                return None
            try:
                head = os.pread(file, _HEADER, 0)
                start, _ = codec.measure(head)
                key = codec.read_header(
                    head if len(head) >= start else os.pread(file, start, 0)
                ).key
                if blob_name(key) == item.name:
                    return key
            except CorruptError:
                pass
            self._put_aside(item.name, file)
        return None

    def _put_aside(self, name: str, file: int | None = None) -> None:
        """Move a file into quarantine, unless its name is meanwhile another's."""
        path = os.path.join(self._directory, name)
        # What cannot be moved stays and is looked at again: the caller's error is the one to tell.
        with contextlib.suppress(OSError):
            if file is not None and not _same(path, file):
                return
            with contextlib.suppress(FileExistsError):
                files.make_directory(os.path.join(self._directory, QUARANTINE), self.mode)
            with self._quarantine() as aside:
                if aside is None:
                    return
                os.rename(path, f"{time.time_ns():020d}-{name}", dst_dir_fd=aside)
                for old, _ in _aside_names(aside)[:-_KEPT_ASIDE]:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(old, dir_fd=aside)

    @contextlib.contextmanager
    def _quarantine(self) -> Iterator[int | None]:
        """Open the directory of what was put aside; None where there is none, or a link.

        Raises:
            OSError: as the system said.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            aside = os.open(os.path.join(self._directory, QUARANTINE), flags)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            yield None
            return
        try:
            yield aside
        finally:
            with contextlib.suppress(OSError):  # it was only listed
                os.close(aside)

    def _failed(self, what: str, key: str, error: OSError) -> TierError:
        return TierError(error.errno, f"{brief(key)} not {what} in {self.path}: {error.strerror}")


def _is_leftover(name: str) -> bool:
    """Tell whether jkv, or tensorstore for it, has written to a file and not renamed it yet."""
    if name.endswith(_FOREIGN_LOCK):
        return is_blob_name(name.removesuffix(_FOREIGN_LOCK) + SUFFIX)
    return files.is_temporary(name)


def _same(path: str, file: int) -> bool:
    """Tell whether a path still names an open file."""
    return os.path.samestat(os.lstat(path), os.fstat(file))


def _aside_names(directory: int) -> list[tuple[str, str]]:
    """List the files in quarantine, the oldest first, with the names that they had.

    Only what this tier has put there: other files, links and directories are not its own.
    """
    with os.scandir(directory) as items:
        named = [
            (item.name, match[1])
            for item in items
            if (match := _ASIDE.fullmatch(item.name)) and item.is_file(follow_symlinks=False)
        ]
    return sorted((name, of) for name, of in named if is_blob_name(of))
