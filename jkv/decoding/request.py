"""What a user asks of generation, checked and brought into one form before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jkv._text import brief, plural

PAD = -1  # what stands in the place of a token where there is none


@dataclasses.dataclass(frozen=True)
class Stops:
    """Where each row ends: token ids for the device, strings for the host."""

    ids: tuple[tuple[int, ...], ...]  # per row
    strings: tuple[tuple[str, ...], ...]  # per row

    def repeated(self, count: int) -> Stops:
        """Those of each row `count` times, next to each other."""
        return Stops(
            ids=tuple(ids for ids in self.ids for _ in range(count)),
            strings=tuple(strings for strings in self.strings for _ in range(count)),
        )

    def matrix(self) -> np.ndarray:
        """The ids as int32 ``[B, M]``, padded with a value that no token has.

        Also without any, and M a power of two: requests that differ in their stops alone are
        served by one program.
        """
        width = bucket(max(map(len, self.ids)), 4)
        rows = [list(ids) + [-2] * (width - len(ids)) for ids in self.ids]
        return np.asarray(rows, np.int32)


def split_model(model: Any) -> tuple[Any, Any]:
    """The decoder and the tokenizer of a loaded LM, or a decoder and None.

    Raises:
        TypeError: neither; or this is called in a function that is being traced.
    """
    decoder = getattr(model, "model", model)
    if not hasattr(decoder, "config") or not hasattr(decoder, "hidden"):
        raise TypeError(
            f"got {_named(model)} as a model; expected what jkv.load returns, its .model, or a "
            "jkv.Decoder"
        )
    check_concrete("the model", decoder)
    if isinstance(_nothing(), Tracer):
        raise TypeError(f"this call {_TRACED}")
    return decoder, getattr(model, "tokenizer", None)


_TRACED = (
    "is traced by jit, vmap or grad, and jkv.generate and its like work on the host; use "
    "jkv.prefill and jkv.rollout inside of transformations"
)


@jax.jit
def _nothing() -> int:
    """A tracer where the caller is being traced by `jit`, however concrete its arguments."""
    return 0


def check_concrete(name: str, tree: Any) -> None:
    """Refuse values that are being traced.

    Args:
        name: of the argument, for the message.
        tree: any pytree.

    Raises:
        TypeError: one of its leaves is a tracer.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(f"{name} {_TRACED}")


def integer(name: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least`.

    Raises:
        ValueError: it is something else.
    """
    plain = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not plain or value < least:
        raise ValueError(f"{name} got {brief(value)}; expected an integer of at least {least}")
    return int(value)


def rows_of_tokens(
    prompts: Any, vocab: int, *, tokenizer: Any = None, continued: bool = False
) -> list[np.ndarray]:
    """Prompts as one int32 array per row.

    Args:
        prompts: a list of rows, each a list or array of ids or (with a tokenizer) a text; one text,
            which is one row; or an array ``[B, T]``.
        vocab: V.
        tokenizer: for texts.
        continued: whether the rows go on from others. Then a row may be empty (one token of it is
            waiting), and a text is encoded as a continuation, without special tokens.

    Raises:
        TypeError: something that holds no token ids.
        ValueError: no rows, an empty row, or an id outside the vocabulary.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, bytes):
        raise TypeError(f"got {brief(prompts)} as prompts; expected a text, or a list of prompts")
    if not isinstance(prompts, Sequence):
        # An array on the device would compile one program per shape to be cut into rows.
        prompts = _host_array("prompts", prompts)
        if prompts.ndim != 2:
            raise TypeError(
                f"got prompts of {_described(prompts)}; expected a list of rows, or integers [B, T]"
            )
    if len(prompts) == 0:
        raise ValueError("got no prompts; expected at least one row")
    return [_row(i, row, vocab, tokenizer, continued) for i, row in enumerate(prompts)]


def _row(i: int, row: Any, vocab: int, tokenizer: Any, continued: bool) -> np.ndarray:
    if isinstance(row, str):
        if tokenizer is None:
            raise TypeError(
                f"prompt {i} is a text, and there is no tokenizer: pass lm instead of lm.model, "
                "or token ids"
            )
        row = tokenizer.encode_continuation(row) if continued else tokenizer.encode(row)
    array = _host_array(f"prompt {i}", row)
    if array.ndim != 1:
        raise TypeError(
            f"prompt {i} is {_described(array)}; expected a list of token ids (a single prompt "
            "goes in a list of its own: [[1, 2, 3]])"
        )
    if array.size == 0:
        if not continued:
            raise ValueError(f"prompt {i} is empty; expected at least one token")
        return np.zeros((0,), np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"prompt {i} has dtype {array.dtype}; expected integers, the token ids (or one text "
            "per row)"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"prompt {i} has token {low if low < 0 else high}; expected ids from 0 to {vocab - 1}, "
            "the model's vocabulary"
        )
    return array.astype(np.int32)


def _host_array(name: str, value: Any) -> np.ndarray:
    """`value` as a numpy array.

    Raises:
        TypeError: it is being traced, or holds rows of different lengths.
    """
    if isinstance(value, Tracer):
        raise TypeError(f"{name} {_TRACED}")
    try:
        return np.asarray(value)
    except ValueError:
        raise TypeError(
            f"{name} holds lists of different lengths; expected a flat list of token ids"
        ) from None


def _described(array: np.ndarray) -> str:
    if array.ndim == 0:
        return f"{_named(array.item())}, no list"
    return f"an array of shape {array.shape}"


def _named(value: Any) -> str:
    """A value in few words."""
    shown = repr(value)
    return shown if len(shown) <= 40 else f"a {type(value).__name__}"


def stops(stop: Any, batch: int, vocab: int, end_ids: Sequence[int], tokenizer: Any) -> Stops:
    """What ends each row: what is asked for, and the checkpoint's end-of-text ids beside it.

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
            f"stop got {_named(stop)}; expected token ids, strings, or one list of them per row"
        )
    stop = [_plain_stop(s) for s in stop]
    nested = [isinstance(s, Sequence) and not isinstance(s, str | bytes) for s in stop]
    if any(nested) and (not all(nested) or len(stop) != batch):
        raise ValueError(
            f"stop got {plural(len(stop), 'entry', 'entries')}, {sum(nested)} of them lists; "
            f"expected ids and strings for all rows, or {plural(batch, 'list')}, one per row"
        )
    per_row = stop if any(nested) else (stop,) * batch
    ids, strings = [], []
    for row in per_row:
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


def _plain_stop(stop: Any) -> Any:
    """Arrays and their scalars as plain numbers and lists."""
    return stop.tolist() if isinstance(stop, np.ndarray | np.generic | jax.Array) else stop


def _stop_id(value: Any, vocab: int) -> int:
    value = _plain_stop(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"stop got {_named(value)}; expected a token id or a string")
    if not 0 <= value < vocab:
        raise ValueError(f"stop got token {value}; expected ids from 0 to {vocab - 1}")
    return int(value)


def bucket(size: int, least: int = 64) -> int:
    """The next size for which there is a program: powers of two, and quarters between from 1024.

    Few programs, at most a quarter of a large buffer unused.
    """
    power = least
    while power < size:
        power *= 2
    if power <= 1024:
        return power
    half, quarter = power // 2, power // 8
    return half + quarter * -(-(size - half) // quarter)


def padded(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Rows as int32 ``[B, width]``, -1 after the end of each."""
    out = np.full((len(rows), width), PAD, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
