"""Where a row ends: token ids for the device, strings that are found from the tokens' bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jkv._text import plural, short
from jkv.decoding.arguments import TokenizerLike
from jkv.decoding.capacity import bucket


@dataclasses.dataclass(frozen=True)
class Stops:
    """Where each row ends: token ids for the device, strings for the host."""

    ids: tuple[tuple[int, ...], ...]  # per row
    strings: tuple[tuple[str, ...], ...]  # per row

    def repeated(self, count: int) -> Stops:
        """Repeat each row's `count` times, next to each other."""
        return Stops(
            ids=tuple(ids for ids in self.ids for _ in range(count)),
            strings=tuple(strings for strings in self.strings for _ in range(count)),
        )

    def matrix(self) -> np.ndarray:
        """Return the ids as int32 ``[B, M]``, padded with a value that no token has.

        Also without any, and M a power of two: requests that differ in their stops alone are
        served by one program.
        """
        width = bucket(max(map(len, self.ids)), 4)
        rows = [list(ids) + [-2] * (width - len(ids)) for ids in self.ids]
        return np.asarray(rows, np.int32)


def parse_stops(
    stop: object,
    batch: int,
    vocab: int,
    end_ids: Sequence[int],
    tokenizer: TokenizerLike | None,
) -> Stops:
    """Return where each row ends: at what is asked for, and at the checkpoint's end-of-text ids.

    Args:
        stop: None for the checkpoint's ids alone; an id, a string, or several of them for all rows,
            or a list of such lists, one per row: they come beside the checkpoint's. () is nothing
            at all, and so is an empty list of a row.
        batch: B.
        vocab: V.
        end_ids: the checkpoint's.
        tokenizer: needed where there are strings.

    Raises:
        TypeError: a stop that is neither id nor string.
        ValueError: an id outside the vocabulary, an empty string, strings without a tokenizer, or
            another number of rows.
    """
    if stop is None:
        return Stops(ids=(tuple(end_ids),) * batch, strings=((),) * batch)
    stop = _plain_stop(stop)
    if isinstance(stop, str | int):
        stop = (stop,)
    if not isinstance(stop, Sequence) or isinstance(stop, bytes):
        raise TypeError(
            f"stop got {short(stop)}; expected token ids, strings, or one list of them per row"
        )
    stops = [_plain_stop(s) for s in stop]
    lists = [s for s in stops if isinstance(s, Sequence) and not isinstance(s, str | bytes)]
    if lists and not len(lists) == len(stops) == batch:
        raise ValueError(
            f"stop got {plural(len(stops), 'entry', 'entries')}, {len(lists)} of them lists; "
            f"expected ids and strings for all rows, or {plural(batch, 'list')}, one per row"
        )
    ids, strings = [], []
    for row in lists or [stops] * batch:
        own = [_stop_id(s, vocab) for s in row if not isinstance(s, str)]
        # Nothing switches all of them off; what is asked for never does so by the way.
        ids.append((*own, *(end for end in end_ids if end not in own)) if len(row) else ())
        strings.append(tuple(s for s in row if isinstance(s, str)))
    for string in (string for row in strings for string in row):
        _check_stop_string(string)
    if any(strings) and tokenizer is None:
        raise ValueError(
            "stop strings need the tokenizer: pass lm instead of lm.model, or token ids"
        )
    return Stops(ids=tuple(ids), strings=tuple(strings))


def _check_stop_string(string: str) -> None:
    """Refuse strings that end every row, and such as no text contains.

    Raises:
        ValueError: it is empty, or not valid Unicode.
    """
    if not string:
        raise ValueError("stop got an empty string, which every text contains")
    try:
        string.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"stop got a string that is not valid Unicode: {error}") from error


def _plain_stop(stop: object) -> object:
    """Convert arrays and their scalars to plain numbers and lists."""
    return stop.tolist() if isinstance(stop, np.ndarray | np.generic | jax.Array) else stop


def _stop_id(value: object, vocab: int) -> int:
    value = _plain_stop(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"stop got {short(value)}; expected a token id or a string")
    if not 0 <= value < vocab:
        raise ValueError(f"stop got token {value}; expected ids from 0 to {vocab - 1}")
    return int(value)


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
    tokenizer: TokenizerLike | None,
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
        tokenizer: of the row's tokens; without one there are no strings.
        strings: at which it ends.
        prompt: the tokens before the row's own.
        tokens: the row's own.
        fresh: how many of these are new; those before completed no string.
    """
    if tokenizer is None or not strings or not fresh:
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
    tokenizer: TokenizerLike,
    prompt: Sequence[int] | np.ndarray,
    tokens: Sequence[int],
    start: int,
    reach: int,
) -> bytes:
    """Return the last bytes before a row's token, at least `reach` of them if there are so many."""
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


def _visible(tokenizer: TokenizerLike, tokens: Sequence[int], last: int, size: int) -> str:
    """Return what a row shows of its last `size` bytes, those of the prompt left out."""
    pieces: list[bytes] = []
    for n in range(last, -1, -1):
        if size <= 0:
            break
        piece = tokenizer.token_bytes(tokens[n])
        if not tokenizer.is_special(tokens[n]):
            pieces.append(piece[-size:])
        size -= len(piece)
    return b"".join(reversed(pieces)).decode(errors="replace")
