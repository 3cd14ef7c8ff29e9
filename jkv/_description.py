"""Values as words of JSON and arrays by name, and back.

A cache is stored so, in a store and in a file. No code is ever read: a name in the words can only
be that of a frozen dataclass or of a score of this library, or of what the reader has named.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jkv._stored_names import present_name, written_fields, written_name
from jkv._text import brief
from jkv.errors import UnsupportedError

Words = Any  # what JSON has
_HOMES = ("jkv.cache.", "jkv.ops.", "jkv.models.config")  # of what caches are made of
_SCORES = "jkv.cache.scores:"


def describe(value: object, path: str, arrays: dict[str, Any], *, own: bool = False) -> Words:
    """Convert a value to words of JSON; arrays go to `arrays` under their paths.

    Args:
        value: arrays, numbers, texts, and tuples and frozen dataclasses of them.
        path: of the value; those of its parts begin with it.
        arrays: gets the arrays.
        own: whether classes and functions of other modules have a name too.

    Raises:
        UnsupportedError: something that has no words, or, unless `own`, is not of this library.
    """
    if isinstance(value, jax.Array | np.ndarray):
        arrays[path] = value
        return {"array": path}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return {
            "tuple": [describe(v, _under(path, i), arrays, own=own) for i, v in enumerate(value)]
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            written: describe(getattr(value, name), _under(path, written), arrays, own=own)
            for name, written in written_fields(type(value))
        }
        return {"class": _name(type(value), own), "fields": fields}
    if callable(value):
        return {"function": _name(value, own)}
    raise UnsupportedError(f"{value!r:.60} of a cache cannot be stored")


def rebuild(
    words: Words, arrays: Mapping[str, Any], known: Iterable[type | Callable[..., Any]] = ()
) -> Any:
    """Make the value that `describe` described.

    Args:
        words: from anywhere; what they lead to is limited to what caches are made of.
        arrays: by their paths.
        known: classes and functions of other modules that may be named.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, ImportError: the words describe nothing.
    """
    return _rebuild(words, arrays, {_name(what, True): what for what in known})


def _rebuild(words: Words, arrays: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    if not isinstance(words, dict):
        return words
    if words.keys() == {"array"}:
        return arrays[words["array"]]
    if words.keys() == {"tuple"}:
        return tuple(_rebuild(part, arrays, known) for part in words["tuple"])
    if words.keys() == {"function"}:
        name = words["function"]
        found = known[name] if name in known else _find(name)
        if not callable(found) or not (name in known or name.startswith(_SCORES)):
            raise ValueError(f"{brief(name)} is no score")
        return found
    if words.keys() != {"class", "fields"}:
        raise ValueError(f"{brief(words)} is nothing that a cache is made of")
    name = words["class"]
    cls = known[name] if name in known else _find(name)
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        raise ValueError(f"{brief(name)} is no dataclass")
    fields = dict(written_fields(cls))
    if set(words["fields"]) != set(fields.values()):
        raise ValueError(f"{name} has other fields than {brief(sorted(words['fields']))}")
    return cls(
        **{
            field: _rebuild(words["fields"][written], arrays, known)
            for field, written in fields.items()
        }
    )


def names_in(words: Words, key: str) -> Iterator[str]:
    """Yield the names in words: "array" those of arrays, "class", "function" or "file" likewise."""
    if isinstance(words, dict):
        if key in words:
            yield words[key]
        for part in (*words.get("tuple", ()), *words.get("fields", {}).values()):
            yield from names_in(part, key)


def is_own(name: str) -> bool:
    """Return whether a name of words is of another module than this library's."""
    return not name.startswith("jkv.")


def _under(path: str, name: str | int) -> str:
    return f"{path}.{name}" if path else str(name)


def _name(what: Any, own: bool) -> str:
    """Return where something is, by the name that words know it by."""
    module, name = getattr(what, "__module__", ""), getattr(what, "__qualname__", "")
    if own and name and "<" not in name and not module.startswith("jkv."):
        return f"{module}:{name}"
    if not module.startswith("jkv.") or "." in name or "<" in name:
        raise UnsupportedError(
            f"a cache with {what!r:.80} cannot be stored: expected kinds and scores "
            + ("that have a name in their module" if own else "of jkv")
            + ", which another process has too"
        )
    return written_name(what)


def _find(name: str) -> Any:
    module, _, attribute = present_name(name).partition(":")
    if not module.startswith(_HOMES) or attribute.startswith("_"):
        raise ValueError(f"{brief(name)} is nothing that caches are made of")
    return getattr(importlib.import_module(module), attribute)
