"""Texts for people: short representations of what users give, and counts with their nouns."""

from __future__ import annotations

import reprlib

_TEXT = 200  # characters of a text in an error message: paths are long
_VALUE = 80  # of anything else


class _Short(reprlib.Repr):
    """`repr` of bounded length: arrays by dtype and shape, few items of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 8
        self.maxdeque = self.maxarray = 8
        self.maxstring, self.maxother = _TEXT + 2, _VALUE
        self.maxlong = 40

    def repr1(self, x: object, level: int) -> str:
        shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
        if isinstance(shape, tuple) and dtype is not None and shape:
            return f"{type(x).__name__} {dtype}{list(shape)}"
        if isinstance(x, bytes | bytearray | memoryview) and len(x) > _VALUE:
            return f"{bytes(x[:20])!r}... ({len(x)} bytes)"
        if isinstance(x, str) and len(x) > _TEXT:
            return f"{x[:_VALUE]!r}... ({len(x)} characters)"
        return super().repr1(x, level)


_SHORT = _Short()


def brief(value: object) -> str:
    """Represent a value of the user's in an error message: one line, 250 characters at most.

    Arrays are shown by dtype and shape, long texts and collections by how they begin.

    Example:
        >>> from jkv._text import brief
        >>> brief(np.zeros((1000, 1000)))
        'ndarray float64[1000, 1000]'
    """
    text = " ".join(_SHORT.repr(value).split())
    return text if len(text) <= _TEXT + 50 else f"{text[:_TEXT]}..."


def short(value: object) -> str:
    """Represent a value in at most 40 characters, or by its type where it takes more."""
    shown = repr(value)
    return shown if len(shown) <= 40 else f"a {type(value).__name__}"


def printable(name: str) -> str:
    """Format a name for an error message, without quotes if it is short and printable."""
    return name if len(name) <= 120 and name.isprintable() else brief(name)


def plural(count: int, noun: str, many: str | None = None, *, commas: bool = False) -> str:
    """Count with its noun: "1 token", "2 tokens"; `many` where the plural is no plain s.

    Example:
        >>> from jkv._text import plural
        >>> plural(2000, "entry", "entries", commas=True)
        '2,000 entries'
    """
    return f"{count:{',' if commas else ''}} {noun if count == 1 else many or noun + 's'}"
