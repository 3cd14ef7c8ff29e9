"""Names of blobs in a directory or a bucket: a key that is a text of any kind, made harmless."""

from __future__ import annotations

import hashlib
import re

SUFFIX = ".jkv"
# Lower case only: some file systems take "A" for "a". Names keep room for what others append.
_PLAIN = re.compile(rb"[a-z0-9-]")
_ESCAPED = re.compile(r"(?:[a-z0-9-]|_[0-9a-f]{2})*")
_LONGEST = 180


def name_of(key: str) -> str:
    """A key's name: ``k`` and the key, all but a-z, 0-9 and ``-`` written as ``_`` and two digits.

    A name longer than 180 would not fit; such a key's is ``h`` and its SHA-256, and what the key
    was stands in the blob. Two keys never share a name.
    """
    data = key.encode("utf-8", "surrogatepass")
    escaped = "".join(
        chr(byte) if _PLAIN.match(bytes([byte])) else f"_{byte:02x}" for byte in data[:_LONGEST]
    )
    if len(data) > _LONGEST or len(escaped) > _LONGEST:
        return f"h{hashlib.sha256(data).hexdigest()}{SUFFIX}"
    return f"k{escaped}{SUFFIX}"


def is_name(name: str) -> bool:
    """Whether `name_of` may have made it: anything else in a directory is somebody else's."""
    if not name.endswith(SUFFIX):
        return False
    body = name[1 : -len(SUFFIX)]
    if name.startswith("h"):
        return re.fullmatch(r"[0-9a-f]{64}", body) is not None
    return name.startswith("k") and key_of(name) is not None


def key_of(name: str) -> str | None:
    """The key that a name spells; None if it spells none, as the names of long keys don't."""
    body = name[1 : -len(SUFFIX)]
    if not name.startswith("k") or not name.endswith(SUFFIX) or not _ESCAPED.fullmatch(body):
        return None
    data = re.sub(rb"_(..)", lambda hit: bytes([int(hit[1], 16)]), body.encode())
    try:
        key = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return key if name_of(key) == name else None
