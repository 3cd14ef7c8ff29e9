"""Bytes as people write them."""

from __future__ import annotations

import re

from jkv._text import brief

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}


def parse_bytes(value: object, what: str = "device_memory") -> int:
    """Parse bytes, a number or a text: "80GB" is 80 * 1000**3, "24GiB" 24 * 1024**3.

    Raises:
        ValueError: anything else, or less than 1.
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
    return count
