"""How large the values of a chat template are, and how large those that it makes can become."""

from __future__ import annotations

import sys
from collections.abc import Callable, Set, ValuesView
from typing import Any, NamedTuple, TypeAlias

from jinja2 import utils
from jinja2.exceptions import SecurityError

Value: TypeAlias = Any  # of a template: whatever its author computes

_DEEPEST = 100  # containers in containers; to hash a tuple of 100,000 levels ends the process


class Weight(NamedTuple):
    """The size of a value with all that it holds.

    Attributes:
        chars: of its text, roughly.
        depth: of containers in containers.
    """

    chars: int
    depth: int


def weigh(value: Value, charge: Callable[[int], None]) -> Weight:
    """Measure a value. Parts of two containers count twice, as they do in their text.

    Args:
        value: of a template.
        charge: called with the number of parts that are looked at next.

    Raises:
        SecurityError: containers in containers, too deep.
    """
    level, chars = [value], 0
    for depth in range(_DEEPEST):
        below: list[Value] = []
        for item in level:
            chars += 4
            if isinstance(item, str):
                chars += len(item)
                charge(len(item) >> 8)
            elif isinstance(item, int):
                chars += item.bit_length() // 3
            elif isinstance(item, dict | utils.Namespace):
                parts = item if isinstance(item, dict) else _attributes(item)
                charge(2 * len(parts))
                below += parts.keys()
                below += parts.values()
            elif isinstance(item, list | tuple | Set | ValuesView):
                charge(len(item))
                below += item
            else:
                chars += 40
                if isinstance(item, range):
                    charge(len(item) >> 3)  # a search in it may look at each
        if not below:
            return Weight(chars, depth)
        level = below
    raise SecurityError(f"it nests values deeper than {_DEEPEST}")


def _attributes(namespace: utils.Namespace) -> dict[str, Value]:
    return object.__getattribute__(namespace, "_Namespace__attrs")


def shallow_bytes(value: Value) -> int:
    """Return the bytes of a value without its parts."""
    if isinstance(value, str | list | tuple | dict | set):
        return sys.getsizeof(value)
    return 40


# What a method or a filter can make at most, in characters, by its own arguments. `n` counts the
# characters of the value and the arguments together.


def _pad_size(n: int, value: Value, width: int = 80, *_: Value) -> int:
    return n + max(width, 0)


def _replace_size(n: int, value: Value, old: Value, new: Value, count: Value = None) -> int:
    found = value.count(old) if isinstance(value, str) and isinstance(old, str) and old else n
    return n + found * len(str(new))


def join_size(n: int, value: Value, d: Value = "", attribute: Value = None) -> int:
    """Characters of items with `d` between them."""
    return n + len(value) * len(str(d)) if hasattr(value, "__len__") else n


def _indent_size(
    n: int, value: Value, width: Value = 4, first: Value = False, blank: Value = False
) -> int:
    return n * (1 + (len(width) if isinstance(width, str) else max(width, 0)))


def _wrap_size(
    n: int,
    value: Value,
    width: Value = 79,
    break_long_words: Value = True,
    wrapstring: Value = None,
    break_on_hyphens: Value = True,
) -> int:
    return n * (2 + len(wrapstring or ""))


def _batch_size(n: int, value: Value, linecount: int, fill_with: Value = None) -> int:
    return 8 * n + (0 if fill_with is None else 8 * max(linecount, 0))


GROWTH: dict[str, Callable[..., int]] = {
    "center": _pad_size,
    "ljust": _pad_size,
    "rjust": _pad_size,
    "zfill": _pad_size,
    "expandtabs": lambda n, value, tabsize=8: n + value.count("\t") * max(tabsize, 0),
    "replace": _replace_size,
    "indent": _indent_size,
    "wordwrap": _wrap_size,
    "batch": _batch_size,
    "split": lambda n, value, sep=None, maxsplit=-1: (
        16 * n if sep is None else n + 16 * value.count(sep)
    ),
    "rsplit": lambda n, value, sep=None, maxsplit=-1: (
        16 * n if sep is None else n + 16 * value.count(sep)
    ),
    "splitlines": lambda n, *_: 16 * n,
    "wordcount": lambda n, *_: 16 * n,
    "title": lambda n, *_: 16 * n,
    "list": lambda n, value: 4 * len(value) if hasattr(value, "__len__") else 0,
    "escape": lambda n, *_: 6 * n,
    "e": lambda n, *_: 6 * n,
    "forceescape": lambda n, *_: 6 * n,
    "urlencode": lambda n, *_: 12 * n,
}


def json_padding(
    ensure_ascii: Value = False,
    indent: Value = None,
    separators: Value = None,
    sort_keys: Value = False,
) -> int:
    """Characters that `tojson` may add per level and item."""
    added = len(indent) if isinstance(indent, str) else max(indent or 0, 0)
    return added + sum(map(len, separators or ()))
