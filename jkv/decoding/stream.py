"""Generation in blocks: the tokens of `generate`, as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Unpack

import numpy as np

from jkv._fork import check_fork
from jkv._transfer import transfers
from jkv.decoding.arguments import Model, Prompts
from jkv.decoding.detokenize import Pieces, incomplete
from jkv.decoding.generation import Generation, finish
from jkv.decoding.job import prepare
from jkv.decoding.options import GenerateOptions, Options, keywords
from jkv.decoding.prompts import PAD
from jkv.decoding.result import Result
from jkv.errors import JkvError


@dataclasses.dataclass(frozen=True)
class Block:
    """The next few tokens of every row.

    Attributes:
        tokens: ``[B, t]`` int32, -1 after a row's end (with a draft, after its own).
        texts: per row the text that is new, "" while a character is incomplete; joined over all
            blocks it is the row's text in `Result.texts`, so that the prompt's text and these make
            the decoded text of all tokens. None without a tokenizer.
        done: ``[B]`` bool, rows that have ended with this block or before.

    Example:
        >>> block = next(jkv.stream(lm, "ROMEO:", max_new_tokens=8, block=4))
        >>> block.tokens.shape, block.done.tolist()  # the first token comes as soon as it is there
        ((1, 1), [False])
    """

    tokens: np.ndarray
    texts: tuple[str, ...] | None
    done: np.ndarray


class Stream(Iterator[Block]):
    """An iterator of blocks; `result` once it is exhausted.

    Example:
        >>> stream = jkv.stream(lm, "ROMEO:", max_new_tokens=8, block=4)
        >>> sum(block.tokens.shape[1] for block in stream)
        8
        >>> stream.result.tokens.shape
        (1, 8)
    """

    def __init__(self, generation: Generation):
        self._generation = generation
        self._blocks = generation.blocks()
        self._result: Result | None = None
        self._pieces: list[Pieces] | None = None
        job = generation.job
        if job.tokenizer is not None:
            probe = incomplete(job.tokenizer)
            self._pieces = [Pieces(job.tokenizer, row, probe) for row in job.history]

    def __iter__(self) -> Stream:
        """Return itself."""
        return self

    @transfers
    def __next__(self) -> Block:
        """Return the next block.

        Raises:
            CacheFullError: at the end, if a row had no room.
        """
        if self._result is not None:
            raise StopIteration
        check_fork()
        self._generation.check_weights()
        ended = self._generation.ended
        for tokens in self._blocks:
            width = int((tokens != PAD).sum(axis=1).max())
            if width:  # nothing is left in it where all rows had met their stop strings
                return self._block(tokens[:, :width], ended)
        if not self._generation.exhausted:
            raise JkvError("the stream was interrupted; ask for a new one")
        self._result = finish(self._generation)
        raise StopIteration

    def _block(self, tokens: np.ndarray, ended: list[bool]) -> Block:
        done = np.asarray(self._generation.ended)
        texts = None
        if self._pieces is not None:
            texts = tuple(
                "" if before else pieces.push(row[row != PAD].tolist(), last=bool(now))
                for pieces, row, before, now in zip(self._pieces, tokens, ended, done, strict=True)
            )
        return Block(tokens=tokens, texts=texts, done=done)

    @property
    def result(self) -> Result:
        """All that was generated, as `jkv.generate` returns it.

        Raises:
            JkvError: before the last block has been taken.
        """
        if self._result is None:
            raise JkvError("the stream has not ended: take all its blocks before its result")
        return self._result


@keywords(GenerateOptions, Options)
def stream(
    model: Model,
    prompts: Prompts,
    *,
    block: int = 16,
    **options: Unpack[GenerateOptions],
) -> Stream:
    """Generate as `jkv.generate` does, in blocks, the first token alone: an iterator of `Block`.

    While the caller handles a block the device computes the next. Log-probabilities that are asked
    for are in `stream.result` once all blocks have been taken, not in the blocks.

    Args:
        model: `lm.model`, or `lm` where prompts or stops are texts.
        prompts: one row each, or one text; see `jkv.generate`.
        block: tokens per row that are computed at a time, at most.
        options: the keywords of `jkv.generate`, which describes them. With a draft, rows get
            different numbers of tokens: in a block each has -1 after its own. A row goes to the
            store once all blocks have been taken.

    Raises:
        TypeError: see `jkv.generate`; all but a full cache is raised at the call.
        ValueError: likewise.
        UnsupportedError: likewise.
        CacheFullError: likewise.
        NonFiniteError: likewise, by the iterator once it has given all tokens before.

    Example:
        >>> stream = jkv.stream(lm, "ROMEO:", max_new_tokens=8, block=4)
        >>> text = "".join(block.texts[0] for block in stream)
        >>> text == stream.result.text
        True
    """
    return Stream(Generation(prepare(model, prompts, Options(block=block, **options))))
