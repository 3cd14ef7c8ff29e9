"""Names of blobs in a directory or a bucket: a key that is a text of any kind, made harmless."""

from __future__ import annotations

import hashlib
import re

SUFFIX = ".jkv"
# Lower case only: some file systems take "A" for "a". Names keep room for what others append.
_SPECIAL = re.compile(r"[^a-z0-9-]")
_LONGEST = 180
# What must not be escaped is not: a key has one name.
_SPELLED = re.compile(r"k((?:[a-z0-9-]|_(?!2d|3\d|6[1-9a-f]|7[0-9a])[0-9a-f]{2})*)\.jkv")
_HASHED = re.compile(r"h[0-9a-f]{64}\.jkv")


def name_of(key: str) -> str:
    """A key's name: ``k`` and the key, all but a-z, 0-9 and ``-`` written as ``_`` and two digits.

    A name longer than 180 would not fit; such a key's is ``h`` and its SHA-256, and what the key
    was stands in the blob. Two keys never share a name.
    """
    data = key.encode("utf-8", "surrogatepass")
    shown = data[: _LONGEST + 1].decode("latin-1")
    escaped = _SPECIAL.sub(lambda hit: f"_{ord(hit[0]):02x}", shown)
    if len(escaped) > _LONGEST:
        return f"h{hashlib.sha256(data).hexdigest()}{SUFFIX}"
    return f"k{escaped}{SUFFIX}"


def is_name(name: str) -> bool:
    """Whether `name_of` may have made it: anything else in a directory is not the store's."""
    return key_of(name) is not None or _HASHED.fullmatch(name) is not None


def key_of(name: str) -> str | None:
    """The key that a name spells; None if it spells none, as the names of long keys don't."""
    spelled = _SPELLED.fullmatch(name)
    if spelled is None or len(spelled[1]) > _LONGEST:
        return None
    escaped = re.sub(r"_(..)", lambda hit: chr(int(hit[1], 16)), spelled[1])
    try:
        return escaped.encode("latin-1").decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
