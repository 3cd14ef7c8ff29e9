"""The requests of `jkv engine`: lines of a file or of standard input, good ones and bad ones."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jkv._checks import check_integer
from jkv._text import brief, plural
from jkv.cli import options
from jkv.cli.errors import complain

T = TypeVar("T")

DRAWING = ("temperature", "seed", *options.FIRST, *options.CUTS)
FIELDS = {"prompt", "id", "max_new_tokens", *DRAWING, "stop", "priority", "tenant"}
SHOWN = 100  # bad lines that are reported one by one


@dataclasses.dataclass(frozen=True)
class Asked:
    """A line's request.

    Attributes:
        id: the request's own, None where it has none.
        keywords: what `Engine.submit` gets.
    """

    id: str | int | None
    keywords: dict[str, Any]


class NoRequestError(ValueError):
    """A line that is no request at all; the message follows "line 3"."""


class Requests:
    """Requests by the numbers of their lines, and the lines that are none.

    Attributes:
        name: of the file, for messages.
        asked: good requests by line.
        bad: what is wrong with the others, by line, as it follows "line 3".
    """

    def __init__(self, path: Path, max_new_tokens: int):
        """Read all lines.

        Args:
            path: a file, or - for standard input.
            max_new_tokens: of requests that do not say.

        Raises:
            ValueError: it cannot be read, or holds no lines.
        """
        self.name = "standard input" if str(path) == "-" else str(path)
        self.asked: dict[int, Asked] = {}
        self.bad: dict[int, str] = {}
        self._reported: set[int] = set()
        lines: dict[str | int, int] = {}  # of ids
        for line, text in enumerate(_lines(path), 1):
            if not text.strip():
                continue
            asked = self.attempt(line, lambda text=text: _request(text, max_new_tokens))
            if asked is None:
                continue
            if asked.id is not None and lines.setdefault(asked.id, line) != line:
                self.bad[line] = (
                    f": id {brief(asked.id)} is line {lines[asked.id]}'s; expected its own"
                )
            else:
                self.asked[line] = asked
        if not self.asked and not self.bad:
            raise ValueError(f"{self.name} holds no requests; expected one JSON object per line")

    def attempt(self, line: int, make: Callable[[], T]) -> T | None:
        """Return what `make` returns, None where it refuses; then the line is bad."""
        try:
            return make()
        except (TypeError, ValueError, OverflowError) as error:
            self.asked.pop(line, None)
            self.bad[line] = f"{' ' if isinstance(error, NoRequestError) else ': '}{error}"
            return None

    def report(self) -> None:
        """Write what is wrong on standard error, one line for each, what was not written before."""
        fresh = sorted(self.bad.keys() - self._reported)
        self._reported |= self.bad.keys()
        for line in fresh[:SHOWN]:
            complain(f"{self.name}, line {line}{self.bad[line]}")
        if len(fresh) > SHOWN:
            complain(f"{self.name} has {plural(len(fresh) - SHOWN, 'bad line')} more")


def _lines(path: Path) -> list[str]:
    """Read the lines of a file or of standard input; texts may hold other ends of lines.

    Raises:
        ValueError: it cannot be read, or is no text.
    """
    try:
        if str(path) == "-":
            data = getattr(sys.stdin, "buffer", sys.stdin).read()
        else:
            data = path.read_bytes()
        return (data if isinstance(data, str) else data.decode("utf-8-sig")).split("\n")
    except OSError as error:
        raise ValueError(f"--requests {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def _request(text: str, max_new_tokens: int) -> Asked:
    """Read one line; fields that are null are as good as absent.

    Raises:
        TypeError: a field of a wrong type.
        ValueError: no JSON, no object with a prompt, unknown fields, or a value out of range.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise NoRequestError(f"is no JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise NoRequestError(f"is no JSON that can be read: {brief(str(error))}") from error
    if not isinstance(fields, dict):
        raise NoRequestError(f"is {brief(fields)}; expected an object with prompt")
    if unknown := sorted(set(fields) - FIELDS):
        raise NoRequestError(
            f"has {', '.join(map(str, unknown))[:200]}; expected prompt and any of "
            f"{', '.join(sorted(FIELDS - {'prompt'}))}"
        )
    fields = {name: value for name, value in fields.items() if value is not None}
    if "prompt" not in fields:
        raise NoRequestError("has no prompt; expected a text, or token ids")
    own = fields.pop("id", None)
    if own is not None and (isinstance(own, bool) or not isinstance(own, str | int)):
        raise TypeError(f"id got {brief(own)}; expected a text or an integer")
    return Asked(own, _keywords(fields, max_new_tokens))


def _keywords(fields: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Make the keywords of `Engine.submit`.

    Raises:
        TypeError: no number where one is expected.
        ValueError: a number out of range.
    """
    chosen: dict[str, Any] = {"temperature": 0.0, "seed": 0}
    chosen |= {name: fields[name] for name in DRAWING if name in fields}
    check_integer("seed", chosen["seed"], 0, 2**32 - 1)
    if "logit_bias" in chosen:
        chosen["logit_bias"] = _bias(chosen["logit_bias"])
    keywords = {"max_new_tokens": max_new_tokens, **options.drawing(**chosen)}
    keywords |= {name: value for name, value in fields.items() if name not in DRAWING}
    if "stop" in keywords and not isinstance(keywords["stop"], list):
        keywords["stop"] = [keywords["stop"]]
    return keywords


def _bias(value: object) -> object:
    """Turn names into token ids: in JSON names are texts.

    Raises:
        TypeError: a name is no id.
    """
    if not isinstance(value, dict):
        return value
    if not all(name.isdecimal() for name in value):
        raise TypeError(f"logit_bias got {brief(value)}; expected token ids as names")
    return {int(name): number for name, number in value.items()}
