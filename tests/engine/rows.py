"""Rows of tokens in a pool's pages, with what is in each page: a device for tests of the pool."""

from __future__ import annotations

import copy
import hashlib
import struct
from typing import Any

from jkv.engine.page_pool import PagePool, PageSequence
from jkv.store import policy

POLICIES = tuple(policy.POLICIES.values())


def snapshot(pool: PagePool) -> Any:
    """Return the whole state of a pool, and the order in which its pages would be evicted."""
    state = {k: v for k, v in vars(pool).items() if k not in ("_open", "_evictor")}
    evictor, order = copy.deepcopy(pool._evictor), []
    for _ in range(pool._cached):
        order.append(evictor.victim())
        evictor.evicted(order[-1])
    tables = sorted((s.table, s.length, s._names, s._dropped) for s in pool._open)
    return copy.deepcopy((state, order, tables))


def name(pool: PagePool, tenant: str, tokens: list[int]) -> bytes:
    """Return the name of a page that ends with these tokens, by hashlib alone."""

    def part(kind, data):
        return kind + struct.pack("<q", len(data)) + data

    root = b"jkv root 1" + part(b"b", pool.fingerprint) + part(b"s", tenant.encode())
    found = hashlib.sha256(root + part(b"i", str(pool.page).encode())).digest()
    for i in range(0, len(tokens), pool.page):
        block = tokens[i : i + pool.page]
        found = hashlib.sha256(found + b"".join(struct.pack("<q", t) for t in block)).digest()
    return found


def dropped_pages(seq: PageSequence) -> int:
    """Return how many pages a sequence has dropped."""
    return seq.table.count(-1)


class Row:
    """A sequence, and the tokens that it should hold."""

    def __init__(self, seq: PageSequence, tokens: list[int]) -> None:
        self.seq, self.tokens = seq, tokens


class Device:
    """A pool, and what is in its pages."""

    def __init__(self, pages=8, page=3, policy=None, fingerprint=b"model"):
        self.pool = PagePool(pages=pages, page=page, policy=policy, fingerprint=fingerprint)
        self.contents: list[list[Any]] = [["?"] * page for _ in range(pages)]
        self.rows: list[Row] = []

    def new(self, tenant="") -> Row:
        row = Row(self.pool.sequence(tenant=tenant), [])
        self.rows.append(row)
        return row

    def perform(self, copies):
        for source, target in copies:
            self.contents[target] = list(self.contents[source])

    def write(self, row: Row, tokens: list[int]):
        """Into pages that were reserved, at the row's end."""
        page = self.pool.page
        for token in tokens:
            at = len(row.tokens)
            self.contents[row.seq.table[at // page]][at % page] = token
            row.tokens.append(token)

    def extend(self, row: Row, tokens: list[int], publish=True):
        self.perform(row.seq.reserve(len(row.tokens) + len(tokens)))
        self.write(row, list(tokens))
        if publish:
            row.seq.publish(row.tokens)

    def prompt(self, tokens, tenant="", publish=True) -> tuple[Row, int]:
        """A new row of these tokens, and how many of them were found."""
        row = self.new(tenant)
        found = row.seq.match(tokens, limit=len(tokens) - 1)
        row.tokens = list(tokens[:found])
        self.extend(row, tokens[found:], publish)
        return row, found

    def fork(self, row: Row) -> Row:
        other = Row(row.seq.fork(), list(row.tokens))
        self.rows.append(other)
        return other

    def close(self, row: Row):
        row.seq.close()
        self.rows.remove(row)

    def check(self):
        """Check that every token of every row is where its table says, and all counts."""
        self.pool.check()
        page = self.pool.page
        for row in self.rows:
            assert row.seq.length == len(row.tokens)
            for at in range(dropped_pages(row.seq) * page, len(row.tokens)):
                assert self.contents[row.seq.table[at // page]][at % page] == row.tokens[at]
        stats = self.pool.stats()
        assert stats["pages"] == stats["used"] + stats["cached"] + stats["free"]
        assert self.pool.free_pages == stats["cached"] + stats["free"]
        assert stats["sequences"] == len(self.rows)
