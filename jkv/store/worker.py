"""Work that waits for a thread, bounded: what is too much is the caller's."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Job = TypeVar("Job")


class BoundedWorker(Generic[Job]):
    """A queue with one thread, which starts with the first job and ends with `close`.

    Attributes:
        nbytes: of jobs that wait or run.
    """

    def __init__(
        self, name: str, run: Callable[[Job], None], max_jobs: int, max_bytes: int
    ) -> None:
        self._name = name
        self._run = run
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._jobs: deque[tuple[Job, int]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._running = False
        self.nbytes = 0
        self.peak_bytes = 0
        self.peak_jobs = 0

    def __len__(self) -> int:
        """Count the jobs that wait or run."""
        return len(self._jobs) + self._running

    def offer(self, job: Job, nbytes: int = 0) -> bool:
        """Take a job, or say that there is no room; a job of any size where there is no other."""
        with self._changed:
            full = len(self) >= self._max_jobs or self.nbytes + nbytes > self._max_bytes
            if self._closed or (full and len(self)):
                return False
            self._jobs.append((job, nbytes))
            self.nbytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.nbytes)
            self.peak_jobs = max(self.peak_jobs, len(self))
            self._start()
            self._changed.notify_all()
            return True

    def _start(self) -> None:
        """Start a thread, where there is none or an error in a job ended it."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()

    def drain(self) -> None:
        """Wait until there is nothing to do."""
        with self._changed:
            if self._jobs:
                self._start()
            self._changed.wait_for(lambda: not self._jobs and not self._running)

    def close(self) -> None:
        """Do what is there, take nothing more, and end the thread."""
        with self._changed:
            self._closed = True
            if self._jobs:
                self._start()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job, nbytes = self._jobs.popleft()
                self._running = True
            try:
                self._run(job)
            finally:
                with self._changed:
                    self._running = False
                    self.nbytes -= nbytes
                    self._changed.notify_all()
