"""Requests from what users ask for, checked before anything is queued."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jkv._checks import check_function, check_integer, check_text, got, is_integer
from jkv._text import plural
from jkv.decoding import loop, sampling
from jkv.decoding.arguments import Sampler, Stop, TokenizerLike
from jkv.decoding.options import DrawOptions, EndOptions
from jkv.decoding.prompts import check_concrete
from jkv.decoding.stopping import parse_stops
from jkv.decoding.transform import Transform
from jkv.engine.allocator import PageAllocator
from jkv.engine.request import Driver, Request
from jkv.engine.runner import Runner
from jkv.errors import PoolFullError

# A request of priority p goes before those that came at most 64 p requests before it: it is
# served sooner, and no request waits for ever.
PRIORITY = 64


class SubmitOptions(EndOptions, DrawOptions, total=False):
    """Keywords of `Engine.submit`, which describes them, and of `Engine.generate`."""

    priority: int
    tenant: str
    on_token: Callable[[Request, int], object] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """The value of `SubmitOptions`, with their defaults; not checked yet."""

    max_new_tokens: int
    sampler: Sampler | None = None
    key: jax.Array | None = None
    stop: Stop | None = None
    priority: int = 0
    tenant: str = ""
    on_token: Callable[[Request, int], object] | None = None


class RequestFactory:
    """Makes the requests of one engine.

    Args:
        engine: that runs them.
        runner: which checks samplers and stop ids.
        pages: of which a request may need no more than there are.
        tokenizer: for stop strings, or None.
    """

    def __init__(
        self, engine: Driver, runner: Runner, pages: PageAllocator, tokenizer: TokenizerLike | None
    ):
        self._engine, self._runner, self._pages = engine, runner, pages
        self._tokenizer = tokenizer
        self._numbers = itertools.count(1)

    def make(
        self, rows: list[np.ndarray], samples: int, ids: Sequence[object], options: RequestOptions
    ) -> list[Request]:
        """Make requests, `samples` of each row; they are not queued yet.

        Their samplers and keys are on the host from here on, whatever device they were on: one
        step takes those of all its requests.

        Args:
            rows: prompts.
            samples: requests per prompt.
            ids: of the caller's own, per prompt.
            options: of all of them.

        Raises:
            TypeError: an option of another type.
            ValueError: an option out of range, or a prompt that is too long.
            PoolFullError: a request that could never fit.
            StaleError: the model's weights were changed in place.
        """
        runner, config = self._runner, self._runner.config
        runner.check_weights()
        most = check_integer("max_new_tokens", options.max_new_tokens, 1)
        ending = parse_stops(options.stop, len(rows), config.vocab, config.end_ids, self._tokenizer)
        check_text("tenant", options.tenant)
        check_function("on_token", options.on_token, "(request, token)")
        if not is_integer(options.priority):
            raise TypeError(f"{got('priority', options.priority)}; expected an integer")
        check_concrete("sampler", options.sampler)
        check_concrete("key", options.key)
        keys = _keys(options, len(rows), samples)
        for stop_ids in ending.ids:
            runner.check_stop_ids(stop_ids)
        samplers: dict[tuple[int, ...], Transform | None] = {}
        for stop_ids in ending.ids:
            if stop_ids not in samplers:
                samplers[stop_ids] = runner.bind(options.sampler, stop_ids)
        for row in rows:
            self._check_fits(len(row), most)
        requests = []
        for i in range(len(rows) * samples):
            row, number = i // samples, next(self._numbers)
            requests.append(
                Request(
                    number=number,
                    prompt=rows[row],
                    max_new_tokens=most,
                    sampler=samplers[ending.ids[row]],
                    key=keys[i],
                    stop_ids=ending.ids[row],
                    stop_strings=ending.strings[row],
                    priority=int(options.priority),
                    tenant=options.tenant,
                    on_token=options.on_token,
                    engine=self._engine,
                    rank=number - PRIORITY * int(options.priority),
                    submitted=time.perf_counter(),
                    request_id=ids[row],
                )
            )
        return requests

    def _check_fits(self, prompt: int, most: int) -> None:
        """Refuse what could never run.

        Raises:
            ValueError: longer than the model's context.
            PoolFullError: more than all pages.
        """
        context, pages = self._runner.config.context, self._pages
        asked = f"a prompt of {plural(prompt, 'token')} and max_new_tokens={most}"
        if prompt + most > context:
            raise ValueError(
                f"{asked} make {prompt + most}, more than the model's context of {context}; "
                "shorten the prompt or ask for fewer tokens"
            )
        needed = pages.pages_for(prompt + most - 1)
        if needed > pages.pages:
            raise PoolFullError(
                f"{asked} need {plural(needed, 'page')} of {pages.page}, and the pool has "
                f"{pages.pages}; expected more pages, or a shorter request"
            )


def _keys(options: RequestOptions, rows: int, samples: int) -> list[np.ndarray | None]:
    """Return the data ``[2]`` of the key of each sample of each row, or None for each.

    They are those that `jkv.generate` would give to them.
    """
    count, sampler = rows * samples, options.sampler
    if sampler is not None:
        sampling.check(sampler)
    if not sampling.needs_key(sampler):
        if samples > 1:
            raise ValueError(
                f"samples={samples} of a sampler that draws nothing at random would all be the "
                "same; expected one that does, such as jkv.sampling.temperature(0.8), and a key"
            )
        return [None] * count
    if options.key is None:
        raise ValueError(loop.NEEDS_KEY)
    return list(jax.device_get(jax.random.key_data(sampling.row_keys(options.key, count))))
