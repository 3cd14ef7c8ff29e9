"""Reading the files that say what a checkpoint is: regular files only, and of bounded size."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from jkv._text import brief

# Bytes that a file of each sort may have. The largest that are published: config.json 0.1 MB,
# tokenizer_config.json 1.2 MB, chat templates 0.1 MB, an index 15 MB, tokenizer.json 35 MB. Python
# takes up to twenty times a file's size to parse it.
CONFIG_LIMIT = 4 << 20
TEMPLATE_LIMIT = 1 << 18
INDEX_LIMIT = TOKENIZER_LIMIT = 64 << 20


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, is larger, or is no regular file: a pipe or a device may block
            or never end.
    """
    # Without O_NONBLOCK the opening of a pipe waits for its other end.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if path.is_dir():  # Windows does not open directories
        raise IsADirectoryError("is a directory; expected a file")
    with open(os.open(path, flags | getattr(os, "O_CLOEXEC", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("is a pipe or a device; expected a regular file")
        # A size may be out of date, or 0 where the file is made as it is read.
        data = b"" if status.st_size > limit else file.read(limit + 1)
    if max(status.st_size, len(data)) > limit:
        raise OSError(
            f"has {max(status.st_size, len(data))} bytes; expected at most {limit} in such a file"
        )
    return data


def read_text(path: Path, problems: list[str], *, limit: int, optional: bool = False) -> str | None:
    """Read a file as UTF-8.

    Args:
        path: of the file.
        problems: what is wrong with it is added here.
        limit: bytes that it may have.
        optional: its absence is no problem.

    Returns:
        The text; None where there is no file, or a problem.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except FileNotFoundError:
        if not optional:
            problems.append(f"{path.name} is missing")
    except OSError as error:
        problems.append(f"{path.name}: cannot be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        problems.append(f"{path.name}: cannot be read: it is not UTF-8 ({error.reason})")
    return None


def read_json(
    path: Path, problems: list[str], *, limit: int = CONFIG_LIMIT, optional: bool = False
) -> dict[str, Any] | None:
    """Read the object in a JSON file.

    Args:
        path: of the file.
        problems: what is wrong with it is added here.
        limit: bytes that it may have.
        optional: its absence is no problem.

    Returns:
        The object; None where there is no file, or a problem.
    """
    text = read_text(path, problems, limit=limit, optional=optional)
    return None if text is None else parse_json(text, path.name, problems)


def parse_json(text: str, name: str, problems: list[str]) -> dict[str, Any] | None:
    """Parse a JSON object; None and a problem where it is none.

    Args:
        text: of the file.
        name: of the file, for the problem.
        problems: what is wrong with it is added here.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{name}: is not valid JSON: {brief(str(error))}")
        return None
    if not isinstance(value, dict):
        problems.append(f"{name}: holds {brief(value)}; expected an object")
        return None
    return value
