"""Kinds of cache as text, for command lines: a name, or a name with arguments in brackets."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

from jkv.cache.dense import dense
from jkv.cache.none import none

# A new kind is one line here.
_KINDS: dict[str, Callable[..., Any]] = {"dense": dense, "none": none}

_SPEC = re.compile(r"(\w+)\s*(?:\((.*)\))?", re.DOTALL)


def parse(text: str) -> Any:
    """The kind that a text names, such as "dense" or "window(1024, sinks=4)".

    Arguments are numbers, True, False, None or quoted texts, by position or by name.

    Raises:
        ValueError: a name that does not exist, or arguments that it does not take.
    """
    match = _SPEC.fullmatch(text.strip())
    if match is None or match[1] not in _KINDS:
        raise ValueError(f"cache got {text!r}; expected one of {', '.join(map(usage, _KINDS))}")
    positional, named = _arguments(text, match[2] or "")
    make = _KINDS[match[1]]
    try:
        inspect.signature(make).bind(*positional, **named)
    except TypeError as error:
        raise ValueError(f"cache got {text!r} ({error}); expected {usage(match[1])}") from None
    return make(*positional, **named)


def usage(name: str) -> str:
    """How a kind is written: its name, and its arguments where it takes any."""
    parameters = inspect.signature(_KINDS[name]).parameters.values()
    written = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    return f"{name}({', '.join(written)})" if written else name


def _arguments(text: str, inside: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        # Parsed as a call and never run: each argument must be a literal.
        call = ast.parse(f"f({inside})", mode="eval").body
        if not isinstance(call, ast.Call) or any(k.arg is None for k in call.keywords):
            raise ValueError
        positional = [ast.literal_eval(a) for a in call.args]
        named = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"cache got {text!r}; expected arguments such as name(1024, size=4)"
        ) from None
    return positional, named
