"""Describing a Python function to a model: its JSON schema, from its annotations and docstring."""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, Union

_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_CONTAINERS = {list: "array", tuple: "array", dict: "object"}


def schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Describe a function as `transformers.utils.get_json_schema` does.

    Args:
        function: with annotated parameters and a docstring in Google's style, which describes each
            parameter. ``(choices: ["a", "b"])`` at the end of a description lists its values.

    Raises:
        ValueError: it lacks a docstring, an annotation or a description, or has an annotation that
            JSON has no type for.

    Example:
        >>> def weather(city: str) -> str:
        ...     '''Get the weather of a city.
        ...
        ...     Args:
        ...         city: its name.
        ...     '''
        >>> from jkv.models.tools import schema
        >>> schema(weather)["function"]["parameters"]["required"]
        ['city']
    """
    name = getattr(function, "__name__", "operation")
    text = inspect.getdoc(function)
    if not text:
        raise ValueError(
            f"the tool {name} has no docstring; expected one, or a JSON schema instead"
        )
    description, described, returned = _parse_docstring(text.strip())
    properties, required = {}, []
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError) as error:
        raise ValueError(f"the tool {name} has an annotation that is unknown: {error}") from error
    for parameter in _parameters(function):
        if parameter.name not in hints:
            raise ValueError(f"the tool {name} has no annotation for {parameter.name}")
        if parameter.name not in described:
            raise ValueError(f"the docstring of the tool {name} does not describe {parameter.name}")
        where = f"the parameter {parameter.name} of the tool {name}"
        properties[parameter.name] = _describe(
            _type(hints[parameter.name], where), described[parameter.name], where
        )
        if parameter.default is inspect.Parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    result: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    if "return" in hints:
        try:
            result["return"] = _type(hints["return"], name)
        except ValueError:
            pass  # a model never writes it
        else:
            if returned is not None:
                result["return"]["description"] = returned
    return {"type": "function", "function": result}


def _parameters(function: Callable[..., Any]) -> Iterator[inspect.Parameter]:
    """Return a function's parameters without the instance or class of a method."""
    for i, parameter in enumerate(inspect.signature(function).parameters.values()):
        bare = parameter.annotation is inspect.Parameter.empty
        if not (i == 0 and bare and parameter.name in ("self", "cls")):
            yield parameter


def _describe(kind: dict[str, Any], text: str, where: str) -> dict[str, Any]:
    choices = re.search(r"\(choices:\s*(.*?)\)\s*$", text, re.IGNORECASE)
    if choices is not None:
        try:
            values = json.loads(choices.group(1))
        except ValueError as error:
            raise ValueError(f"{where} has choices that are no JSON: {choices.group(1)}") from error
        kind["enum"] = [value.strip() if isinstance(value, str) else value for value in values]
        text = text[: choices.start()].strip()
    return kind | {"description": text}


def _type(hint: object, where: str) -> dict[str, Any]:
    """Return the JSON schema of an annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is None:
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return _enumeration([member.value for member in hint], where)
        if hint is Any:
            return {}
        name = (_SCALARS | _CONTAINERS).get(hint)
        if name is not None and hint is not type(None):
            return {"type": name}
        if hint is type(None):
            return {"type": "null"}
    elif origin in (Union, types.UnionType):
        return _union(args, where)
    elif origin is Literal:
        return _enumeration(list(args), where)
    elif origin in _CONTAINERS and not args:  # typing.List and its like
        return {"type": _CONTAINERS[origin]}
    elif origin is list:
        return {"type": "array", "items": _type(args[0], where)}
    elif origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_type(arg, where) for arg in args]}
    elif origin is dict and len(args) == 2:
        return {"type": "object", "additionalProperties": _type(args[1], where)}
    raise ValueError(
        f"{where} is annotated with {hint!r}, which has no JSON type; expected int, float, str, "
        "bool, list, dict, tuples of known length, unions, Literal or an Enum of these"
    )


def _union(args: tuple[Any, ...], where: str) -> dict[str, Any]:
    kinds = [_type(arg, where) for arg in args if arg is not type(None)]
    if len(kinds) == 1:
        result = kinds[0]
    elif all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in kinds):
        names = sorted({kind["type"] for kind in kinds})
        result = {"type": names[0] if len(names) == 1 else names}
    else:
        result = {"anyOf": kinds}
    return result | ({"nullable": True} if type(None) in args else {})


def _enumeration(values: list[Any], where: str) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise ValueError(f"{where} has the values {values}; expected numbers, texts, booleans")
    names = list(dict.fromkeys(_SCALARS[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _parse_docstring(text: str) -> tuple[str, dict[str, str], str | None]:
    """Parse a docstring of Google's style: the description, the arguments' and the result's."""
    sections: dict[str, list[str]] = {"": []}
    section = ""
    for line in text.split("\n"):
        heading = line.strip().removesuffix(":")
        if line.strip().endswith(":") and heading in ("Args", "Returns", "Raises"):
            section = heading
            sections[section] = []
        else:
            sections[section].append(line)
    arguments: dict[str, str] = {}
    current, indent = None, None
    for line in sections.get("Args", []):
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        match = re.match(r"(\w+)(?:[ \t]*\([^()]*\))?:\s*(.*)", line.strip())
        if match is not None and depth <= indent:
            current = match.group(1)
            arguments[current] = match.group(2)
        elif current is not None:
            arguments[current] += " " + line.strip()
    returned = "\n".join(sections["Returns"]).strip() if "Returns" in sections else None
    return "\n".join(sections[""]).strip(), arguments, returned
