"""Stop strings: where a row ends, found from its tokens' bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class StopMatch:
    """A stop string that is complete.

    Attributes:
        kept: how many tokens the row keeps; the last of them completes the string.
        visible: what these tokens show of the string and of what follows it in its last token,
            without the texts of special tokens.
    """

    kept: int
    visible: str


def first_stop(
    tokenizer: Any,
    strings: Sequence[str],
    prompt: Sequence[int] | np.ndarray,
    tokens: Sequence[int],
    fresh: int,
) -> StopMatch | None:
    """Find the first new token that completes a stop string.

    As in `transformers`, the text that is searched has the texts of special tokens, and a string
    may begin in the prompt as long as one of the row's own tokens completes it. The cost depends on
    the new tokens and on the strings' lengths, and not on how long the row is.

    Args:
        tokenizer: of the row's tokens.
        strings: at which it ends.
        prompt: the tokens before the row's own.
        tokens: the row's own.
        fresh: how many of these are new; those before completed no string.
    """
    if not strings or not fresh:
        return None
    wanted = [string.encode() for string in strings]
    reach = max(map(len, wanted)) - 1
    start = len(tokens) - fresh
    text = _before(tokenizer, prompt, tokens, start, reach)
    for n in range(start, len(tokens)):
        begun = len(text)
        text += tokenizer.token_bytes(tokens[n])
        # Only what ends within this token: what ended before it was no stop, or was another turn's.
        found = (text.find(w, max(0, begun - len(w) + 1)) for w in wanted)
        at = min((i for i in found if i >= 0), default=None)
        if at is not None:
            return StopMatch(n + 1, _visible(tokenizer, tokens, n, len(text) - at))
    return None


def _before(
    tokenizer: Any,
    prompt: Sequence[int] | np.ndarray,
    tokens: Sequence[int],
    start: int,
    reach: int,
) -> bytes:
    """The last bytes before a row's token, at least `reach` of them where there are so many."""
    pieces, size = [], 0
    for token in _backwards(prompt, tokens, start):
        if size >= reach:
            break
        pieces.append(tokenizer.token_bytes(token))
        size += len(pieces[-1])
    return b"".join(reversed(pieces))


def _backwards(
    prompt: Sequence[int] | np.ndarray, tokens: Sequence[int], start: int
) -> Iterator[int]:
    for i in range(start - 1, -1, -1):
        yield int(tokens[i])
    for i in range(len(prompt) - 1, -1, -1):
        yield int(prompt[i])


def _visible(tokenizer: Any, tokens: Sequence[int], last: int, size: int) -> str:
    """What a row shows of its last `size` bytes, those of the prompt not counted."""
    pieces: list[bytes] = []
    for n in range(last, -1, -1):
        if size <= 0:
            break
        piece = tokenizer.token_bytes(tokens[n])
        if not tokenizer.is_special(tokens[n]):
            pieces.append(piece[-size:])
        size -= len(piece)
    return b"".join(reversed(pieces)).decode(errors="replace")
