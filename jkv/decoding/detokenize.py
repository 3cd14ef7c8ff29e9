"""Tokens to text, where what came before has been shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jkv.decoding.arguments import TokenizerLike

_UNREADABLE = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


def new_text(
    tokenizer: TokenizerLike, before: Sequence[int] | np.ndarray, new: Sequence[int] | np.ndarray
) -> str:
    """Return what new tokens add to the text of those before them.

    It is the text of all of them from where it differs from the text of those before: with a
    decoder that strips the first space of what it is given, the new tokens alone would lose theirs.
    A character of which `before` has only the first bytes is in the new text as a whole.

    Args:
        tokenizer: of both.
        before: ids ``[S]``.
        new: ids ``[T]``.
    """
    old = [int(token) for token in before]
    text = tokenizer.decode([*old, *(int(token) for token in new)])
    return text[_count_common(tokenizer.decode(old), text) :]


class Pieces:
    """Tokens to text a few at a time: only text that no later token can change is given out.

    Joined, the pieces are the `new_text` of all tokens: a character whose bytes are spread over
    several tokens comes whole, with the last of them.

    Args:
        tokenizer: of all tokens.
        before: the tokens whose text has been shown.
        probe: as of `incomplete`, if that is known.
    """

    def __init__(
        self,
        tokenizer: TokenizerLike,
        before: Sequence[int] | np.ndarray = (),
        probe: int | None = None,
    ):
        self._tokenizer = tokenizer
        self._probe = incomplete(tokenizer) if probe is None else probe
        # The latest tokens, and the text of them that has been shown: decoding all of them each
        # time would be quadratic.
        self._window = [int(token) for token in before]
        self._shown = tokenizer.decode(self._window) if self._window else ""

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Return the text that `tokens` add; with the last ones also what was held back."""
        # Special tokens have no text: a row of them would make the window ever longer.
        fresh = [token for token in tokens if not self._tokenizer.is_special(token)]
        self._window += fresh
        text = self._tokenizer.decode(self._window) if self._window else ""
        settled = text if last else self._settle(text)
        piece = settled[_count_common(self._shown, text) :]
        if piece:
            self._shown = settled
        if settled == text and fresh:
            tail = self._tokenizer.decode(fresh)
            # Some decoders strip the first space of what they are given: there must be a text
            # before the next token, or it would lose its own.
            if tail:
                self._window, self._shown = fresh, tail
        return piece

    def _settle(self, text: str) -> str:
        """Return as much of a text as no later token can change."""
        if self._probe >= 0:
            # Followed by a lone byte, an unfinished character comes out differently (and, with
            # byte-fallback decoders, so does the whole run of bytes that it belongs to).
            other = self._tokenizer.decode([*self._window, self._probe])
            text = text[: _count_common(text, other)]
        return text.rstrip(_UNREADABLE)


def incomplete(tokenizer: TokenizerLike) -> int:
    """Find a token that is part of a character, -1 for none among the first thousand."""
    found = (i for i in range(1024) if _UNREADABLE in tokenizer.decode([i]))
    return next(found, -1)


def _count_common(a: str, b: str) -> int:
    """Count the characters with which two texts begin alike."""
    if b.startswith(a):
        return len(a)
    same = (x == y for x, y in zip(a, b, strict=False))
    return next((i for i, equal in enumerate(same) if not equal), min(len(a), len(b)))
