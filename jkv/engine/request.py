"""A request: what was asked, what has been generated, and how to wait for more."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from jkv._text import plural

if TYPE_CHECKING:
    from jkv.decoding.transform import Transform
    from jkv.engine.sequence import RunningSequence
else:  # the one needs JAX, and the other this module
    Transform = RunningSequence = Any

PageLeaves = list[np.ndarray]  # of one page, or of several ``[n, ...]``, in all layers
Contents = list[tuple[Any, Any]]  # per layer keys and values of pages: arrays [n, ...], or codes

WAITING, RUNNING, FINISHED = "waiting", "running", "finished"


@runtime_checkable
class Driver(Protocol):
    """What a request needs of its engine."""

    def advance(self, request: Request, seen: int) -> None: ...  # noqa: D102
    def cancel(self, request: Request) -> None: ...  # noqa: D102
    def abandon(self, request: Request) -> None: ...  # noqa: D102
    def text(self, request: Request) -> str: ...  # noqa: D102
    def watch(self, reader: Reader, request: Request) -> None: ...  # noqa: D102


@dataclasses.dataclass
class SwappedPages:
    """A request's pages on the host.

    Attributes:
        length: tokens.
        weights: of the model that computed them.
        key: where a store has them.
        contents: the pages, where no store has them.
        nbytes: of the pages.
    """

    length: int
    weights: list[Any]
    key: str | None = None
    contents: Contents | None = None
    nbytes: int = 0


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a request ended: one value, so that an interrupt leaves all of it or nothing.

    Attributes:
        reason: see `Request.finish_reason`.
        tokens: all that were generated.
        error: what ended it, if anything did.
        seconds: on `time.perf_counter`.
    """

    reason: str
    tokens: list[int]
    error: BaseException | None
    seconds: float


@dataclasses.dataclass(eq=False, repr=False)
class Request:
    """One prompt on its way through an engine; made by `Engine.submit`.

    Its state follows from two attributes, each set by one assignment: `sequence`, in which it runs,
    and the first of its `endings`. Everything else that an engine keeps about it can be made again
    from these and from its tokens, whatever was interrupted.

    Attributes:
        number: in order of arrival.
        prompt: ``[T]`` int32 token ids.
        max_new_tokens: at most.
        priority: higher is sooner.
        tenant: whose prefixes it may share.
        request_id: an id of the caller's own, None without one.
        cached_tokens: of its prompt, found in the cache when it was first admitted.
        preemptions: how often it had to wait again after it ran.
        submitted: seconds on `time.perf_counter`.
        first_token: likewise, None before.

    Example:
        >>> engine = jkv.Engine(lm, pages=64)
        >>> request = engine.submit("ROMEO:", max_new_tokens=8)
        >>> request.cancel()  # or `for token in request`, `request.result()`
        >>> request.state, request.finish_reason, request.tokens
        ('finished', 'cancelled', [])
    """

    number: int
    prompt: np.ndarray
    max_new_tokens: int
    sampler: Transform | None  # with its parameters on the host
    key: np.ndarray | None  # [2] uint32, data of a threefry key
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    priority: int
    tenant: str
    on_token: Callable[[Request, int], object] | None
    engine: Driver
    rank: int
    submitted: float
    request_id: object = None
    endings: list[Ending] = dataclasses.field(default_factory=list)  # the first of them counts
    generated: list[int] = dataclasses.field(default_factory=list)  # `tokens` without the latest
    sequence: RunningSequence | None = None  # in which it runs, and which has the latest tokens
    cached_tokens: int = 0
    first_token: float | None = None
    preemptions: int = 0
    swapped: SwappedPages | None = None  # while it waits to go on

    @property
    def ending(self) -> Ending | None:
        """How it ended, None before."""
        return self.endings[0] if self.endings else None

    @property
    def state(self) -> str:
        """Its state: "waiting", "running" or "finished"."""
        if self.endings:
            return FINISHED
        return WAITING if self.sequence is None else RUNNING

    @property
    def finish_reason(self) -> str | None:
        """Why it ended: "stop", "length", "cancelled" or "error"; None before the end."""
        return self.endings[0].reason if self.endings else None

    @property
    def error(self) -> BaseException | None:
        """What ended it with "error": raised by a callback, a tokenizer, a store or a device."""
        return self.endings[0].error if self.endings else None

    @property
    def finished(self) -> float | None:
        """Seconds on `time.perf_counter` at its end, None before."""
        return self.endings[0].seconds if self.endings else None

    @property
    def tokens(self) -> list[int]:
        """Tokens generated so far, ids; complete once it is finished."""
        if self.endings:
            return self.endings[0].tokens
        sequence = self.sequence
        if sequence is not None:
            sequence.collect()
        return self.generated

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """End it, unless it has ended; any thread may call this at any time."""
        if not self.endings:
            # Where two threads get here at once the first ending counts: the engine sees one.
            tokens = list(self.tokens)
            self.endings.append(Ending(reason, tokens, error, time.perf_counter()))

    @property
    def text(self) -> str:
        """The new text so far, which goes on from the prompt's; see `jkv.Result.texts`.

        Raises:
            UnsupportedError: the engine's model has no tokenizer.
        """
        return self.engine.text(self)

    @property
    def watched(self) -> bool:
        """Whether each of its tokens is looked at on the host, for a stop string or a callback."""
        return bool(self.stop_strings) or self.on_token is not None

    @property
    def history(self) -> np.ndarray:
        """Prompt and answer so far, ids ``[T]``."""
        return np.concatenate([self.prompt, np.asarray(self.tokens, np.int32)])

    def cancel(self) -> None:
        """End it; generated tokens stay. Nothing happens if it has ended."""
        self.engine.cancel(self)

    def result(self) -> list[int]:
        """All tokens; runs the engine until they are there.

        Raises:
            Exception: what ended this request, if something did.
        """
        while not self.endings:
            self.engine.advance(self, len(self.tokens))
        self._raise()
        return self.tokens

    def __iter__(self) -> Iterator[int]:
        """Iterate over tokens as they come; runs the engine where none is waiting.

        An iteration that ends before the last token (`break`, an exception, its `close`, garbage
        collection) cancels the request: nothing will read what it would generate.
        """
        return Tokens(self)

    def __aiter__(self) -> AsyncIterator[int]:
        """Iterate over tokens as they come; the engine runs in a thread, one step at a time.

        Several tasks may wait, each for its own request. As with `for`, an iteration that ends
        before the last token cancels the request.
        """
        return AsyncTokens(self)

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def __repr__(self) -> str:
        """Return its state and progress."""
        progress = f"{len(self.tokens)} of {plural(self.max_new_tokens, 'token')}"
        end = f", {self.finish_reason}" if self.finish_reason else ""
        return f"Request({self.number}, {self.state}, {progress}{end})"


