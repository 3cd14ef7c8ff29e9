"""The engine: many requests at once over one pool of pages.

Each step gives every running request its next tokens and prefills one more piece of the prompts
that are waiting (Orca, Yu et al. 2022; chunked prefill, Agrawal et al. 2023, arXiv:2308.16369), in
pages that requests share and give back (Kwon et al. 2023, arXiv:2309.06180). The host is one step
behind the device: a step is dispatched before the tokens of the last one have been read.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np

from jkv._checks import check_integer, check_one_of
from jkv._fork import check_fork
from jkv._transfer import transfers
from jkv.cache.paged import PagedKind
from jkv.decoding.arguments import DecoderLike, Ids, Model, Prompts, Sampler
from jkv.decoding.detokenize import new_text
from jkv.decoding.options import keywords
from jkv.decoding.prompts import check_concrete, rows_of_tokens, split_model
from jkv.decoding.result import differences
from jkv.engine.core import EngineCore
from jkv.engine.request import Reader, Request
from jkv.engine.request_factory import RequestFactory, RequestOptions, SubmitOptions
from jkv.engine.runner import managed_kind
from jkv.engine.schedule import BatchLimits
from jkv.engine.transaction import Transactions
from jkv.errors import UnsupportedError
from jkv.store.policy import Policy

if TYPE_CHECKING:
    from jkv.store import Store


class Engine:
    """Continuous batching over a paged cache; see `submit`, `step` and `run`.

    Args:
        lm: what `jkv.load` or `jkv.shard` returns, or a decoder (then prompts are ids).
        pages: pages in the pool, each of `page` tokens in every layer.
        page: tokens per page, by default those of `cache`, which are 16.
        max_batch: requests that run at once.
        cache: a `jkv.paged` kind or its text ("paged:16,int8"), for pages in another form; by
            default in the model's dtype. With quantized pages, a prefix hit reads quantized values
            while a fresh prefill reads exact ones: a request's tokens may then differ from those
            that it would have alone.
        block: tokens that each request gets per step, at most. More of them are less work for the
            host, and up to twice as many slots are held that may never be used.
        prefill_chunk: prompt tokens per step: of one prompt, or of several in equal parts. With
            more of them long prompts take fewer steps, and each step takes longer for the requests
            that generate beside them.
        prefill_rows: prompts per step, at most.
        policy: which cached page is evicted first, of `jkv.store`; LRU by default.
        share: whether equal prefixes of one tenant's prompts share pages.
        preemption: what becomes of the pages of a request that has to wait again: "recompute",
            "swap" (they are copied to the host), or "auto", the faster one as measured so far.
        swap_bytes: of swapped pages on the host, at most; further requests are recomputed.
        store: a `jkv.store.Store` for evicted pages, which prompts that begin with them find again,
            in another process too; and for the pages of requests that wait.

    Raises:
        TypeError: a kind that is not paged.
        ValueError: numbers out of range.
        UnsupportedError: an unknown `preemption`.

    Example:
        >>> engine = jkv.Engine(lm, pages=64)
        >>> request = engine.submit("ROMEO:", max_new_tokens=8)
        >>> request.state, engine.stats()["waiting"]  # `step`, `run` and reading its tokens run it
        ('waiting', 1)
    """

    @transfers
    def __init__(
        self,
        lm: Model,
        *,
        pages: int,
        page: int | None = None,
        max_batch: int = 8,
        cache: PagedKind | str | None = None,
        block: int = 4,
        prefill_chunk: int = 256,
        prefill_rows: int = 4,
        policy: Policy | None = None,
        share: bool = True,
        preemption: Literal["auto", "recompute", "swap"] = "auto",
        swap_bytes: int = 1 << 30,
        store: Store | None = None,
    ):
        model, self.tokenizer = split_model(lm)
        check_one_of(
            "preemption",
            preemption,
            ("auto", "recompute", "swap"),
            of="Engine",
            error=UnsupportedError,
        )
        pages = check_integer("pages", pages, 1)
        page = None if page is None else check_integer("page", page, 1)
        limits = BatchLimits(
            lanes=check_integer("max_batch", max_batch, 1),
            block=check_integer("block", block, 1),
            chunk=min(check_integer("prefill_chunk", prefill_chunk, 1), model.config.context),
            rows=check_integer("prefill_rows", prefill_rows, 1),
        )
        self.core = core = EngineCore(
            model,
            self.tokenizer,
            kind=managed_kind(cache, page, pages),
            limits=limits,
            policy=policy,
            store=store,
            share=share,
            preemption=preemption,
            swap_bytes=swap_bytes,
        )
        self._factory = RequestFactory(self, core.runner, core.pages, self.tokenizer)
        self._transactions = Transactions(core.recover, core.sweep)

    @property
    def model(self) -> DecoderLike:
        """The decoder, with the weights of the latest `update`."""
        return self.core.runner.model

    # What users do.

    @overload
    def submit(
        self,
        prompt: str | Ids,
        *,
        samples: None = None,
        request_id: object = None,
        **options: Unpack[SubmitOptions],
    ) -> Request: ...

    @overload
    def submit(
        self,
        prompt: str | Ids,
        *,
        samples: int,
        request_id: object = None,
        **options: Unpack[SubmitOptions],
    ) -> list[Request]: ...

    @transfers
    @keywords(SubmitOptions, RequestOptions)
    def submit(
        self,
        prompt: str | Ids,
        *,
        samples: int | None = None,
        request_id: object = None,
        **options: Unpack[SubmitOptions],
    ) -> Request | list[Request]:
        """Queue a prompt.

        Args:
            prompt: a text, or token ids.
            max_new_tokens: at most.
            sampler: a transform of `jkv.sampling`, or a function of the logits ``[1, V]``; greedy
                by default. A structure that the engine has not seen, or another function, compiles
                its programs anew.
            key: `jax.random.key(seed)`, for samplers that draw at random: the tokens are those of
                `jkv.generate` with the same key.
            stop: ids and strings at which it ends beside the checkpoint's, as in `jkv.generate`;
                at most 16 ids. () switches all off.
            priority: an integer; higher ones are served sooner.
            tenant: requests share prefixes only with others of their tenant.
            on_token: called with (request, token) as tokens come. What it raises ends the request.
            samples: requests for as many answers to one prompt, drawn independently; they share
                the prompt's pages.
            request_id: an id of the caller's own, which the request carries; it may be anything.

        Returns:
            The `Request`, or a list of them where `samples` is given.

        Raises:
            TypeError: see `jkv.generate`.
            ValueError: likewise; or a prompt that with its answer is longer than the context.
            PoolFullError: it could never fit into the pool.
            StaleError: the model's weights were changed in place: see `update`.
            RuntimeError: in a child that was forked, where JAX hangs.
        """
        check_concrete("prompt", prompt)
        row = prompt if isinstance(prompt, str) else np.asarray(prompt)
        rows = rows_of_tokens([row], self.core.runner.config.vocab, tokenizer=self.tokenizer)
        count = 1 if samples is None else check_integer("samples", samples, 1)
        requests = self._requests(rows, count, [request_id], RequestOptions(**options))
        self._queue(requests)
        return requests[0] if samples is None else requests

    def _requests(
        self, rows: list[np.ndarray], samples: int, ids: Sequence[object], options: RequestOptions
    ) -> list[Request]:
        check_fork()
        self._settle()
        return self._factory.make(rows, samples, ids, options)

    def _queue(self, requests: list[Request]) -> None:
        """Queue requests: all of them or, if interrupted, none or all."""
        with self._transactions.lock:
            self.core.scheduler.requests.add(requests)

    @transfers
    @keywords(SubmitOptions, RequestOptions)
    def generate(
        self,
        prompts: Prompts,
        *,
        request_ids: Sequence[object] | None = None,
        **options: Unpack[SubmitOptions],
    ) -> list[Request]:
        """Submit prompts, run until all of them have ended, and return their requests.

        Requests that were submitted before run beside them. If this call is interrupted, its
        requests are cancelled.

        Args:
            prompts: a list of texts and of token ids, or one text.
            max_new_tokens: of each, at most.
            sampler: as in `submit`.
            key: one for all, or one per prompt; the tokens are those of `jkv.generate`.
            stop: as in `submit`, for all; or one list of ids and strings per prompt.
            priority: as in `submit`.
            tenant: likewise.
            on_token: likewise.
            request_ids: an id of the caller's own for each prompt.

        Returns:
            The finished requests in the order of the prompts. A failed one has its `error`.

        Raises:
            TypeError: see `submit`; nothing is run if one of the prompts is refused.
            ValueError: likewise.
            PoolFullError: likewise.

        Example:
            >>> engine = jkv.Engine(lm, pages=64)
            >>> requests = engine.generate(["ROMEO:", "JULIET:"], max_new_tokens=8)
            >>> [len(request.tokens) for request in requests]
            [8, 8]
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = rows_of_tokens(prompts, self.core.runner.config.vocab, tokenizer=self.tokenizer)
        ids = [None] * len(rows) if request_ids is None else list(request_ids)
        if len(ids) != len(rows):
            raise ValueError(
                f"request_ids got {len(ids)} ids for {len(rows)} prompts; expected one for each"
            )
        with self._transactions.lock:
            self._transactions.check_outside()
        requests = self._requests(rows, 1, ids, RequestOptions(**options))
        try:
            self._queue(requests)
            for request in requests:
                while not request.endings:
                    self.advance(request, len(request.tokens))
        finally:
            for request in requests:
                self.abandon(request)
        return requests

    def step(self) -> bool:
        """Run one step of all requests; whether there is more to do.

        Raises:
            RuntimeError: called from a request's callback.
        """
        return self._transactions.run(self.core.step)

    def run(self) -> None:
        """Run steps until every request has ended."""
        while self.step():
            pass

    def advance(self, request: Request, seen: int) -> None:
        """Run steps until the request has more than `seen` tokens, or has ended."""

        def step() -> None:
            if not request.endings and len(request.tokens) <= seen:
                self.core.step()

        while not request.endings and len(request.tokens) <= seen:
            self._transactions.run(step)

    @transfers
    def cancel(self, request: Request) -> None:
        """See `Request.cancel`."""

        def cancel() -> None:
            self.core.scheduler.finish(request, "cancelled")

        with self._transactions.lock:
            if self._transactions.within():
                cancel()  # by a callback, and part of the step that called it
            else:
                self._transactions.run(cancel)

    def abandon(self, request: Request) -> None:
        """Cancel a request where nothing may be waited for, such as in a finaliser.

        It has ended at once; its pages go back with the step that is under way, or with the next
        call of the engine.
        """
        self.core.abandon(request)

    def watch(self, reader: Reader, request: Request) -> None:
        """Cancel the request once this iteration over its tokens is gone.

        Not by a finaliser of its own: Python drops an interrupt there, and a hook that keeps the
        exception, such as pytest's, keeps the iteration alive.
        """
        gone = weakref.ref(reader, lambda _: self.abandon(request))
        self.core.scheduler.requests.readers[gone] = request

    def update(self, lm: Model) -> None:
        """Take new weights, such as those of the same model after a training step.

        Running and waiting requests keep their tokens and go on with the new weights. What was
        cached with the old ones is dropped, and what a store has of them is not found any more.

        Args:
            lm: what `jkv.load` returns, or a decoder, with the engine's configuration.

        Raises:
            ValueError: another configuration.
        """
        check_fork()
        model, _ = split_model(lm)
        old = self.core.runner.config
        if differ := differences(old, model.config) or (old != model.config and "its settings"):
            raise ValueError(
                f"update got another model ({differ}); expected the same with new weights. For "
                "another model make another engine"
            )

        self._transactions.run(functools.partial(self.core.update, model))

    def text(self, request: Request) -> str:
        """Return the new text of a request.

        Raises:
            UnsupportedError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UnsupportedError("there is no tokenizer: use request.tokens, which are ids")
        return new_text(self.tokenizer, request.prompt, request.tokens)

    def stats(self) -> dict[str, Any]:
        """Return figures since the engine was made; seconds, pages, tokens. See `Stats`."""
        with self._transactions.lock:
            self._settle()
            return self.core.figures()

    def close(self) -> None:
        """End all requests; pages that may be found again go to the store, if there is one."""
        self._transactions.run(self.core.end_all)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm(self, samplers: Iterable[Sampler] = ()) -> None:
        """Compile all that is needed for requests with these samplers, and greedy ones."""
        self._transactions.run(functools.partial(self.core.warm, samplers))

    def _settle(self) -> None:
        """Recover from an interrupt, and release what was abandoned."""
        with self._transactions.lock:
            due = self._transactions.torn or self.core.needs_sweep()
            if due and not self._transactions.within():
                self._transactions.run(lambda: None)
