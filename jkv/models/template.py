"""Chat templates: a checkpoint's own program that writes messages as text, run in a sandbox."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import inspect
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import numpy as np

from jkv._text import brief
from jkv.errors import UnsupportedError
from jkv.models import tools as _tools
from jkv.models.sandbox import MEMORY, SOURCE_LIMIT, STEPS, MakeDict, Namespace, Sandbox
from jkv.models.template_sizes import weigh

# What a template can raise by computing with the wrong things, besides jinja2's own errors. A
# SyntaxError comes from Python, to which templates are compiled: it nests 20 loops at most.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
# The names of an assistant's reasoning, the one that templates read first.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class _Generation(jinja2.ext.Extension):
    """The tags ``{% generation %}`` around what the assistant says: for training, no text."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: object,
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
    if len(form) > 1000:
        raise ValueError("strftime_now got a format of more than 1000 characters")
    return datetime.datetime.now().strftime(form)


def _environment(**limits: int) -> Sandbox:
    return Sandbox(
        **limits,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        own_filters={"tojson": _to_json},
        own_globals={
            "raise_exception": _raise,
            "strftime_now": _now,
            "dict": MakeDict(),
            "namespace": Namespace,
        },
    )


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> types.CodeType:
    if len(source) > SOURCE_LIMIT:
        raise ValueError(f"it has {len(source)} characters; expected at most {SOURCE_LIMIT}")
    return _environment().compile(source)


def render(
    source: str,
    messages: object,
    budget: tuple[int, int] = (STEPS, MEMORY),
    /,
    *,
    continue_final_message: bool | str = False,
    **values: object,
) -> str:
    """Write a conversation as text.

    Args:
        source: the template.
        messages: mappings, dataclasses or pydantic models, each with a "role" and a "content", or
            with tool calls or reasoning in its place. Fields that are None are left out. "thinking"
            and "reasoning" are other names of "reasoning_content".
        budget: steps and bytes that the template may take; more for longer messages.
        continue_final_message: end within the last message, after its text, for the model to go on
            with; a name is that of the field to go on with, "content" otherwise.
        values: what else the template sees. Functions among `tools` become their schemas.

    Raises:
        ValueError: messages, tools or documents of another form, or a message that cannot be
            continued.
        UnsupportedError: the template refuses the messages, does not work, or takes too much.
    """
    try:
        plain = [_message(i, message) for i, message in enumerate(_check_messages(messages))]
        values = {name: _to_json_types(value) for name, value in _with_schemas(values).items()}
        parts: list[int] = []
        chars = weigh((plain, values), parts.append).chars
    except (RecursionError, jinja2.exceptions.SecurityError) as error:
        raise ValueError("messages, tools or documents are nested too deeply") from error
    field = "content" if continue_final_message is True else continue_final_message
    final = _append_mark(plain, field, source) if field else None
    steps, memory = budget[0] + 1000 * sum(parts), budget[1] + 64 * chars
    sandbox = _environment(steps=steps, memory=memory)
    try:
        code = _compile(source)
        template = jinja2.Template.from_code(sandbox, code, sandbox.make_globals(None))
        text = template.render(messages=plain, **values)
    except _FAILURES as error:
        reason = str(error) or type(error).__name__
        reason = reason if len(reason) <= 2000 else reason[:2000] + "..."
        raise UnsupportedError(
            f"the checkpoint's chat template cannot write these messages: {reason}"
        ) from error
    return text if final is None else _text_before_mark(text, final)


# What the template sees ---------------------------------------------------------------------------


def _check_messages(messages: object) -> Sequence[Any]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            f"got {brief(messages)} as messages; expected a list such as "
            "[{'role': 'user', 'content': 'Hello'}]"
        )
    return messages


def says_something(fields: Mapping[Any, Any]) -> bool:
    """Tell whether a message has a content, calls of tools, or an assistant's reasoning."""
    return any(name in fields for name in ("content", "tool_calls", *_REASONING))


