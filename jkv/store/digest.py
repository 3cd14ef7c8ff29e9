"""Names of contents: what tokens have been said, to which model, by whom.

SHA-256 over an encoding in which no two inputs look alike, the same in every process and on every
machine. Python's `hash` is neither.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from jkv._text import brief


def root(*parts: bytes | str | int) -> bytes:
    """Return the key of no tokens at all, given everything in `parts`; 32 bytes.

    Each part goes with its type and length: parts that look alike when joined stay apart.
    """
    state = hashlib.sha256(b"jkv root 1")
    for part in parts:
        if isinstance(part, bytes):
            kind, data = b"b", part
        elif isinstance(part, str):
            kind, data = b"s", part.encode("utf-8", "surrogatepass")
        else:
            kind, data = b"i", str(part).encode()
        state.update(kind + len(data).to_bytes(8, "little") + data)
    return state.digest()


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the key of what `parent` is the key of, followed by these tokens; 32 bytes.

    Raises:
        TypeError: tokens that are not whole numbers of 64 bits.
    """
    try:
        data = struct.pack(f"<{len(tokens)}q", *tokens)
    except struct.error:
        raise TypeError(f"tokens got {brief(list(tokens))}; expected whole numbers") from None
    return hashlib.sha256(parent + data).digest()
