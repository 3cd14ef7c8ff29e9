"""The tier that machines share: a bucket or a directory, through tensorstore."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from jkv._text import brief
from jkv.errors import CorruptError, TierError, UnsupportedError
from jkv.store import codec, files, zstd
from jkv.store.checks import Limit, Seconds, check_count, check_seconds
from jkv.store.codec import blob_key, blob_name, is_blob_name
from jkv.store.entry import Entry
from jkv.store.tier import Tier

QUARANTINE = "quarantine/"
_AT_ONCE = 128  # requests in flight while headers are looked at
# What tensorstore's statuses become in Python; TimeoutError is an OSError.
_ERRORS = (ValueError, OSError, KeyError, IndexError, NotImplementedError, RuntimeError)


class Breaker:
    """Closed (all calls pass), open (none does), or trying (one does, and decides).

    Args:
        failures: so many in a row open it.
        wait: seconds until the first trial; doubled after each trial that fails.
        longest: seconds that it never waits longer than.
    """

    def __init__(
        self,
        failures: int = 3,
        wait: float = 1.0,
        longest: float = 60.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if failures < 1 or not 0 < wait <= longest:
            raise ValueError(
                "a breaker takes failures >= 1 and 0 < wait <= longest, "
                f"got {failures}, {wait}, {longest}"
            )
        self._failures = failures
        self._wait = wait
        self._longest = longest
        self._clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._until: float | None = None  # when the next trial may be; None while closed
        self._pause = wait
        self._counts = {"failures": 0, "opened": 0, "refused": 0, "trials": 0}

    def allow(self) -> bool:
        """Tell whether to ask now. A caller that may then calls `succeeded` or `failed`."""
        with self._lock:
            if self._until is None:
                return True
            now = self._clock()
            if now < self._until:
                self._counts["refused"] += 1
                return False
            # The trial. Should its outcome never be told, the next one may try after as long.
            self._until = now + self._pause
            self._counts["trials"] += 1
            return True

    def succeeded(self) -> None:
        """Note an answer: the breaker closes."""
        with self._lock:
            self._in_a_row = 0
            self._until = None
            self._pause = self._wait

    def failed(self) -> None:
        """Note a failure: the breaker opens if that was one too many."""
        with self._lock:
            self._counts["failures"] += 1
            self._in_a_row += 1
            if self._in_a_row < self._failures:
                return
            if self._until is None:
                self._counts["opened"] += 1
            elif self._in_a_row > self._failures:
                self._pause = min(2 * self._pause, self._longest)
            self._until = self._clock() + self._pause

    @property
    def is_open(self) -> bool:
        """Whether calls are refused, but for trials."""
        return self._until is not None

    def stats(self) -> dict[str, int]:
        """Count failures, how often it opened, calls refused and trials let through."""
        with self._lock:
            return {**self._counts, "open": int(self._until is not None)}


class Remote(Tier):
    """Entries as objects of a bucket, or files of a directory, that others read and write too.

    Nothing that others share is removed because of one reply: what comes damaged is asked for
    again, and moved to ``quarantine/`` only if it comes the same again. Otherwise it is a miss
    here, and stays.

    Of ``file:///dir/`` tensorstore makes the files, by the umask; a directory that is not there is
    made for its owner alone (0700). Make it beforehand for several accounts to share it.

    Every call ends after ``timeout`` seconds at most; after several failures in a row nothing is
    asked for a while (`Breaker`). A write that timed out may still arrive: entries under
    keys of content are equal whenever they come; do not give one name to two contents in turn.

    Args:
        url: ``file:///dir/``, ``memory://``, ``s3://bucket/prefix/``, ``gs://bucket/prefix/``, or
            a kvstore spec of tensorstore with all that it can say (credentials, concurrency).
        timeout: seconds; a scan may take longer, each step of it may not.
        retries: how often tensorstore asks S3 or GCS again within that time.
        endpoint, region: of an S3 server that is not Amazon's.
        max_bytes, max_entries: limits that a store is to keep; nothing is refused here.
        compression: None, or "zstd" (lossless) for what is written from now on.
        breaker: when to stop asking, and when to try again.

    Raises:
        TierError: tensorstore cannot open that.
        TypeError, ValueError: a limit, a timeout or a number of retries that cannot be.
        UnsupportedError: no zstd is installed.

    Example:
        >>> store = jkv.store.Store([jkv.store.Memory(2**30), jkv.store.Remote("memory://")])
    """

    name = "remote"

    def __init__(
        self,
        url: str | Mapping[str, Any],
        *,
        timeout: Seconds = 5.0,
        retries: int = 2,
        endpoint: str | None = None,
        region: str | None = None,
        max_bytes: Limit = None,
        max_entries: Limit = None,
        compression: str | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        import tensorstore  # 40 ms and its threads, for those who have a remote tier

        seconds = check_seconds("timeout", timeout, positive=True)
        if seconds is None:
            raise TypeError("timeout got None; expected seconds above 0")
        check_count("retries", retries)
        zstd.check(compression)
        super().__init__(max_bytes, max_entries)
        self.timeout = seconds
        self.compression = compression
        self.breaker = breaker or Breaker()
        try:
            spec = tensorstore.KvStore.Spec(dict(url) if isinstance(url, Mapping) else url)
            spec = {**spec.to_json(), **_given(endpoint=endpoint, aws_region=region)}
            if spec.get("path") and not spec["path"].endswith("/"):
                spec["path"] += "/"  # a prefix, and not the beginning of a name
            if spec["driver"] in ("s3", "gcs"):
                waits = {"max_retries": retries, "initial_delay": "100ms", "max_delay": "1s"}
                service = f"{spec['driver']}_request_retries"
                spec["context"] = {service: waits, **spec.get("context", {})}
            if spec["driver"] == "file":
                files.make_directory(os.path.dirname(os.path.abspath(spec["path"] + "x")), 0o600)
            self._kvstore = tensorstore.KvStore.open(spec).result(timeout=timeout)
        except (*_ERRORS, TypeError) as error:
            raise TierError(f"no remote tier at {brief(url)}: {error}") from error
        self.persistent = spec["driver"] != "memory"
        # For messages; a spec may hold credentials, which must not be read there.
        place = "/".join(spec[part] for part in ("bucket", "path") if part in spec)
        self.url = f"{spec['driver']}://{place}"

    def scan(self) -> dict[str, int]:
        """List the keys that are there and the bytes of their objects, ordered by name.

        tensorstore lists names only: sizes come from the first 64 bytes of each, which is a
        request per entry, 128 at a time.

        Raises:
            TierError: it does not answer, or not in time.
        """
        names = list(filter(is_blob_name, self._names()))
        found: dict[str, int] = {}
        for at in range(0, len(names), _AT_ONCE):
            prefixes = self._beginnings(dict.fromkeys(names[at : at + _AT_ONCE], codec.PREFIX))
            sizes: dict[str, tuple[int, int]] = {}
            for name, prefix in prefixes.items():
                # What is damaged is left for a read to put aside.
                with contextlib.suppress(CorruptError):
                    sizes[name] = codec.measure(prefix)
            keys = {name: blob_key(name) for name in sizes}
            hashed = {name: sizes[name][0] for name, key in keys.items() if key is None}
            for name, head in self._beginnings(hashed).items():
                with contextlib.suppress(CorruptError):
                    keys[name] = codec.read_header(head).key
            for name, key in keys.items():
                if key is not None and blob_name(key) == name:
                    found[key] = sizes[name][1]
        return found

    def write(self, key: str, entry: Entry) -> int:
        """Keep an entry; bytes of its object.

        Raises:
            TierError: it does not answer, or not in time, when it may still arrive.
            UnsupportedError: blobs cannot hold it.
        """
        blob = b"".join(codec.encode(entry, key, compression=self.compression))
        self._ask(f"write {brief(key[:80])}", lambda: self._kvstore.write(blob_name(key), blob))
        return len(blob)

    def read(self, key: str) -> Entry | None:
        """Return the entry, None if there is none.

        Raises:
            CorruptError: what is there is not what was written; it was moved to ``quarantine/``, if
                two replies agree on it.
            TierError: it does not answer, or not in time.
        """
        name = blob_name(key)
        try:
            return self._read(key[:80], name, lambda blob: codec.decode(blob, key))
        except CorruptError as error:
            raise CorruptError(f"{self.url}{name}: {error}") from None
        except UnsupportedError as error:  # no zstd in this process
            raise TierError(f"{brief(key[:80])} not read: {error}") from error

    def _read(self, shown: str, name: str, decode: Callable[[bytes], Entry]) -> Entry | None:
        """Read an object, again where it came damaged: others share what would be removed.

        Raises:
            CorruptError: it was damaged twice; where both replies are alike it was put aside.
            TierError: it does not answer, or not in time.
            UnsupportedError: it is compressed by what is not installed.
        """
        before = None
        while True:
            result = self._ask(f"read {brief(shown)}", lambda: self._kvstore.read(name))
            if result.state == "missing":
                return None
            try:
                return decode(result.value)
            except CorruptError as error:
                if before is None:
                    before = result.value
                    continue
                if before == result.value:
                    said = self._put_aside(name, result)
                else:
                    said = "; it is still there, since another reply was another"
                raise CorruptError(f"{error}{said}") from None

    def describe(self, key: str) -> Mapping[str, Any] | None:
        """Return an entry's meta, from its header alone, in two requests."""
        name = blob_name(key)
        prefix = self._beginnings({name: codec.PREFIX})
        head = self._beginnings({name: codec.measure(b)[0] for name, b in prefix.items()})
        if name not in head:
            return None
        header = codec.read_header(head[name])
        return header.meta if header.key == key else None

    def delete(self, key: str) -> None:
        """Delete an entry; nothing happens if it is not there."""
        self._ask(f"delete {brief(key[:80])}", lambda: self._kvstore.write(blob_name(key), None))

    def delete_put(self, key: str, version: str) -> bool:
        """Delete one put of a key; whether it has gone, and is not another process's by now."""
        name = blob_name(key)
        part = slice(0, codec.PREFIX)
        for _ in range(2):  # a reply that names no put may have come damaged
            (found,) = self._ask_all("look", lambda: self._kvstore.read(name, byte_range=part))
            if found is not None and found.state == "missing":
                return True
            there = None if found is None else codec.version_of(found.value)
            if there == version:
                break
            if there is not None:
                return False
        stamp = {} if found is None else {"if_equal": found.stamp.generation}
        what = f"delete {brief(key[:80])}"
        self._ask(what, lambda: self._kvstore.write(name, None, **stamp))
        return True

    def verify(self) -> dict[str, str]:
        """Read everything; what is wrong, by name. What is damaged is put aside.

        Raises:
            TierError: it does not answer, or not in time.
        """
        problems = {}
        for name in filter(is_blob_name, self._names()):

            def decode(blob: bytes, name: str = name) -> Entry:
                key = codec.read_header(blob).key
                if blob_name(key) != name:
                    raise CorruptError(f"it holds the key {brief(key[:80])} of another name")
                return codec.decode(blob)

            try:
                self._read(name, name, decode)
            except CorruptError as error:
                problems[name] = str(error)
            except UnsupportedError as error:  # left where it is
                problems[name] = f"cannot be read: {error}"
        return problems

    def close(self) -> None:
        """Do nothing: connections are tensorstore's."""

    def stats(self) -> dict[str, int]:
        """Return what the breaker counted."""
        return self.breaker.stats()

    def _names(self) -> list[str]:
        listed = self._ask("list", self._kvstore.list)
        return sorted(name.decode("utf-8", "replace") for name in listed)

    def _ask(self, what: str, start: Callable[[], Any]) -> Any:
        """Return what tensorstore answers in time.

        Raises:
            TierError: it does not, or the breaker is open.
        """
        return self._ask_all(what, start)[0]

    def _ask_all(self, what: str, *starts: Callable[[], Any]) -> list[Any]:
        """Return its answers to several requests at once, which share the time.

        Raises:
            TierError: one of them is not answered, or the breaker is open.
        """
        if not self.breaker.allow():
            raise TierError(f"not asked to {what}: {self.url} failed several times in a row")
        until = time.monotonic() + self.timeout
        futures, answers = [], []
        try:
            futures = [start() for start in starts]
            for future in futures:
                try:
                    answers.append(future.result(timeout=max(until - time.monotonic(), 0.001)))
                except ValueError as error:
                    if not str(error).startswith("OUT_OF_RANGE"):
                        raise
                    answers.append(None)  # shorter than the part that was asked for
        except _ERRORS as error:
            self.breaker.failed()
            for future in futures:
                future.cancel()
            said = f"no answer in {self.timeout} s" if isinstance(error, TimeoutError) else error
            raise TierError(f"cannot {what} at {self.url}: {said}") from error
        self.breaker.succeeded()
        return answers

    def _beginnings(self, sizes: Mapping[str, int]) -> dict[str, bytes]:
        """Read the first bytes of several objects, without those that are gone or shorter."""
        answers = self._ask_all(
            "read headers",
            *(
                lambda name=name, size=size: self._kvstore.read(name, byte_range=slice(0, size))
                for name, size in sizes.items()
            ),
        )
        return {
            name: answer.value
            for name, answer in zip(sizes, answers, strict=True)
            if answer is not None and answer.state == "value"
        }

    def _put_aside(self, name: str, result: Any) -> str:
        """Move an object into quarantine, unless it was written anew meanwhile.

        Returns what to add to a message: nothing, or that it could not be done.
        """
        stamp = result.stamp.generation
        try:
            self._ask("copy", lambda: self._kvstore.write(QUARANTINE + name, result.value))
            self._ask("delete", lambda: self._kvstore.write(name, None, if_equal=stamp))
        except TierError as error:
            return f"; it is still there: {error}"
        return ""


def _given(**options: str | None) -> dict[str, str]:
    return {name: value for name, value in options.items() if value is not None}
