"""What a generation returns: the tokens, and the cache that the next one goes on from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from jkv.cache.base import Cache
from jkv.decoding.arguments import Model, TokenizerLike
from jkv.decoding.detokenize import new_text
from jkv.errors import UnsupportedError
from jkv.models.config import Config
from jkv.models.weights import Weights


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """What was generated, and the cache to go on from.

    Attributes:
        tokens: ``[B, T]`` int32, the new tokens, -1 after a row's end.
        lengths: ``[B]``, how many new tokens each row has, its stop token included.
        finish_reasons: per row "stop" or "length".
        logprobs: ``[B, T]`` float32 natural logarithms under the model itself, before any sampling
            transform, 0 after a row's end; None unless asked for.
        top_tokens: ``[B, T, k]`` int32, the k likeliest in the place of each token, the likeliest
            first, -1 after a row's end; None unless asked for with `top_logprobs`.
        top_logprobs: ``[B, T, k]`` float32, theirs, as `logprobs`.
        cache: of all tokens but each row's last, which has no keys and values yet.
        history: per row all tokens, prompts included.
        prefill_seconds: until the first token was read.
        decode_seconds: from there to the last.
        passes: ``[B]``, passes of the model after the prefill in which each row took part: as many
            as its new tokens but one, fewer where a draft was right.
        reused: ``[B]``, tokens of each prompt that a store had.

    Example:
        >>> out = jkv.generate(lm, ["ROMEO:"], max_new_tokens=8)
        >>> out.tokens.shape, out.finish_reasons, len(out.texts)
        ((1, 8), ('length',), 1)
    """

    tokens: np.ndarray
    lengths: np.ndarray
    finish_reasons: tuple[str, ...]
    logprobs: np.ndarray | None
    cache: Cache
    history: tuple[np.ndarray, ...]
    prefill_seconds: float
    decode_seconds: float
    config: Config | None = None  # of the model, so that another one does not resume with its keys
    passes: np.ndarray | None = None
    reused: np.ndarray | None = None
    tokenizer: TokenizerLike | None = None  # for `texts`; None where generation had none
    top_tokens: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    weights: Weights | None = None  # with which its cache was computed; None: unknown

    @property
    def texts(self) -> tuple[str, ...]:
        """New text of each row: what its new tokens add to the text of those before.

        The text of the prompt (of all earlier turns, for a resumed row) and this make the decoded
        text of `history`, special tokens left out; the blocks of a stream join to it. With
        SentencePiece it begins with the space that the new tokens decoded alone would lose. A
        character of which the prompt had only the first bytes stands here as a whole.

        Raises:
            UnsupportedError: no tokenizer took part.
        """
        return texts_of(self.tokenizer, self.history, self.lengths)

    @property
    def text(self) -> str:
        """The new text of a result's only row; see `texts`.

        Raises:
            UnsupportedError: no tokenizer took part.
            ValueError: the result has several rows.
        """
        if len(self.history) != 1:
            raise ValueError(
                f"text got a result of {len(self.history)} rows; expected one: use texts, which "
                "has the text of each"
            )
        return self.texts[0]

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per row and pass, those of the prefill left out: above 1 with a good draft."""
        passes = 0 if self.passes is None else int(self.passes.sum())
        return float((self.lengths - 1).sum()) / passes if passes else 1.0

    def save(self, path: str | os.PathLike[str], model: Model | None = None) -> None:
        """Save it with its cache as one file, to go on from in another process.

        The file replaces what was at `path` once it is complete. It is a safetensors file, of
        which `jkv.load_cache` reads the cache alone.

        Args:
            path: of the file.
            model: that generated it; needed only for a result that was pickled, or whose model has
                been deleted.

        Raises:
            ValueError: the model is unknown, and none is given.
            StaleError: a model with other weights.
            UnsupportedError: a dtype, or a kind of cache, that no file can hold.
            OSError: the file cannot be written.

        Example:
            >>> out = jkv.generate(lm, "ROMEO:", max_new_tokens=8)
            >>> out.save("talk.safetensors")
            >>> jkv.load_result("talk.safetensors", lm).text == out.text
            True
        """
        from jkv.decoding.saved import save_result  # it makes results

        save_result(path, self, model)

    def __repr__(self) -> str:
        """Shapes rather than numbers."""
        return (
            f"Result(tokens=int32{list(self.tokens.shape)}, lengths={self.lengths.tolist()}, "
            f"finish_reasons={self.finish_reasons})"
        )


def texts_of(
    tokenizer: TokenizerLike | None, rows: Sequence[np.ndarray], lengths: Sequence[int] | np.ndarray
) -> tuple[str, ...]:
    """Return the new text of rows whose last `lengths` tokens are new; see `Result.texts`.

    Raises:
        UnsupportedError: there is no tokenizer.
    """
    if tokenizer is None:
        raise UnsupportedError(
            "a text needs the tokenizer: pass lm instead of lm.model, or decode the tokens"
        )
    cuts = [len(row) - int(length) for row, length in zip(rows, lengths, strict=True)]
    return tuple(
        new_text(tokenizer, row[:cut], row[cut:]) for row, cut in zip(rows, cuts, strict=True)
    )


# What keys and values depend on, beside the weights; the context may differ.
_IDENTITY = ("family", "vocab", "layers", "width", "heads", "kv_heads", "head_dim", "rope", "dtype")


def differences(old: Config | None, new: Config) -> str:
    """Say in what two configurations differ as far as a cache is concerned."""
    if old is None:
        return "it does not say of which"
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in _IDENTITY)
    return ", ".join(f"{name} {a!r} rather than {b!r}" for name, a, b in pairs if a != b)
