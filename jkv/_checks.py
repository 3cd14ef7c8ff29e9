"""Checks of what users pass: each message says what was got, what is expected, and where.

A check returns the value in the form that the code behind it works with. `of` names the function
where the argument's own name does not say enough: "slots got 0", but "init_cache got slots=0".
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeGuard, TypeVar

import numpy as np

from jkv._text import brief

T = TypeVar("T", str, int)
P = ParamSpec("P")
R = TypeVar("R")


def renamed(**now: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function with keywords that have other names now, given as ``old="new"``.

    The function's own TypeError would name the old keyword only.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in now.keys() & kwargs.keys():
                raise TypeError(f"{function.__name__} got {name}=, which is now {now[name]}=")
            return function(*args, **kwargs)

        return call

    return decorate


def got(name: str, value: object, of: str = "") -> str:
    """Begin a message: "name got value", or "of got name=value"."""
    return f"{of} got {name}={brief(value)}" if of else f"{name} got {brief(value)}"


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer of Python or numpy, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    """Return whether a value is a real number of Python or numpy, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_integer(
    name: str, value: object, least: int | None, most: int | None = None, *, of: str = ""
) -> int:
    """Return an integer from `least` to `most` as an int.

    Raises:
        ValueError: it is something else.
    """
    if (
        not is_integer(value)
        or (least is not None and value < least)
        or (most is not None and value > most)
    ):
        raise ValueError(f"{got(name, value, of)}; expected an integer{_range(least, most)}")
    return int(value)


def _range(least: int | None, most: int | None) -> str:
    if least is None:
        return "" if most is None else f" of at most {most}"
    return f" of at least {least}" if most is None else f" from {least} to {most}"


def check_number(
    name: str,
    value: object,
    expected: str = "a finite number",
    holds: Callable[[float], bool] = math.isfinite,
    *,
    of: str = "",
) -> float:
    """Return a finite number for which `holds` as a float.

    Args:
        name: of the argument.
        value: as it was passed.
        expected: for the message.
        holds: whether a number is in range.
        of: the function's name.

    Raises:
        ValueError: it is something else.
    """
    if not is_real(value) or not math.isfinite(value) or not holds(float(value)):
        raise ValueError(f"{got(name, value, of)}; expected {expected}")
    return float(value)


def check_flag(name: str, value: object, *, of: str = "") -> bool:
    """Return True or False.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{got(name, value, of)}; expected True or False")
    return bool(value)


def check_text(name: str, value: object, *, of: str = "") -> str:
    """Return a text.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{got(name, value, of)}; expected a text")
    return value


def check_one_of(
    name: str,
    value: object,
    choices: Sequence[T],
    *,
    of: str = "",
    error: type[Exception] = ValueError,
) -> T:
    """Return a value that is one of a few texts or integers.

    Raises:
        ValueError: it is none of them; another `error` where that is given.
    """
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    *first, last = map(repr, choices)
    expected = f"{', '.join(first)} or {last}" if first else last
    raise error(f"{got(name, value, of)}; expected {expected}")


def check_function(name: str, value: object, arguments: str, *, of: str = "") -> None:
    """Refuse what cannot be called; None is fine.

    Args:
        name: of the argument.
        value: as it was passed.
        arguments: with which it is called, for the message.
        of: the function's name.

    Raises:
        TypeError: it cannot be called.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{got(name, value, of)}; expected a function of {arguments}")


def check_token(name: str, value: object, vocab: int | None = None) -> int:
    """Return a token id as an int.

    Args:
        name: of the argument.
        value: as it was passed.
        vocab: V; None where it is not known yet.

    Raises:
        TypeError: it is no integer.
        ValueError: it is outside the vocabulary.
    """
    if not is_integer(value):
        raise TypeError(f"{name} got {brief(value)} as a token; expected an id, an integer")
    if value < 0 or (vocab is not None and value >= vocab):
        ids = "ids of at least 0" if vocab is None else f"ids from 0 to {vocab - 1}"
        raise ValueError(f"{name} got token {int(value)}; expected {ids}")
    return int(value)
