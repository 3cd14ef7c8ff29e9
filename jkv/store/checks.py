"""Checks of arguments: what was got, what was expected, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsFloat, SupportsIndex

from jkv._checks import check_text
from jkv._text import brief

Key = str
Seconds = int | float | None
Limit = int | None
Fingerprint = bytes | None

UNSET: Any = object()  # where None is a value
LONGEST = 1e15  # seconds, 30 million years: what is longer would spoil sums


def check_bytes(name: str, value: object) -> bytes:
    """Refuse anything but bytes.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, bytes):
        raise TypeError(
            f"{name} got {brief(value)}; expected bytes, such as those of jkv's fingerprint"
        )
    return value


def check_count(name: str, value: object, least: int = 0) -> int:
    """Refuse anything but a whole number from `least` on.

    Raises:
        TypeError: no whole number.
        ValueError: a smaller one.
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} got {brief(value)}; expected a whole number from {least}")
    if value.__index__() < least:
        raise ValueError(f"{name} got {brief(value)}; expected a whole number from {least}")
    return value.__index__()


def check_limit(name: str, value: object) -> int | None:
    """Refuse anything but a whole number from 0, or None for no limit.

    Raises:
        TypeError: no whole number.
        ValueError: one below 0.
    """
    return None if value is None else check_count(name, value)


def check_seconds(
    name: str, value: object, *, positive: bool = False, may_be_infinite: bool = False
) -> int | float | None:
    """Refuse anything but a number of seconds, or None.

    Raises:
        TypeError: no number.
        ValueError: NaN, a number below 0 or above 1e15, infinity or zero where they make no sense.
    """
    if value is None:
        return None
    expected = f"expected seconds {'above' if positive else 'from'} 0, or None"
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} got {brief(value)}; {expected}")
    number = value if isinstance(value, int | float) else float(value)
    short = number <= LONGEST or (may_be_infinite and number == math.inf)
    if not (short and (number > 0 if positive else number >= 0)):
        raise ValueError(f"{name} got {brief(value)}; {expected}")
    return number


def check_keys(keys: Iterable[str]) -> list[Any]:
    """Return several keys as a list; each is checked where it becomes a name.

    Raises:
        TypeError: one text, whose characters would be keys.
    """
    if isinstance(keys, str):
        raise TypeError(
            f"keys got the text {brief(keys)}; expected several, such as [{brief(keys)}]"
        )
    return list(keys)


def check_functions(**functions: object) -> None:
    """Refuse anything but functions.

    Raises:
        TypeError: one of them is none.
    """
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} got {brief(function)}; expected a function")


def check_tenants(limits: object) -> int | dict[str, int] | None:
    """Refuse anything but a limit, or limits by tenant.

    Raises:
        TypeError: it is neither.
        ValueError: a limit below 0.
    """
    if not isinstance(limits, Mapping):
        return check_limit("tenant_bytes", limits)
    for tenant, limit in limits.items():
        check_text("tenant_bytes", tenant)
        check_limit(f"tenant_bytes of {brief(tenant)}", limit)
    return dict(limits)


def check_forms(forms: object, tiers: Sequence[str], *, known: bool) -> dict[str, str]:
    """Return the forms by name of tier.

    Args:
        forms: what was given.
        tiers: names.
        known: whether jkv converts to them itself.

    Raises:
        TypeError: no mapping.
        ValueError: a tier that is none, or a form that jkv does not know.
    """
    if forms is None:
        return {}
    if not isinstance(forms, Mapping):
        raise TypeError(f"forms got {brief(forms)}; expected {{'disk': 'int8'}} or the like")
    if unknown := set(forms) - set(tiers):
        raise ValueError(f"forms got {sorted(unknown)}; expected names of tiers: {list(tiers)}")
    if known and (unknown := set(forms.values()) - {"exact", "int8", "int4"}):
        raise ValueError(f"forms got {sorted(unknown)}; expected int8 or int4, or convert=")
    return dict(forms)
