"""Random lives of the pool against a dictionary that says what should be."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jkv.engine.page_pool import PagePool, PageSequence
from jkv.errors import PoolFullError
from tests.engine.rows import POLICIES, Device, Row, name, snapshot

# The long run: JKV_POOL_LIVES=10000 with 100 operations each.
LIVES = int(os.environ.get("JKV_POOL_LIVES", "40"))


class Life(RuleBasedStateMachine):
    """Sequences that come, share, write and go in a pool that is too small for them."""

    seen = 0  # of what should have happened: see the test

    @initialize(policy=st.sampled_from(POLICIES), pages=st.integers(3, 9), page=st.integers(1, 4))
    def start(self, policy, pages, page):
        self.device = Device(pages, page, policy)
        self.pool = self.device.pool
        self.unique = itertools.count(2)
        self.published: dict[bytes, list[int]] = {}  # the tokens that a name stands for

    def row(self, data) -> Row:
        return data.draw(st.sampled_from(self.device.rows))

    def tokens(self, data, most=10):
        return data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=most))

    def published_by(self, row):
        row.seq.publish(row.tokens)
        page, tenant = self.pool.page, row.seq.tenant
        if row.seq._generation == self.pool._generation:
            for end in range(page, len(row.tokens) + 1, page):
                self.published[name(self.pool, tenant, row.tokens[:end])] = row.tokens[:end]

    def reserve(self, row, length):
        """The copies, or None where the pool is full."""
        needed, free = self.pool.needs(row.seq, length), self.pool.free_pages
        if needed > free:
            before = snapshot(self.pool)
            with pytest.raises(PoolFullError, match=f"need {needed} pages? more, and {free} of"):
                row.seq.reserve(length)
            assert snapshot(self.pool) == before
            Life.seen |= 1
            return None
        copies = row.seq.reserve(length)
        assert self.pool.free_pages in (free - needed, free - needed + len(copies))
        for source, target in copies:
            assert source != target
            Life.seen |= 2
        return copies

    @rule(data=st.data(), tenant=st.sampled_from(["", "", "a"]), all_but_one=st.booleans())
    def come(self, data, tenant, all_but_one):
        tokens = self.tokens(data)
        row, page = self.device.new(tenant), self.pool.page
        limit = len(tokens) - all_but_one
        expected = 0
        while (
            expected + page <= limit
            and name(self.pool, tenant, tokens[: expected + page]) in self.pool._index
        ):
            expected += page
        before = self.pool.stats()
        assert row.seq.match(tokens, limit=limit) == expected
        after = self.pool.stats()
        assert after["hits_tokens"] - before["hits_tokens"] == expected
        assert after["asked_tokens"] - before["asked_tokens"] == len(tokens)
        Life.seen |= 4 * bool(expected)
        row.tokens = tokens[:expected]
        copies = self.reserve(row, len(tokens))
        if copies is not None:
            assert not copies
            self.device.write(row, tokens[expected:])

    @precondition(lambda self: self.device.rows)
    @rule(data=st.data())
    def go_on(self, data):
        row = self.row(data)
        tokens = self.tokens(data, most=5)
        copies = self.reserve(row, len(row.tokens) + len(tokens))
        if copies is not None:
            self.device.perform(copies)
            self.device.write(row, tokens)

    @precondition(lambda self: self.device.rows)
    @rule(data=st.data())
    def step(self, data):
        """All rows by a token of their own: every copy is made before anything is written."""
        ready, copies = [], []
        for row in self.device.rows:
            ahead = data.draw(st.integers(1, 3))
            made = self.reserve(row, len(row.tokens) + ahead)
            if made is not None:
                copies += made
                ready.append(row)
        self.device.perform(copies)
        for row in ready:
            self.device.write(row, [next(self.unique)])
        for row in ready:
            row.seq.crop(len(row.tokens))

    @precondition(lambda self: self.device.rows)
    @rule(data=st.data())
    def publish(self, data):
        self.published_by(self.row(data))

    @precondition(lambda self: 0 < len(self.device.rows) < 6)
    @rule(data=st.data())
    def fork(self, data):
        self.device.fork(self.row(data))

    @precondition(lambda self: self.device.rows)
    @rule(data=st.data())
    def crop(self, data):
        row = self.row(data)
        length = data.draw(st.integers(0, len(row.tokens)))
        dropped = row.seq._dropped * self.pool.page
        if 0 < length < dropped:
            before = snapshot(self.pool)
            with pytest.raises(ValueError, match=f"first {dropped} tokens were dropped"):
                row.seq.crop(length)
            assert snapshot(self.pool) == before
            return
        row.seq.crop(length)
        del row.tokens[length:]

    @precondition(lambda self: self.device.rows)
    @rule(data=st.data())
    def drop(self, data):
        row = self.row(data)
        position = data.draw(st.integers(-2, len(row.tokens)))
        row.seq.drop_before(position)
        dropped = row.seq._dropped * self.pool.page
        assert dropped + self.pool.page > position
        assert row.seq.table[: row.seq._dropped] == [-1] * row.seq._dropped

    @precondition(lambda self: self.device.rows)
    @rule(data=st.data())
    def close(self, data):
        self.device.close(self.row(data))

    @rule(really=st.integers(0, 9))
    def clear(self, really):
        if really == 0:
            self.pool.clear()
            self.published.clear()
            assert self.pool.stats()["cached"] == 0

    @invariant()
    def all_is_as_it_should_be(self):
        self.device.check()
        page = self.pool.page
        for found, at in self.pool._index.items():
            assert self.device.contents[at] == self.published[found][-page:]
        Life.seen |= 8 * bool(self.pool.stats()["evicted"])

    def teardown(self):
        for row in list(self.device.rows):
            self.device.close(row)
        assert self.pool.stats()["used"] == 0
        assert self.pool.free_pages == self.pool.pages
        self.device.check()


def lives(**more):
    Life.seen = 0
    options = settings(
        max_examples=LIVES,
        stateful_step_count=100 if LIVES > 1000 else 40,
        deadline=None,
        derandomize=LIVES < 1000,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **more,
    )
    run_state_machine_as_test(Life, settings=options)


@pytest.mark.timeout(600 if LIVES < 1000 else 4 * 3600)
def test_random_lives():
    lives()
    # A pool that was full, a copy on write, a match, and a page given away.
    assert Life.seen == 15


@pytest.mark.parametrize("wrong", ["_must_copy", "_leave", "_publish", "match"])
def test_the_machine_detects_mutants(wrong, monkeypatch):
    """Without copies on write, with pages that leak, names that are wrong, other tenants' pages."""
    if wrong == "_must_copy":
        monkeypatch.setattr(PageSequence, wrong, lambda self: False)
    elif wrong == "_leave":
        leave = PagePool._leave
        monkeypatch.setattr(PagePool, wrong, lambda self, page: page and leave(self, page))
    elif wrong == "_publish":
        publish = PagePool._publish
        monkeypatch.setattr(
            PagePool, wrong, lambda self, page, name: publish(self, page, name[:1] * 32)
        )
    else:
        match = PageSequence.match

        def anybody_s(self, tokens, limit=None):
            self._root = self._pool.sequence(tenant="")._root
            return match(self, tokens, limit)

        monkeypatch.setattr(PageSequence, wrong, anybody_s)
    with pytest.raises((AssertionError, RuntimeError, KeyError)):
        lives(phases=[Phase.generate])
