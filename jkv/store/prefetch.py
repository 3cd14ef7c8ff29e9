"""What will be asked for next, and promoting it while no lookup is under way."""

from __future__ import annotations

import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

from jkv._text import brief
from jkv.store.index import Index
from jkv.store.reader import Reader
from jkv.store.tiering import Tiering

_NUMBERED = re.compile(r"(.*?)(\d+)", re.DOTALL)
KINDS = ("next", "markov", "frequent")


class Predictor:
    """Guesses from the keys that were asked for.

    Args:
        kinds: in which order to guess: "next" (the next number of a key that ends in one, as the
            turns of a conversation do), "markov" (what most often came after this key), "frequent"
            (what was asked for most).
        at_once: guesses after a key.
        horizon: a guess is right if it is asked for among the next so many keys.
        remembers: keys, with what came after them; the least recently used go.

    Raises:
        ValueError: an unknown kind, or a number below 1.

    Example:
        >>> predictor = jkv.store.Predictor(["markov"])
        >>> for key in "abab":
        ...     predictor.noted(key)
        >>> predictor.guesses()
        [('a', 'markov')]
    """

    def __init__(
        self,
        kinds: Sequence[str] = KINDS,
        *,
        at_once: int = 2,
        horizon: int = 16,
        remembers: int = 10_000,
    ) -> None:
        if set(kinds) - set(KINDS) or not kinds:
            raise ValueError(f"kinds got {list(kinds)}; expected some of {list(KINDS)}")
        if min(at_once, horizon, remembers) < 1:
            raise ValueError(
                f"at_once, horizon and remembers got {at_once}, {horizon} and {remembers}; "
                "expected numbers from 1"
            )
        self._kinds = tuple(kinds)
        self.at_once = at_once
        self._horizon = horizon
        self._remembers = remembers
        self._after: OrderedDict[str, Counter[str]] = OrderedDict()
        self._uses: Counter[str] = Counter()
        self._last: str | None = None
        self._asked = 0
        self._open: dict[str, tuple[str, int]] = {}  # guesses: whose, and until when
        self._counts: Counter[Hashable] = Counter()
        self._lock = threading.Lock()

    def noted(self, key: str) -> None:
        """Note a key that was asked for."""
        with self._lock:
            self._asked += 1
            if (guess := self._open.pop(key, None)) is not None:
                self._counts[guess[0], "right"] += 1
            # Guesses stand in the order of their ends: the first may be over.
            while self._open and next(iter(self._open.values()))[1] < self._asked:
                old = next(iter(self._open))
                self._counts[self._open.pop(old)[0], "wrong"] += 1
            if self._last is not None:
                after = self._after.setdefault(self._last, Counter())
                after[key] += 1
                if len(after) > 32:  # of one key, what came after it seldom
                    del after[after.most_common()[-2][0]]
                self._after.move_to_end(self._last)
                if len(self._after) > self._remembers:
                    self._after.popitem(last=False)
            self._uses[key] += 1
            if len(self._uses) > 2 * self._remembers:
                self._uses = Counter(dict(self._uses.most_common(self._remembers)))
            self._last = key

    def guesses(self) -> list[tuple[str, str]]:
        """Return keys that may come next, likely ones first, each with the kind of guess."""
        with self._lock:
            if self._last is None:
                return []
            found: dict[str, str] = {}
            for kind in self._kinds:
                for key in self._of_kind(kind, self._last):
                    if key != self._last:
                        found.setdefault(key, kind)
            return list(found.items())

    def _of_kind(self, kind: str, key: str) -> list[str]:
        if kind == "markov":
            return [k for k, _ in self._after.get(key, Counter()).most_common(self.at_once)]
        if kind == "frequent":
            return [k for k, _ in self._uses.most_common(self.at_once + 1)]
        numbered = _NUMBERED.fullmatch(key)
        if numbered is None:
            return []
        stem, number = numbered.groups()
        return [f"{stem}{int(number) + 1:0{len(number)}d}"]

    def acted(self, key: str, kind: str) -> None:
        """Note that a guess was acted upon: it is right or wrong from now on."""
        with self._lock:
            if key not in self._open:
                self._open[key] = kind, self._asked + self._horizon

    def stats(self) -> dict[str, Any]:
        """Count the guesses acted upon that were right and wrong; with their share, and by kind."""
        with self._lock:
            by_kind = {
                kind: _precision(self._counts[kind, "right"], self._counts[kind, "wrong"])
                for kind in self._kinds
            }
            right = sum(figures["right"] for figures in by_kind.values())
            wrong = sum(figures["wrong"] for figures in by_kind.values())
            return {**_precision(right, wrong), "open": len(self._open), "by_kind": by_kind}


def _precision(right: int, wrong: int) -> dict[str, Any]:
    judged = right + wrong
    return {"right": right, "wrong": wrong, "precision": right / judged if judged else None}


def check_predictor(predictor: object) -> None:
    """Refuse anything but a predictor, or None.

    Raises:
        TypeError: it is neither.
    """
    if predictor is not None and not isinstance(predictor, Predictor):
        raise TypeError(
            f"predictor got {brief(predictor)}; expected a jkv.store.Predictor, or None"
        )


class Prefetcher:
    """A thread that promotes what is guessed, a little at a time while no lookup is under way."""

    def __init__(
        self,
        index: Index,
        tiering: Tiering,
        reader: Reader,
        predictor: Predictor,
        stopped: threading.Event,
        idle_seconds: float = 0.05,
    ) -> None:
        self._index = index
        self._tiering = tiering
        self._reader = reader
        self._stopped = stopped
        self.predictor = predictor
        self._idle_seconds = idle_seconds
        self._news = threading.Event()

    def noted(self, name: str) -> None:
        """Note a name that was asked for."""
        self.predictor.noted(name)
        self._news.set()

    def run(self) -> None:
        """Promote until the store stops: a thread's work."""
        while not self._stopped.is_set():
            if not self._news.wait(self._idle_seconds):
                continue
            while not self._idle():
                if self._stopped.wait(self._idle_seconds):
                    return
            self._news.clear()
            acted = 0
            for name, kind in self.predictor.guesses():
                if acted == self.predictor.at_once or not self._idle():
                    break
                acted += self._fetch(name, kind)

    def _idle(self) -> bool:
        """Tell whether no lookup is under way, none was just now, and no promotion waits."""
        reader = self._reader
        quiet = reader.timer() - reader.last_read >= self._idle_seconds
        return quiet and reader.reading == 0 and len(self._tiering.promotions) == 0

    def _fetch(self, name: str, kind: str) -> bool:
        """Promote a guess, and wait; whether there was anything to promote."""
        with self._index.lock:
            record = self._index.records.get(name)
            if record is None or 0 in record.locations or not record.locations:
                return False
            if not self._tiering.promote(record, None):
                return False
        self.predictor.acted(name, kind)
        self._tiering.promotions.drain()
        return True
