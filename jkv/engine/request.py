"""A request: what was asked, what has been said, and how to wait for more."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jkv._text import plural

WAITING, RUNNING, FINISHED = "waiting", "running", "finished"


@runtime_checkable
class Driver(Protocol):
    """What a request needs of its engine."""

    def advance(self, request: Request, seen: int) -> None: ...  # noqa: D102
    def cancel(self, request: Request) -> None: ...  # noqa: D102
    def text(self, request: Request) -> str: ...  # noqa: D102


@dataclasses.dataclass(eq=False, repr=False)
class Request:
    """One prompt on its way through an engine; made by `Engine.submit`.

    Attributes:
        number: in order of arrival.
        prompt: ``[T]`` int32 token ids.
        max_new_tokens: at most.
        priority: higher is sooner.
        tenant: whose prefixes it may share.
        state: "waiting", "running" or "finished".
        finish_reason: "stop", "length", "cancelled" or "error", None before the end.
        error: what its callback or its tokens' text raised, or `NonFiniteError` where there was
            nothing to draw its next token from.
        cached_tokens: of its prompt, found in the cache when it was first admitted.
        submitted: seconds on `time.perf_counter`.
        first_token: likewise, None before.
        finished: likewise.
    """

    number: int
    prompt: np.ndarray
    max_new_tokens: int
    sampler: Any
    key: np.ndarray | None  # [2] uint32, data of a threefry key
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    priority: int
    tenant: str
    on_token: Callable[[Request, int], Any] | None
    engine: Driver
    rank: int
    submitted: float
    state: str = WAITING
    finish_reason: str | None = None
    error: BaseException | None = None
    heard: list[int] = dataclasses.field(default_factory=list)  # of `tokens`, all but the latest
    seat: Any = None  # in which it runs, and which has those
    cached_tokens: int = 0
    first_token: float | None = None
    finished: float | None = None
    preemptions: int = 0
    swapped: Any = None  # its pages on the host while it waits to go on

    @property
    def tokens(self) -> list[int]:
        """What has been said so far, ids; complete once it is finished."""
        seat = self.seat
        if seat is not None:
            seat.settle()
        return self.heard

    @property
    def text(self) -> str:
        """The new text so far, which goes on from the prompt's; see `jkv.Result.texts`.

        Raises:
            UnsupportedError: the engine's model has no tokenizer.
        """
        return self.engine.text(self)

    @property
    def watched(self) -> bool:
        """Whether somebody wants to hear of each of its tokens."""
        return bool(self.stop_strings) or self.on_token is not None

    @property
    def history(self) -> np.ndarray:
        """Prompt and answer so far, ids ``[T]``."""
        return np.concatenate([self.prompt, np.asarray(self.tokens, np.int32)])

    def cancel(self) -> None:
        """End it; what was said stays. Nothing happens if it has ended."""
        self.engine.cancel(self)

    def result(self) -> list[int]:
        """All tokens; runs the engine until they are there.

        Raises:
            Exception: what ended this request, if something did.
        """
        while self.state != FINISHED:
            self.engine.advance(self, len(self.tokens))
        self._raise()
        return self.tokens

    def __iter__(self) -> Iterator[int]:
        """Tokens as they come; runs the engine where none is waiting."""
        seen = 0
        while True:
            while seen < len(self.tokens):
                yield self.tokens[seen]
                seen += 1
            if self.state == FINISHED and seen >= len(self.tokens):
                self._raise()
                return
            self.engine.advance(self, seen)

    async def __aiter__(self) -> AsyncIterator[int]:
        """Tokens as they come; the engine runs in a thread, one step at a time for all who wait."""
        seen = 0
        while True:
            while seen < len(self.tokens):
                yield self.tokens[seen]
                seen += 1
            if self.state == FINISHED and seen >= len(self.tokens):
                self._raise()
                return
            await asyncio.to_thread(self.engine.advance, self, seen)

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def __repr__(self) -> str:
        """Where it stands."""
        said = f"{len(self.tokens)} of {plural(self.max_new_tokens, 'token')}"
        end = f", {self.finish_reason}" if self.finish_reason else ""
        return f"Request({self.number}, {self.state}, {said}{end})"
