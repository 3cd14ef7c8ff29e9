"""How to generate: the keywords of `generate` and `stream` as one value, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jkv._text import brief
from jkv.cache.base import Cache
from jkv.cache.protocol import as_kind, is_kind, own_kind_hint
from jkv.decoding.arguments import CacheLike, Progress, Sampler, Stop
from jkv.decoding.draft import Draft
from jkv.decoding.request import integer
from jkv.decoding.result import Result

if TYPE_CHECKING:
    from jkv.store import Store


@dataclasses.dataclass(frozen=True)
class Options:
    """How to generate, see `jkv.generate`; unchecked until a `Run` says what is wrong."""

    max_new_tokens: int
    cache: CacheLike | None = None
    sampler: Sampler | None = None
    stop: Stop | None = None
    key: jax.Array | None = None
    return_logprobs: bool = False
    top_logprobs: int = 0
    resume: Result | None = None
    slots: int | None = None
    block: int = 32
    prefill_chunk: int = 256
    progress: Progress | None = None
    samples: int = 1
    draft: Draft | None = None
    store: Store | None = None
    sequence_ids: Sequence[str] | None = None
    tenant: str = ""


def check_plain(options: Options) -> None:
    """Refuse what would only be noticed in the middle of the work, or never.

    Raises:
        TypeError: something that is no function or no bool.
    """
    if options.progress is not None and not callable(options.progress):
        raise TypeError(
            f"progress got {brief(options.progress)}; expected a function of (done, total) tokens"
        )
    if not isinstance(options.return_logprobs, bool | np.bool_):
        raise TypeError(
            f"return_logprobs got {brief(options.return_logprobs)}; expected True or False"
        )


def checked_top(value: Any, vocab: int) -> int:
    """How many alternatives of each token are wanted.

    Raises:
        ValueError: no integer from 0 to the vocabulary.
    """
    top = integer("top_logprobs", value, 0)
    if top > vocab:
        raise ValueError(f"top_logprobs got {top}; expected at most {vocab}, the vocabulary")
    return top


def checked_kind(kind: Any) -> Any:
    """Return the kind, or the one that a text names.

    Raises:
        TypeError: it does not say how tokens are kept.
        ValueError: a text that names no kind.
    """
    kind = as_kind(kind)
    if isinstance(kind, Cache):
        raise TypeError(
            f"cache got a {type(kind).__name__} that already holds tokens; expected a kind such as "
            "jkv.dense(). To go on from an earlier result pass it as resume="
        )
    if not is_kind(kind):
        raise TypeError(
            f"cache got {brief(kind)}; expected a kind such as jkv.dense(), or a text such as "
            f"'int4'{own_kind_hint(kind)}"
        )
    return kind
