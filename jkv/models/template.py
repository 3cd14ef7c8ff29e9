"""Chat templates: a checkpoint's own program that writes messages as text, run in a sandbox."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

from jkv.errors import UnsupportedError

# What a template can raise by computing with the wrong things, besides jinja2's own errors.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
_LONGEST = 1_000_000  # of what a template repeats, in items


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, without the operators that fill the memory in one step."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                repeats = isinstance(many, str | list | tuple) and isinstance(times, int)
                if repeats and len(many) * times > _LONGEST:
                    raise jinja2.exceptions.SecurityError("a repetition that is too long")
        elif abs(right) > 64 or abs(left) > 1e6:
            raise jinja2.exceptions.SecurityError("a power that is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """The tags ``{% generation %}`` around what the assistant says: for training, no text."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's `namespace`, which would store names that lead into Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        for name in dict(*rest, **kwargs):
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace with the name {name!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict` as a function: the class itself has attributes to climb."""
    return dict(*args, **kwargs)


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    sandbox = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
        "dict": _make_dict,
        "namespace": _Namespace,
    }
    return sandbox.from_string(source)


def render(source: str, messages: Any, **values: Any) -> str:
    """The text of a conversation.

    Args:
        source: the template.
        messages: a list of mappings, each with a "role" and mostly a "content".
        values: what else the template sees.

    Raises:
        ValueError: messages of another form.
        UnsupportedError: the template refuses them, or does not work.
    """
    plain = [_message(i, message) for i, message in enumerate(_list(messages))]
    try:
        return _compile(source).render(messages=plain, **{k: _plain(v) for k, v in values.items()})
    except _FAILURES as error:
        raise UnsupportedError(
            f"the checkpoint's chat template cannot write these messages: {error}"
        ) from error


def _list(messages: Any) -> Sequence[Any]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            f"got {messages!r} as messages; expected a list such as "
            "[{'role': 'user', 'content': 'Hello'}]"
        )
    return messages


def _message(i: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {i} is {message!r}; expected {{'role': ..., 'content': ...}}")
    return _plain(message)


def _plain(value: Any) -> Any:
    """JSON's types and nothing else: the methods of other objects are not the sandbox's."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # the base's method: a subclass (an enum) may write otherwise
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise ValueError(f"a message holds {type(value).__name__}; expected what JSON can hold")
