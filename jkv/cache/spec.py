"""Kinds of cache as text, for command lines: one grammar, one table.

    SPEC      = NAME [ ":" ARGUMENT { "," ARGUMENT } ]
    ARGUMENT  = VALUE | NAME "=" VALUE
    VALUE     = number | word | SPEC | "(" SPEC ")"

Values without a name come in the order of `usage`. A kind within a kind needs brackets only where
it has several arguments of its own: ``near_far:recent=64,far=(int4:group=32,key_axis=token)``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from jkv._text import brief
from jkv.cache import scores
from jkv.cache.dense import dense
from jkv.cache.evicting import evicting
from jkv.cache.none import none
from jkv.cache.paged import paged
from jkv.cache.per_layer import per_layer
from jkv.cache.protocol import CacheKind
from jkv.cache.pyramid import pyramid
from jkv.cache.quantized import fp8, near_far, quantized, sparse
from jkv.cache.window import window


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a value is written, and what it stands for."""

    shown: str
    read: Callable[[str], object]  # raises ValueError where it is not written so


@dataclasses.dataclass(frozen=True)
class Form:
    """A name, what it makes, and what may be said about it.

    Attributes:
        make: gets the arguments by name.
        says: one line for people.
        examples: after the name, as lists of kinds show them.
        arguments: by name, those that need none first.
        bare: how many need no name.
        needed: how many of those must be there.
    """

    make: Callable[..., CacheKind]
    says: str
    examples: tuple[str, ...] = ("",)
    arguments: Mapping[str, Reader] = dataclasses.field(default_factory=dict)
    bare: int = 0
    needed: int = 0


def _one_of(**meanings: object) -> Reader:
    """Read one of a few words."""

    def read(text: str) -> object:
        if text not in meanings:
            raise ValueError
        return meanings[text]

    return Reader("|".join(meanings), read)


def _number(shown: str, pattern: str, make: Callable[[str], object]) -> Reader:
    def read(text: str) -> object:
        if re.fullmatch(pattern, text, re.ASCII) is None:
            raise ValueError
        return make(text)

    return Reader(shown, read)


def _inner(text: str) -> CacheKind:
    return parse(text[1:-1] if text.startswith("(") and text.endswith(")") else text)


_COUNT = _number("N", r"\d+", int)
_REAL = _number("X", r"\d*\.?\d+", float)
_KIND = Reader("SPEC", _inner)
_POSITIONS = _one_of(cache="cache", text="text", clamped="clamped")
_BITS = _number("kNvN", r"k\dv\d", lambda text: (int(text[1]), int(text[3])))
_ROUNDED = {
    "residual": _COUNT,
    "group": _COUNT,
    "key_axis": _one_of(channel="channel", token="token"),
}
_KEPT = {
    "score": _one_of(
        h2o=scores.h2o,
        tova=scores.tova,
        snapkv=scores.snapkv(),
        key_norm=scores.key_norm,
        recency=scores.recency,
    ),
    "recent": _COUNT,
    "sinks": _COUNT,
}


def _keys_and_values(bits: tuple[int, int], **more: Any) -> CacheKind:
    return quantized(key_bits=bits[0], value_bits=bits[1], **more)


def _rounded(bits: int, says: str) -> Form:
    return Form(functools.partial(quantized, bits), says, arguments=_ROUNDED)


def _in_pages(codec: str | None = None, **more: Any) -> CacheKind:
    bits = {"int8": 8, "int4": 4, "int2": 2}.get(codec or "")
    return paged(bits=bits, codec=fp8() if codec == "fp8" else None, **more)


