"""What a generation returns: the tokens, and all that the next one goes on from."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jkv.cache.base import Cache


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """What was generated, and the cache to go on from.

    Attributes:
        tokens: ``[B, T]`` int32, the new tokens, -1 after a row's end.
        lengths: ``[B]``, how many new tokens each row has, its stop token included.
        finish_reasons: per row "stop" or "length".
        logprobs: ``[B, T]`` float32 natural logarithms under the model itself, before any sampling
            transform, 0 after a row's end; None unless asked for.
        cache: of all tokens but each row's last, which has no keys and values yet.
        history: per row all tokens, prompts included.
        prefill_seconds: until the first token was read.
        decode_seconds: from there to the last.
        passes: ``[B]``, passes of the model after the prefill in which each row took part: as many
            as its new tokens but one, fewer where a draft was right.
        reused: ``[B]``, tokens of each prompt that a store had.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    finish_reasons: tuple[str, ...]
    logprobs: np.ndarray | None
    cache: Cache
    history: tuple[np.ndarray, ...]
    prefill_seconds: float
    decode_seconds: float
    config: Any = None  # of the model, so that another one does not resume with its keys
    passes: np.ndarray | None = None
    reused: np.ndarray | None = None

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per row and pass, those of the prefill left out: above 1 with a good draft."""
        passes = 0 if self.passes is None else int(self.passes.sum())
        return float((self.lengths - 1).sum()) / passes if passes else 1.0

    def __repr__(self) -> str:
        """Shapes rather than numbers."""
        return (
            f"Result(tokens=int32{list(self.tokens.shape)}, lengths={self.lengths.tolist()}, "
            f"finish_reasons={self.finish_reasons})"
        )


# What keys and values depend on, beside the weights; the context may differ.
_IDENTITY = ("family", "vocab", "layers", "width", "heads", "kv_heads", "head_dim", "rope", "dtype")


def differences(old: Any, new: Any) -> str:
    """In what two configurations differ as far as a cache is concerned."""
    pairs = ((name, getattr(old, name, None), getattr(new, name, None)) for name in _IDENTITY)
    return ", ".join(f"{name} {a!r} rather than {b!r}" for name, a, b in pairs if a != b)
