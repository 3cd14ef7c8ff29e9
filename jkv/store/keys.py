"""Names of entries, and which of them begin with the same tokens.

A name joins tenant and key. A prefix hash stands for all that a prefix depends on: the fingerprint
of weights, configuration and kind of cache, the tenant, and the tokens so far.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike

from jkv._checks import check_text
from jkv.store import digest
from jkv.store.checks import Key
from jkv.store.state import Record

PEERS = 256  # entries with the same hash that are looked at, the latest


def entry_name(tenant: Key, key: Key) -> str:
    """Return the name of a tenant's entry: no two tenants share one, nor do two keys of one tenant.

    Raises:
        TypeError: a key or a tenant that is no text: 1 and "1" would be one.
    """
    check_text("tenant", tenant)
    check_text("key", key)
    return "".join((str(len(tenant)), ":", tenant, ":", key))


def split_name(name: str) -> tuple[str, str]:
    """Split a name into tenant and key; one that no store made is a key without a tenant."""
    digits, colon, rest = name.partition(":")
    if colon and digits.isascii() and digits.isdigit() and rest[int(digits) :][:1] == ":":
        return rest[: int(digits)], rest[int(digits) + 1 :]
    return "", name


def as_tokens(tokens: ArrayLike) -> np.ndarray:
    """Return token ids as int32 [T], a copy that is read-only.

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


def prefix_hashes(
    fingerprint: bytes, tenant: str, tokens: np.ndarray, chunk: int
) -> Iterator[bytes]:
    """Yield a hash of all that is before it at every `chunk` tokens."""
    found = digest.root("jkv prefix", fingerprint, tenant, chunk)
    for start in range(0, len(tokens) - chunk + 1, chunk):
        found = digest.chain(found, tokens[start : start + chunk].tolist())
        yield found


def content_key(fingerprint: bytes, tokens: np.ndarray) -> str:
    """Return a key that says what an entry was made of."""
    made = digest.chain(digest.root("jkv content", fingerprint), tokens.tolist())
    return f"sha256:{made.hex()}"


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Count the tokens that are the same from the beginning."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


class Prefixes:
    """Which entries begin with given tokens, by the hashes of their prefixes."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self._by_hash: dict[bytes, dict[Record, None]] = {}

    def __len__(self) -> int:
        """Count the hashes."""
        return len(self._by_hash)

    def _hashes(self, record: Record) -> Iterator[bytes]:
        if record.tokens is None:
            return iter(())
        return prefix_hashes(record.fingerprint, record.tenant, record.tokens, self.chunk)

    def add(self, record: Record) -> None:
        """Let it be found from now on."""
        for prefix in self._hashes(record):
            self._by_hash.setdefault(prefix, {})[record] = None

    def remove(self, record: Record) -> None:
        """Let it be found no more."""
        for prefix in self._hashes(record):
            records = self._by_hash.get(prefix)
            if records is not None:
                records.pop(record, None)
                if not records:
                    del self._by_hash[prefix]

    def find(
        self,
        fingerprint: bytes,
        tenant: str,
        tokens: np.ndarray,
        rank: Callable[[Record], tuple[int, int]],
    ) -> Iterator[tuple[Record, int]]:
        """Yield records and how many first tokens they share, the most first, then by `rank`.

        Of more than 256 entries with the same last hash only the latest are compared: up to
        `chunk` - 1 tokens may be missed there.
        """
        levels: list[dict[Record, None]] = []
        for prefix in prefix_hashes(fingerprint, tenant, tokens, self.chunk):
            records = self._by_hash.get(prefix)
            if records is None:
                break
            levels.append(records)
        seen: set[Record] = set()
        while levels:
            found: list[tuple[Record, int]] = []
            for record in itertools.islice(reversed(levels.pop()), PEERS):
                if record in seen:
                    continue
                seen.add(record)
                held = record.tokens
                # The tokens themselves decide, not only what they were hashed to.
                if held is None or record.tenant != tenant or record.fingerprint != fingerprint:
                    continue
                length = common(held, tokens)
                if length >= self.chunk and not (record.whole and length < len(held)):
                    found.append((record, length))
            yield from sorted(found, key=lambda pair: (-pair[1], rank(pair[0])))
