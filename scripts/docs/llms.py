"""One page of text with the whole public interface, for language models and for grep."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from docs.names import PublicName, page_name


def text(names: Sequence[PublicName], readme: str) -> str:
    """Return the essentials of README, and each public name with its signature and first line."""
    parts = [essentials(readme)]
    for module in dict.fromkeys(one.module for one in names):
        parts.append(f"## {page_name(module)}\n")
        parts += [entry(one) for one in names if one.module == module]
        parts[-1] += "\n"
    return "\n".join(parts)


def essentials(readme: str) -> str:
    """Return what README says up to its figures, without pictures."""
    kept = readme.split("\n## What it promises")[0]
    return re.sub(r"^!\[.*\n", "", kept, flags=re.M).strip() + "\n"


def entry(one: PublicName) -> str:
    """Return a name's line, and one for each public method of a class."""
    if one.kind == "data":
        return f"- {one.name}: {one.first_line}"
    lines = [f"- {one.name}{signature(one.value)}: {one.first_line}"]
    if isinstance(one.value, type):
        lines += [f"  - {line}" for line in members(one.value)]
    return "\n".join(lines)


def members(cls: type) -> list[str]:
    """Return the lines of a class's own public methods and properties."""
    lines = []
    for name, value in vars(cls).items():
        told = (inspect.getdoc(value) or "").split("\n", 1)[0]
        if name.startswith("_") or not told:
            continue
        if isinstance(value, property):
            lines.append(f".{name}: {told}")
        elif isinstance(value, classmethod | staticmethod) or inspect.isfunction(value):
            lines.append(f".{name}{signature(getattr(cls, name))}: {told}")
    return lines


def signature(value: object) -> str:
    """Return a signature as its source has it, without addresses of memory; "" for errors."""
    if isinstance(value, type) and issubclass(value, BaseException):
        return ""
    found = inspect.signature(value)  # pyright: ignore[reportArgumentType]
    shown = [plain(p) for p in found.parameters.values() if p.name != "self"]
    returned = found.return_annotation
    tail = "" if returned is found.empty or isinstance(value, type) else f" -> {name_of(returned)}"
    return str(inspect.Signature(shown)) + tail


def plain(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a parameter whose type and default are shown by name."""
    kind, default = parameter.annotation, parameter.default
    if kind is not parameter.empty:
        kind = Shown(name_of(kind))
    if default is not parameter.empty:
        default = Shown(shown_default(default))
    return parameter.replace(annotation=kind, default=default)


def shown_default(value: object) -> str:
    """Return a default's name or text; "..." for a marker, whose text has an address."""
    text = getattr(value, "__name__", repr(value))
    return "..." if " at 0x" in text else text


class Shown(str):
    """A text that is its own `repr`."""

    def __repr__(self) -> str:
        """Return it without quotes."""
        return str(self)


def name_of(annotation: object) -> str:
    """Return an annotation as people write it."""
    told = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    told = told.replace("~", "")  # of a type variable
    return re.sub(r"\b(?:jkv|jax|numpy|typing|collections|jaxtyping)\.(?:\w+\.)*(?=\w)", "", told)
