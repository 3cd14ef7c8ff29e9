"""A circuit breaker: what failed several times in a row is left alone for a growing while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


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
        """Whether to ask now. Who was allowed calls `succeeded` or `failed`."""
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
        """It answered: closed."""
        with self._lock:
            self._in_a_row = 0
            self._until = None
            self._pause = self._wait

    def failed(self) -> None:
        """It did not: open, if that was one too many."""
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
        """Failures, how often it opened, calls it refused, trials it let through."""
        with self._lock:
            return {**self._counts, "open": int(self._until is not None)}
