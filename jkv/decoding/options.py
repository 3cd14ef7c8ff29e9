"""How to generate: keywords declared once, for type checkers, `help` and the code behind them.

A function takes ``**options: Unpack[GenerateOptions]`` and makes ``Options(**options)`` of them: a
type checker compares the calls of users with the first, and the first with the second. `keywords`
shows the names and defaults at run time and refuses misspelt ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ParamSpec, Required, TypedDict, TypeVar

import jax

from jkv._checks import check_integer
from jkv._text import brief
from jkv.cache.base import Cache
from jkv.cache.protocol import CacheKind, as_kind, is_kind, own_kind_hint
from jkv.decoding.arguments import CacheLike, Progress, Sampler, Stop
from jkv.decoding.draft import Draft
from jkv.decoding.result import Result

if TYPE_CHECKING:
    from jkv.store import Store


P = ParamSpec("P")
R = TypeVar("R")


class EndOptions(TypedDict, total=False):
    """Where a row ends."""

    max_new_tokens: Required[int]
    stop: Stop | None


class DrawOptions(TypedDict, total=False):
    """How a token is chosen."""

    sampler: Sampler | None
    key: jax.Array | None


class SearchOptions(EndOptions, total=False):
    """Keywords of all functions that continue prompts on the host."""

    cache: CacheLike | None
    resume: Result | None
    slots: int | None
    prefill_chunk: int
    progress: Progress | None


class GenerateOptions(SearchOptions, DrawOptions, total=False):
    """Keywords of `jkv.generate`, which describes them, and of `jkv.stream`."""

    return_logprobs: bool
    top_logprobs: int
    samples: int
    draft: Draft | None
    store: Store | None
    sequence_ids: Sequence[str] | None
    tenant: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The value of the keywords, with their defaults; not checked yet."""

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


def keywords(names: type, defaults: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function that takes ``**options: Unpack[names]``.

    `help` and completion in a notebook show each keyword with its default, and a misspelt one is
    refused with the name that is meant.

    Args:
        names: a `TypedDict` of the keywords.
        defaults: a dataclass with a field for each of them.
    """
    fields = inspect.signature(defaults).parameters
    options = [p for name, p in fields.items() if name in names.__annotations__]

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        first = [p for p in own if p.kind is not p.KEYWORD_ONLY]
        named = [p for p in own if p.kind is p.KEYWORD_ONLY] + options
        named.sort(key=lambda p: p.default is not p.empty)  # required ones first
        required = [p.name for p in options if p.default is p.empty]
        known = [p.name for p in (*first, *named)]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in known:
                    raise TypeError(_unknown(function.__name__, name, known))
            for name in required:
                if name not in kwargs:
                    raise TypeError(f"{function.__name__}() needs the keyword {name}=")
            return function(*args, **kwargs)

        shown = signature.replace(parameters=[*first, *named])
        call.__signature__ = shown  # pyright: ignore[reportAttributeAccessIssue]
        return call

    return decorate


def _unknown(function: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}=?" if close else f"expected one of {', '.join(known)}"
    return f"{function}() got an unexpected keyword argument {name!r}; {hint}"


def check_top_logprobs(value: object, vocab: int) -> int:
    """Return how many alternatives of each token are wanted.

    Raises:
        ValueError: no integer from 0 to the vocabulary.
    """
    top = check_integer("top_logprobs", value, 0)
    if top > vocab:
        raise ValueError(f"top_logprobs got {top}; expected at most {vocab}, the vocabulary")
    return top


def resolve_kind(kind: object) -> CacheKind:
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
