"""Kinds of cache as text, for command lines: one grammar, one table.

    SPEC      = NAME [ ":" ARGUMENT { "," ARGUMENT } ]
    ARGUMENT  = VALUE | NAME "=" VALUE
    VALUE     = number | word | SPEC | "(" SPEC ")"

Values without a name come in the order of `usage`. A kind within a kind needs brackets only where
it has several arguments of its own: ``near_far:recent=64,far=(int4:group=32,key_axis=token)``.
"""

from __future__ import annotations

import difflib
import importlib
import re
from typing import Any

from jkv._text import brief
from jkv.cache.form import Argument, Form
from jkv.cache.protocol import CacheKind

# The files of kinds, in the order in which people are shown them. A new kind is a file with
# `FORMS`, and a line here.
FILES = (
    "dense",
    "none",
    "window",
    "quantized",
    "paged",
    "evicting",
    "pyramid",
    "per_layer",
)
FORMS: dict[str, Form] = {
    name: form
    for file in FILES
    for name, form in importlib.import_module(f"jkv.cache.{file}").FORMS.items()
}
"""The texts of kinds: the `Form` of each name."""


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
    """Return how a kind is written, if it is one of those listed; else what Python shows.

    Example:
        >>> jkv.cache.spec.text(jkv.window(1020, sinks=4))
        'window:1020,sinks=4'
    """
    return next((t for t in examples() if parse(t) == kind), repr(kind))


def examples() -> list[str]:
    """Return examples of every kind, in the order of the table.

    Example:
        >>> jkv.cache.spec.examples()[:3]
        ['dense', 'none', 'window:1024']
    """
    return [name + rest for name, form in FORMS.items() for rest in form.examples]


def usage(name: str) -> str:
    """Return how a kind is written, optional parts in brackets.

    Example:
        >>> jkv.cache.spec.usage("dense")
        'dense[:grow]'
    """
    form = FORMS[name]
    shown = name
    for i, (key, reader) in enumerate(form.arguments.items()):
        part = reader.shown if i < form.bare else f"{key}={reader.shown}"
        part = (":" if i == 0 else ",") + part
        shown += part if i < form.needed else f"[{part}]"
    return shown


def grammar() -> str:
    """Return how all kinds are written.

    Example:
        >>> "int4" in jkv.cache.spec.grammar()
        True
    """
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


__all__ = ["FORMS", "Argument", "Form", "examples", "grammar", "parse", "text", "usage"]


def __dir__() -> list[str]:
    return sorted(__all__)
