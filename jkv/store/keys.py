"""Names of entries, and which of them begin with the same tokens.

A name joins tenant and key. A mark stands for all that a prefix depends on: the fingerprint of
weights, configuration and kind of cache, the tenant, and the tokens so far.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jkv.store import digest
from jkv.store.checks import Key, check_text

PEERS = 256  # entries with the same mark that are looked at, the latest


def name_of(tenant: Key, key: Key) -> str:
    """The name of a tenant's entry: no two tenants share one, nor do two keys of one tenant.

    Raises:
        TypeError: a key or a tenant that is no text: 1 and "1" would be one.
    """
    check_text("tenant", tenant)
    check_text("key", key)
    return "".join((str(len(tenant)), ":", tenant, ":", key))


def split(name: str) -> tuple[str, str]:
    """Tenant and key of a name; one that the store did not make is a key without a tenant."""
    digits, colon, rest = name.partition(":")
    if colon and digits.isascii() and digits.isdigit() and rest[int(digits) :][:1] == ":":
        return rest[: int(digits)], rest[int(digits) + 1 :]
    return "", name


def as_tokens(tokens: Any) -> np.ndarray:
    """Token ids as int32 [T], a copy that is read-only.

    Raises:
        ValueError: anything but one row of ids from 0.
    """
    ids = np.array(tokens)  # a copy: the caller's may change
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"tokens got {ids.dtype} of shape {ids.shape}; expected one row of token ids"
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < 2**31:
        raise ValueError(f"tokens from {ids.min()} to {ids.max()}; expected ids from 0 to 2^31 - 1")
    ids = ids.astype(np.int32)
    ids.flags.writeable = False
    return ids


def marks(fingerprint: bytes, tenant: str, tokens: np.ndarray, chunk: int) -> Iterator[bytes]:
    """A digest of all that is before it at every `chunk` tokens."""
    mark = digest.root("jkv prefix", fingerprint, tenant, chunk)
    for start in range(0, len(tokens) - chunk + 1, chunk):
        mark = digest.chain(mark, tokens[start : start + chunk].tolist())
        yield mark


def content_key(fingerprint: bytes, tokens: np.ndarray) -> str:
    """A key that says what an entry was made of."""
    made = digest.chain(digest.root("jkv content", fingerprint), tokens.tolist())
    return f"sha256:{made.hex()}"


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens are the same from the beginning."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


class Prefixes:
    """Which entries begin with given tokens.

    What it keeps has `tokens` (int32 [T], or None), `tenant`, `fingerprint` and `whole` (of use
    with all of its tokens only).
    """

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self._marks: dict[bytes, dict[Any, None]] = {}

    def __len__(self) -> int:
        """Marks."""
        return len(self._marks)

    def _marks_of(self, item: Any) -> Iterator[bytes]:
        if item.tokens is None:
            return iter(())
        return marks(item.fingerprint, item.tenant, item.tokens, self.chunk)

    def add(self, item: Any) -> None:
        """From now on it is found."""
        for mark in self._marks_of(item):
            self._marks.setdefault(mark, {})[item] = None

    def remove(self, item: Any) -> None:
        """From now on it is not."""
        for mark in self._marks_of(item):
            items = self._marks.get(mark)
            if items is not None:
                items.pop(item, None)
                if not items:
                    del self._marks[mark]

    def find(
        self, fingerprint: bytes, tenant: str, tokens: np.ndarray, rank: Callable[[Any], Any]
    ) -> Iterator[tuple[Any, int]]:
        """Entries and how many first tokens they share, the most first, then the least `rank`.

        Of more than 256 entries with the same last mark only the latest are compared: up to
        `chunk` - 1 tokens may be missed there.
        """
        levels: list[dict[Any, None]] = []
        for mark in marks(fingerprint, tenant, tokens, self.chunk):
            items = self._marks.get(mark)
            if items is None:
                break
            levels.append(items)
        seen: set[Any] = set()
        while levels:
            found = []
            for item in itertools.islice(reversed(levels.pop()), PEERS):
                if item in seen:
                    continue
                seen.add(item)
                # The tokens themselves decide, not only what they were hashed to.
                same = item.tenant == tenant and item.fingerprint == fingerprint
                length = common(item.tokens, tokens) if same else 0
                if length >= self.chunk and not (item.whole and length < len(item.tokens)):
                    found.append((item, length))
            yield from sorted(found, key=lambda pair: (-pair[1], rank(pair[0])))
