"""Bytes as people write them, and as they read them."""

from __future__ import annotations

import re

from jkv._text import brief, plural

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}


def parse_bytes(value: object, what: str = "device_memory", least: int = 1) -> int:
    """Parse bytes, a number or a text: "80GB" is 80 * 1000**3, "24GiB" 24 * 1024**3.

    Args:
        value: what was given.
        what: its name, for the message.
        least: bytes below which a number is one whose unit was forgotten.

    Raises:
        ValueError: anything else, or less than 1, or than `least`.
    """
    match = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w*?)\s*", value) if isinstance(value, str) else None
    )
    count = 0
    if match is not None and match[2].upper() in _UNITS:
        count = int(float(match[1]) * _UNITS[match[2].upper()])
    elif isinstance(value, int) and not isinstance(value, bool):
        count = value
    if count < 1:
        raise ValueError(
            f"{what} got {brief(value)}; expected a number of bytes, or a text such as '80GB' "
            "or '24GiB'"
        )
    if count < least:
        bare = str(value).strip()
        meant = f"{bare}GB" if bare.isdecimal() and count < 1000 else "24GB"
        raise ValueError(
            f"{what} got {brief(value)}, which is {plural(count, 'byte')}; expected at least "
            f"{least:,}: write {meant}"
        )
    return count


def is_decimal(count: int) -> bool:
    """Return whether a number of bytes is whole in MB and not in MiB, as "24GB" is."""
    return count % 1000**2 == 0 and count % 1024**2 != 0


def size(count: int, *, decimal: bool = False) -> str:
    """Write a number of bytes for people, in KiB, MiB and GiB, or in KB, MB and GB."""
    base, suffix = (1000, "B") if decimal else (1024, "iB")
    if count < base:
        return plural(count, "byte")
    value, letters = count / base, "KMGT"
    while value >= base and len(letters) > 1:
        value, letters = value / base, letters[1:]
    return f"{value:.1f} {letters[0]}{suffix}"