class Tokens(Iterator[int]):
    """The tokens of a request for `for`.

    No generator: a generator does not notice that it is left before its first token.
    """

    def __init__(self, request: Request):
        self._request, self._seen, self._closed = request, 0, False
        request.engine.watch(self, request)

    def __next__(self) -> int:
        """The next token.

        Raises:
            StopIteration: after the last one, or after `close`.
        """
        request, gone = self._request, True
        try:
            while not self._closed and self._seen >= len(request.tokens):
                if request.endings and self._seen >= len(request.tokens):
                    request._raise()
                    raise StopIteration
                request.engine.advance(request, self._seen)
            gone = self._closed
        finally:
            if gone:
                self.close()
        if gone:
            raise StopIteration
        self._seen += 1
        return request.tokens[self._seen - 1]

    def close(self) -> None:
        """End the iteration; its request is cancelled if it has not ended."""
        self._closed = True
        self._request.engine.abandon(self._request)


class AsyncTokens(AsyncIterator[int]):
    """The tokens of a request for `async for`.

    No asynchronous generator: the end of one waits for the event loop, and this class cancels the
    request as soon as it is left.
    """

    def __init__(self, request: Request):
        self._request, self._seen = request, 0
        request.engine.watch(self, request)

    def __aiter__(self) -> AsyncTokens:
        """Itself."""
        return self

    async def __anext__(self) -> int:
        """The next token.

        Raises:
            StopAsyncIteration: after the last one.
        """
        request, gone = self._request, True
        try:
            while self._seen >= len(request.tokens):
                if request.endings and self._seen >= len(request.tokens):
                    request._raise()
                    raise StopAsyncIteration
                await asyncio.to_thread(request.engine.advance, request, self._seen)
            gone = False
        finally:
            if gone:
                self._leave()
        self._seen += 1
        return request.tokens[self._seen - 1]

    async def aclose(self) -> None:
        """End the iteration; its request is cancelled if it has not ended."""
        self._leave()

    def _leave(self) -> None:
        self._request.engine.abandon(self._request)


Reader = Tokens | AsyncTokens