def plain_message(message: object) -> dict[str, Any] | None:
    """Return a message's fields in JSON's types, without those that are None; None for no message.

    Args:
        message: a mapping, a dataclass or a pydantic model with a "role".

    Raises:
        ValueError: no content, a field that JSON cannot hold, or one nested too deeply.
    """
    try:
        fields = _fields(message)
        if fields is None or not isinstance(fields.get("role"), str):
            return None
        if not says_something(fields):
            raise ValueError(
                f"a message is {brief(fields)}, without a content; expected "
                "{'role': ..., 'content': ...}, where tool_calls may stand for the content"
            )
        return {
            _to_json_types(k): _to_json_types(value)
            for k, value in fields.items()
            if value is not None
        }
    except RecursionError as error:
        raise ValueError("a message is nested too deeply") from error


def _message(i: int, message: object) -> dict[str, Any]:
    plain = plain_message(message)
    if plain is None:
        raise ValueError(
            f"message {i} is {brief(message)}; expected {{'role': ..., 'content': ...}}"
        )
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is not None:  # gpt-oss reads "thinking"
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _with_schemas(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with schemas in place of functions."""
    for name in ("tools", "documents"):
        given = values.get(name)
        if given is not None and not isinstance(given, list | tuple):
            raise ValueError(f"{name} got {type(given).__name__}; expected a list")
    changed = dict(values)
    if values.get("tools") is not None:
        changed["tools"] = [_tool(tool) for tool in values["tools"]]
    for document in values.get("documents") or ():
        if not isinstance(document, Mapping):
            raise ValueError(f"documents hold {brief(document)}; expected {{'title': ..., ...}}")
    return changed


def _tool(tool: object) -> Any:
    if inspect.isfunction(tool) or inspect.ismethod(tool):
        return _tools.schema(tool)
    if not isinstance(tool, Mapping):
        raise ValueError(
            f"tools hold {brief(tool)}; expected a JSON schema, or a function with annotations and "
            "a docstring"
        )
    return tool


def _fields(value: object) -> Mapping[Any, Any] | None:
    """Return the fields of a mapping, dataclass or pydantic model, None for anything else."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    dump = getattr(value, "model_dump", None)
    dumped = dump() if callable(dump) and not isinstance(value, type) else None
    return dumped if isinstance(dumped, Mapping) else None


def _to_json_types(value: object) -> Any:
    """Convert to the types of JSON alone: templates must not call methods of other objects."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # the base's method: a subclass (an enum) may write otherwise
    if isinstance(value, np.generic):
        return _to_json_types(value.item())
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, list | tuple):
        items = [_to_json_types(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    fields = _fields(value)
    if fields is not None:
        return {_to_json_types(key): _to_json_types(item) for key, item in fields.items()}
    raise ValueError(f"a message holds {type(value).__name__}; expected what JSON can hold")


# Going on with the last message -------------------------------------------------------------------


def _append_mark(messages: list[dict[str, Any]], field: str, source: str) -> str:
    """Append a mark to the last message's text, and return that text."""
    last = messages[-1]
    text = last.get(field)
    if text is None:
        raise ValueError(f"continue_final_message: the last message has no {field!r} to continue")
    fields = [field]
    if field in _REASONING:
        fields = [name for name in _REASONING if last.get(name) == text]
    if not any(name in source for name in fields):
        raise ValueError(f"continue_final_message: the chat template does not read {field!r}")
    if isinstance(text, list | tuple):
        blocks = [b for b in text if isinstance(b, dict) and isinstance(b.get("text"), str)]
        if not blocks:
            raise ValueError("continue_final_message: the last message holds no text to continue")
        text = blocks[-1]["text"]
        blocks[-1]["text"] = text + _MARK
    elif isinstance(text, str):
        for name in fields:
            last[name] = text + _MARK
    else:
        raise ValueError(f"continue_final_message: {field!r} is {type(text).__name__}, not a text")
    return text


def _text_before_mark(text: str, final: str) -> str:
    """Return the text before the mark, which a trimming template has trimmed too."""
    at = text.rfind(_MARK.strip())
    if at < 0 or final.strip() not in text:
        raise UnsupportedError(
            "continue_final_message: the chat template leaves out the last message or changes it"
        )
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()
