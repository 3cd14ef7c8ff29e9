"""Prompts and the model that continues them, in one form, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.core import Tracer

from jkv._text import brief, short
from jkv.decoding.arguments import DecoderLike, TokenizerLike

PAD = -1  # what stands in the place of a token where there is none


def split_model(model: object) -> tuple[DecoderLike, TokenizerLike | None]:
    """Split a loaded LM into its decoder and tokenizer; a decoder has none.

    Raises:
        TypeError: neither; or this is called in a function that is being traced.
    """
    decoder = getattr(model, "model", model)
    if not isinstance(decoder, DecoderLike):
        raise TypeError(
            f"got {short(model)} as a model; expected what jkv.load returns, its .model, or a "
            "jkv.Decoder; a model of your own runs in jkv.prefill, decode_step and rollout"
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
    """Return a tracer where the caller is traced by `jit`, however concrete its arguments."""
    return 0


def check_concrete(name: str, tree: object) -> None:
    """Refuse values that are being traced.

    Args:
        name: of the argument, for the message.
        tree: any pytree.

    Raises:
        TypeError: one of its leaves is a tracer.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(f"{name} {_TRACED}")


def rows_of_tokens(
    prompts: object,
    vocab: int,
    *,
    tokenizer: TokenizerLike | None = None,
    continued: bool = False,
) -> list[np.ndarray]:
    """Return prompts as one int32 array per row.

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
                f"got prompts of {_describe(prompts)}; expected a list of rows, or integers [B, T]"
            )
    if len(prompts) == 0:
        raise ValueError("got no prompts; expected at least one row")
    return [_row(i, row, vocab, tokenizer, continued) for i, row in enumerate(prompts)]


def _row(
    i: int, row: object, vocab: int, tokenizer: TokenizerLike | None, continued: bool
) -> np.ndarray:
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
            f"prompt {i} is {_describe(array)}; expected a list of token ids (a single prompt "
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


def _host_array(name: str, value: object) -> np.ndarray:
    """Return an array, or a list of numbers, as a numpy array.

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


def _describe(array: np.ndarray) -> str:
    if array.ndim == 0:
        return f"{short(array.item())}, no list"
    return f"an array of shape {array.shape}"


def pad_rows(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Pad rows to int32 ``[B, width]``, -1 after the end of each."""
    out = np.full((len(rows), width), PAD, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