# A new kind is one entry here.
FORMS: dict[str, Form] = {
    "dense": Form(
        dense,
        "every token as the model makes it; with grow, in a buffer that doubles when it is full",
        arguments={"grow": _one_of(grow=True)},
        bare=1,
    ),
    "none": Form(none, "nothing: the whole prefix is computed again at each step"),
    "window": Form(
        window,
        "the last N tokens, and the first ones if sinks say so; without N the model's own windows",
        examples=(":1024", ":1020,sinks=4"),
        arguments={"size": _COUNT, "sinks": _COUNT, "positions": _POSITIONS},
        bare=1,
    ),
    "int8": _rounded(8, "all tokens in 8 bits, a step and a zero point for each"),
    "int4": _rounded(4, "4 bits, keys by channel and values by token; the newest 128 stay exact"),
    "int2": _rounded(2, "2 bits, keys by channel and values by token; the newest 128 stay exact"),
    "kv": Form(
        _keys_and_values,
        "keys and values in different numbers of bits",
        examples=(":k8v4",),
        arguments={"bits": _BITS, **_ROUNDED},
        bare=1,
        needed=1,
    ),
    "fp8": Form(
        fp8, "all tokens as 8-bit floats, a scale for each", arguments={"residual": _COUNT}
    ),
    "near_far": Form(
        near_far,
        "the newest tokens exact, those before them rounded as in another kind",
        examples=(":recent=1024,far=int4",),
        arguments={"far": _KIND, "recent": _COUNT},
        needed=1,
    ),
    "sparse": Form(
        sparse,
        "the largest channels of each token, as a share of all; rounded too, if wanted",
        examples=(":0.25", ":0.25,int8"),
        arguments={"keep": _REAL, "bits": _one_of(int8=8, int4=4), "residual": _COUNT},
        bare=2,
    ),
    "paged": Form(
        _in_pages,
        "every token, in pages of N that rows share and copy on write; rounded, if wanted",
        examples=("", ":16,int8"),
        arguments={
            "page": _COUNT,
            "codec": _one_of(int8="int8", int4="int4", int2="int2", fp8="fp8"),
            "pages": _COUNT,
        },
        bare=2,
    ),
    "evict": Form(
        evicting,
        "the best N tokens of each head by a score",
        examples=(":1024,score=h2o",),
        arguments={"budget": _COUNT, **_KEPT},
        bare=1,
        needed=1,
    ),
    "pyramid": Form(
        pyramid,
        "N tokens of each head on average, more in the first layers than in the last",
        examples=(":1024",),
        arguments={"budget": _COUNT, "ratio": _REAL, **_KEPT},
        bare=1,
        needed=1,
    ),
    "per_layer": Form(
        per_layer,
        "a kind for all layers but the first and the last ones, which are kept dense or as said",
        examples=(":int4,first=1,last=1",),
        arguments={"kinds": _KIND, "first": _COUNT, "last": _COUNT, "exact": _KIND},
        bare=1,
        needed=1,
    ),
}


def parse(text: str) -> CacheKind:
    """Make the kind of cache that a text names; wherever a kind is taken, its text is too.

    Args:
        text: a name and its arguments; `jkv caches` lists them all.

    Raises:
        TypeError: no text.
        ValueError: a name that does not exist, or arguments that it does not take.

    Example:
        >>> jkv.parse("window:252,sinks=4") == jkv.window(252, sinks=4)
        True
    """
    if not isinstance(text, str):
        raise TypeError(f"parse got {brief(text)}; expected a text such as 'int4'")
    name, colon, rest = text.strip().partition(":")
    form = FORMS.get(name)
    if form is None:
        near = difflib.get_close_matches(name.strip().lower(), FORMS, n=1)
        hint = f", did you mean {near[0]!r}" if near else ""
        raise ValueError(f"cache got {brief(text)}{hint}; expected {grammar()}")
    arguments: dict[str, Any] = {}
    written = _split_arguments(text, rest) if colon else []
    for i, argument in enumerate(written):
        key, value = _split_name(form, argument, i)
        if key not in form.arguments or key in arguments:
            raise _refused(text, name, argument)
        try:
            arguments[key] = form.arguments[key].read(value)
        except ValueError as error:
            # What a kind within says about itself is told as it is.
            raise error if error.args else _refused(text, name, argument) from None
    if not all(key in arguments for key in list(form.arguments)[: form.needed]):
        raise ValueError(f"cache got {brief(text)}; expected {usage(name)}")
    return form.make(**arguments)


def text(kind: CacheKind) -> str:
    """Return how a kind is written, if it is one of those listed; else what Python shows."""
    return next((t for t in examples() if parse(t) == kind), repr(kind))


def examples() -> list[str]:
    """Return examples of every kind, in the order of the table."""
    return [name + rest for name, form in FORMS.items() for rest in form.examples]


def usage(name: str) -> str:
    """Return how a kind is written, optional parts in brackets."""
    form = FORMS[name]
    shown = name
    for i, (key, reader) in enumerate(form.arguments.items()):
        part = reader.shown if i < form.bare else f"{key}={reader.shown}"
        part = (":" if i == 0 else ",") + part
        shown += part if i < form.needed else f"[{part}]"
    return shown


def grammar() -> str:
    """Return how all kinds are written."""
    return f"{'; '.join(map(usage, FORMS))}. `jkv caches` says what each is"


def _split_name(form: Form, argument: str, index: int) -> tuple[str, str]:
    """Split an argument into name and value; no name where it has none and needs one."""
    match = re.match(r"(\w+)\s*=", argument)
    if match is not None:
        return match[1], argument[match.end() :].strip()
    return (list(form.arguments)[index] if index < form.bare else ""), argument


def _split_arguments(text: str, rest: str) -> list[str]:
    """Split arguments at commas that are in no brackets."""
    parts, depth = [""], 0
    for letter in rest:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth < 0:
            break
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise ValueError(
            f"cache got {brief(text)}; expected as many closing brackets as opening ones"
        )
    return [part.strip() for part in parts]


def _refused(text: str, name: str, argument: str) -> ValueError:
    return ValueError(
        f"cache got {brief(text)}, and in it {brief(argument)}; expected {usage(name)}"
    )


__all__ = ["FORMS", "Form", "Reader", "examples", "grammar", "parse", "text", "usage"]


def __dir__() -> list[str]:
    return sorted(__all__)
