"""Calls that change an engine, one at a time, each of which an interrupt may cut short."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from jkv._fork import check_fork
from jkv._transfer import intended

T = TypeVar("T")


class Transactions:
    """Runs what changes lanes, pages or the device's state.

    One that has begun and not ended, because of an interrupt at any place, is undone by the next:
    everything but the requests that have not ended, and their tokens, is made anew.

    Args:
        recover: makes everything anew.
        sweep: lets go of requests that were ended between transactions.
    """

    def __init__(self, recover: Callable[[], None], sweep: Callable[[], None]):
        self.lock = threading.RLock()
        self.torn = False  # one has begun and has not ended
        self._recover, self._sweep = recover, sweep
        self._frame: FrameType | None = None  # of the one that began last

    def run(self, work: Callable[[], T]) -> T:
        """Run `work` as one transaction.

        Raises:
            RuntimeError: called from a request's callback, or in a forked child.
        """
        with self.lock, intended():
            check_fork()
            self.check_outside()
            try:
                self._frame = sys._getframe()
                if self.torn:
                    self._recover()
                self.torn = True
                self._sweep()
                done = work()
                self._sweep()
                self.torn = False
                return done
            finally:
                self._frame = None

    def within(self) -> bool:
        """Whether a transaction is on this thread's stack: it has called a callback.

        No flag alone, which an interrupt could leave set.
        """
        if self._frame is None:
            return False
        frame = sys._getframe()
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    def check_outside(self) -> None:
        """Refuse to begin a transaction in a callback.

        Raises:
            RuntimeError: this is one.
        """
        if self.within():
            raise RuntimeError(
                "an engine was run from a callback of one of its requests; callbacks may "
                "submit and cancel, and the engine goes on by itself"
            )
