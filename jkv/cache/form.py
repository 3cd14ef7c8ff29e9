"""How a kind is written as text: its name, its arguments, and what reads them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from jkv.cache.protocol import CacheKind


@dataclasses.dataclass(frozen=True)
class Argument:
    """How a value is written, and what it stands for.

    Example:
        >>> argument = jkv.cache.spec.FORMS["window"].arguments["sinks"]
        >>> argument.shown, argument.read("4")
        ('N', 4)
    """

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

    Example:
        >>> jkv.cache.spec.FORMS["dense"].make()
        DenseKind(grows=False)
    """

    make: Callable[..., CacheKind]
    says: str
    examples: tuple[str, ...] = ("",)
    arguments: Mapping[str, Argument] = dataclasses.field(default_factory=dict)
    bare: int = 0
    needed: int = 0


def one_of(**meanings: object) -> Argument:
    """Read one of a few words."""

    def read(text: str) -> object:
        if text not in meanings:
            raise ValueError
        return meanings[text]

    return Argument("|".join(meanings), read)


def number(shown: str, pattern: str, make: Callable[[str], object]) -> Argument:
    """Read what matches a pattern."""

    def read(text: str) -> object:
        if re.fullmatch(pattern, text, re.ASCII) is None:
            raise ValueError
        return make(text)

    return Argument(shown, read)


def _inner(text: str) -> CacheKind:
    from jkv.cache.spec import parse  # whose table has every kind

    return parse(text[1:-1] if text.startswith("(") and text.endswith(")") else text)


COUNT = number("N", r"\d+", int)
REAL = number("X", r"\d*\.?\d+", float)
KIND = Argument("SPEC", _inner)
