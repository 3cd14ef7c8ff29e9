"""Random lives of a cache against lists of tokens, for every kind.

A key encodes its position and a value its token, so that a query can ask for one position and see
which token is found there: one lost, doubled, moved or kept too long is seen at once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import jkv
from jkv._probe import DIM, HEADS, SHARP, expected, key_of, keys_and_values
from jkv.cache import Cache, Evicting
from jkv.ops import AttentionSpec
from tests.cache.kinds import KINDS

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

# One number of rows: another would be another program.
ROWS, SLOTS = 3, 40
NEWEST = 10  # tokens that are left by evict
SEED = 9


@jax.jit
def appended(cache, tokens, counts):
    """The cache with new tokens [B, T]; asking for nothing."""
    run = cache.begin(tokens, counts)
    k, v = keys_and_values(run.tokens, run.step.positions)
    out, layer = run.layers[0].attend(jnp.zeros_like(k), k, v, run.step, AttentionSpec(SHARP))
    return run.end(out, [layer])[1]


@jax.jit
def asked(cache, token):
    """What a next token finds at each position: [targets, B, HEADS, DIM]."""

    def ask(target):
        run = cache.begin(token[:, None])
        k, v = keys_and_values(run.tokens, run.step.positions)
        q = jnp.broadcast_to(target, (*k.shape[:2], HEADS, DIM))
        out, _ = run.layers[0].attend(q, k, v, run.step, AttentionSpec(SHARP))
        return out.reshape(-1, HEADS, DIM)

    return jax.lax.map(ask, jnp.asarray(key_of(np.arange(SLOTS))))


def found(sees, row, token):
    """The same from the list of a row's tokens, in float64."""
    row = [*row, token]
    seen = [p for p in range(len(row)) if sees(len(row) - 1, p)]
    return expected(row, seen, np.arange(SLOTS))


# What operations do is compiled once for a kind, and not once for each array of a layer.
taken = jax.jit(lambda cache, rows: cache.take(rows))
joined = jax.jit(lambda cache: jkv.concat([cache.take([r]) for r in (2, 0, 1)]))
cropped = jax.jit(lambda cache, lengths: cache.crop(lengths))
forked = jax.jit(lambda cache, row: cache.take(row[None]).fork(ROWS))
dense = jax.jit(lambda cache: cache.convert(jkv.dense()))


@jax.jit
def evicted(cache):
    score = None if isinstance(cache.layers[0], Evicting) else jkv.scores.recency
    return cache.evict(NEWEST, score)


class Life(RuleBasedStateMachine):
    """One cache, and the lists of tokens that it should be."""

    case: Any
    appended = 0
    evicted = 0

    @initialize()
    def born(self):
        layer = self.case.kind.init(ROWS, SLOTS, HEADS, DIM, jnp.float32)
        self.cache = Cache.empty([layer], ROWS, SLOTS)
        self.rows = [[] for _ in range(ROWS)]
        self.next = 0

    @rule(size=st.sampled_from([11, 4, 1]), data=st.data())
    def append(self, size, data):
        limit = SLOTS - 1
        wanted = [data.draw(st.sampled_from([size, size - 1, 0])) for _ in self.rows]
        counts = [min(n, limit - len(row)) for n, row in zip(wanted, self.rows, strict=True)]
        width = 1 if size == 1 else 11  # few shapes: each is a compilation
        tokens = np.full((len(self.rows), width), 511, np.int32)
        for b, count in enumerate(counts):
            new = [(self.next + i) % 510 for i in range(count)]
            self.next += count
            tokens[b, :count] = new
        self.cache = appended(self.cache, tokens, np.asarray(counts, np.int32))
        for row, line, count in zip(self.rows, tokens, counts, strict=True):
            row.extend(line[:count].tolist())
            Life.appended += count

    @precondition(lambda self: any(self.rows))
    @rule(data=st.data())
    def crop(self, data):
        keep = [data.draw(st.integers(0, len(row))) for row in self.rows]
        rows = zip(self.rows, keep, strict=True)
        if not all(n == len(row) or self.case.rolls_back_from(len(row)) for row, n in rows):
            return
        jitted = self.case.rolls_back and not isinstance(self.cache.layers[0], Evicting)
        crop = cropped if jitted else Cache.crop
        self.cache = crop(self.cache, np.asarray(keep, np.int32))
        self.rows = [row[:n] for row, n in zip(self.rows, keep, strict=True)]

    @rule(data=st.data())
    def take(self, data):
        order = data.draw(st.permutations(range(ROWS)) | st.just([1, 1, 0]) | st.just([2, 0, 2]))
        self.cache = taken(self.cache, np.asarray(order))
        self.rows = [list(self.rows[r]) for r in order]

    @rule(row=st.integers(0, ROWS - 1))
    def fork(self, row):
        self.cache = forked(self.cache, np.int32(row))
        self.rows = [list(self.rows[row]) for _ in range(ROWS)]

    @rule()
    def part_and_join(self):
        self.cache = joined(self.cache)
        self.rows = [self.rows[-1], *self.rows[:-1]]

    @invariant()
    def every_position_holds_its_token(self):
        self.holds(self.cache, self.case.sees)

    def teardown(self):
        """At the end of a life: the same tokens in another kind, and the newest ones alone."""
        if not self.case.rolls_back:
            return
        if not isinstance(self.cache.layers[0], Evicting):  # which knows outside of a program only
            self.holds(dense(self.cache), self.case.sees)
        # One of them has made room for the token that asks.
        self.holds(evicted(self.cache), lambda query, position: query - position < NEWEST)
        Life.evicted += sum(max(len(row) - NEWEST, 0) for row in self.rows)

    def holds(self, cache, sees):
        assert np.asarray(cache.lengths).tolist() == [len(row) for row in self.rows]
        token = np.full(len(self.rows), 510, np.int32)
        got = np.asarray(asked(cache, token))
        for b, row in enumerate(self.rows):
            off = np.abs(got[:, b] - found(sees, row, 510)).max(axis=(1, 2))
            # What is found at a position without a token is a mixture, of which rounding makes
            # another one.
            wanted = [p for p in range(SLOTS) if self.case.exact or sees(len(row), p)]
            bound = 1e-4 if self.case.exact else self.case.off
            assert off[wanted].max() < bound, (b, row)


def lives(case):
    """Run some, the same each time; how many tokens were appended and evicted in all."""
    Life.appended = Life.evicted = 0
    # Without a seed, the lives would be others, and perhaps empty ones, in another Python.
    machine = seed(SEED)(type("Life", (Life,), {"case": case}))
    options = settings(
        max_examples=12,
        stateful_step_count=14,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=options)
    return Life.appended, Life.evicted


CASES = [case for case in KINDS if case.layered and case.recalls]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_random_lives(case):
    appended, evicted = lives(case)
    assert appended > 100
    assert evicted > 20 or not case.rolls_back


def test_a_lost_token_would_be_seen():
    """The machine itself: a cache that forgets one token, or doubles one, does not pass."""

    class Forgetful:
        name, exact, off, rolls_back = "forgetful", True, 0.0, True

        @staticmethod
        def sees(query, position):
            return position <= query and position != 3

        kind = jkv.dense()
        rolls_back_from = staticmethod(lambda held: True)

    with pytest.raises(AssertionError):
        lives(Forgetful)
