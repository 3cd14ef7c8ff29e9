"""Generation in blocks: what `generate` says, as it is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from jkv._fork import check_fork
from jkv._transfer import transfers
from jkv.decoding.arguments import CacheLike, Model, Progress, Prompts, Sampler, Stop
from jkv.decoding.detokenize import Pieces, incomplete
from jkv.decoding.draft import Draft
from jkv.decoding.options import Options
from jkv.decoding.request import PAD
from jkv.decoding.result import Result
from jkv.decoding.run import Run
from jkv.errors import JkvError

if TYPE_CHECKING:
    from jkv.store import Store


@dataclasses.dataclass(frozen=True)
class Block:
    """The next few tokens of every row.

    Attributes:
        tokens: ``[B, t]`` int32, -1 after a row's end (with a draft, after what it has said yet).
        texts: per row the text that is new, "" while a character is incomplete; joined over all
            blocks it is the row's text in `Result.texts`, so that the prompt's text and these make
            the decoded text of all tokens. None without a tokenizer.
        done: ``[B]`` bool, rows that have ended with this block or before.
    """

    tokens: np.ndarray
    texts: tuple[str, ...] | None
    done: np.ndarray


class Stream(Iterator[Block]):
    """An iterator of blocks; `result` once it is exhausted."""

    def __init__(self, run: Run):
        self._run = run
        self._blocks = run.blocks()
        self._result: Result | None = None
        self._pieces: list[Pieces] | None = None
        if run.tokenizer is not None:
            probe = incomplete(run.tokenizer)
            self._pieces = [Pieces(run.tokenizer, row, probe) for row in run.history]

    def __iter__(self) -> Stream:
        """Itself."""
        return self

    @transfers
    def __next__(self) -> Block:
        """The next block.

        Raises:
            CacheFullError: at the end, if a row had no room.
        """
        if self._result is not None:
            raise StopIteration
        check_fork()
        self._run.check_weights()
        ended = [row.reason is not None for row in self._run.rows]
        for tokens in self._blocks:
            width = int((tokens != PAD).sum(axis=1).max())
            if width:  # nothing is left in it where all rows had met their stop strings
                return self._block(tokens[:, :width], ended)
        if not self._run.exhausted:
            raise JkvError("the stream was interrupted; ask for a new one")
        self._result = self._run.result()
        raise StopIteration

    def _block(self, tokens: np.ndarray, ended: list[bool]) -> Block:
        done = np.asarray([row.reason is not None for row in self._run.rows])
        texts = None
        if self._pieces is not None:
            texts = tuple(
                "" if before else pieces.push(row[row != PAD].tolist(), last=bool(now))
                for pieces, row, before, now in zip(self._pieces, tokens, ended, done, strict=True)
            )
        return Block(tokens=tokens, texts=texts, done=done)

    @property
    def result(self) -> Result:
        """Everything said, as `jkv.generate` returns it.

        Raises:
            JkvError: before the last block has been taken.
        """
        if self._result is None:
            raise JkvError("the stream has not ended: take all its blocks before its result")
        return self._result


def stream(
    model: Model,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    block: int = 16,
    cache: CacheLike | None = None,
    sampler: Sampler | None = None,
    stop: Stop | None = None,
    key: jax.Array | None = None,
    return_logprobs: bool = False,
    top_logprobs: int = 0,
    resume: Result | None = None,
    slots: int | None = None,
    prefill_chunk: int = 256,
    progress: Progress | None = None,
    samples: int = 1,
    draft: Draft | None = None,
    store: Store | None = None,
    sequence_ids: Sequence[str] | None = None,
    tenant: str = "",
) -> Stream:
    """The tokens of `jkv.generate` in blocks, the first alone: an iterator of `Block`.

    While a block is in the reader's hands the device is at work on the next.

    Args:
        model: see `jkv.generate`, as for all that is not below.
        prompts: one row each, or one text.
        max_new_tokens: per row, at most.
        block: tokens per row that are computed at a time, at most.
        cache: the kind.
        sampler: a transform of `jkv.sampling`.
        stop: ids and strings at which a row ends, beside the checkpoint's.
        key: for samplers that draw at random.
        return_logprobs: in the `result`.
        top_logprobs: likewise.
        resume: an earlier result to go on from.
        slots: tokens that each row's cache has room for.
        prefill_chunk: tokens per pass of the prefill.
        progress: called after each of them.
        samples: rows per prompt.
        draft: proposes tokens. Rows then say different numbers of them: in a block each has -1
            after its own.
        store: where rows are looked for; they are kept there once the `result` is asked for.
        sequence_ids: their keys there.
        tenant: whose entries.

    Raises:
        TypeError: see `jkv.generate`; all but a full cache is raised at the call.
        ValueError: likewise.
        UnsupportedError: likewise.
        CacheFullError: likewise.
        NonFiniteError: likewise, by the iterator once it has given all tokens before.
    """
    options = Options(
        max_new_tokens=max_new_tokens,
        cache=cache,
        sampler=sampler,
        stop=stop,
        key=key,
        return_logprobs=return_logprobs,
        top_logprobs=top_logprobs,
        resume=resume,
        slots=slots,
        block=block,
        prefill_chunk=prefill_chunk,
        progress=progress,
        samples=samples,
        draft=draft,
        store=store,
        sequence_ids=sequence_ids,
        tenant=tenant,
    )
    return Stream(Run(model, prompts, options))
