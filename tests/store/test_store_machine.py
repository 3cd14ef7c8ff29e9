"""Random lives of a store, on tiers that fail, against a plain dictionary."""

from __future__ import annotations

import contextlib
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jkv.errors import TierError
from jkv.store import Store
from jkv.store.keys import entry_name
from jkv.store.policy import POLICIES
from tests.store.fakes import Clock, Fake, check, entry, number

KEYS = st.sampled_from(["a", "b", "c", "d", "e", "f"])
TENANTS = st.sampled_from(["", "x"])
SIZES = st.sampled_from([10, 30, 30, 60, 150, 500])


class Life(RuleBasedStateMachine):
    """The store may forget, never err: a get gives what was put last, or nothing."""

    @initialize(
        policy=st.sampled_from([*POLICIES.values()]),
        tiers=st.integers(1, 3),
        through=st.booleans(),
        queue=st.sampled_from([1, 64]),
        header=st.sampled_from([0, 7]),
    )
    def born(self, policy, tiers, through, queue, header):
        self.clock = Clock()
        self.tiers = [
            Fake(200),
            Fake(300, 5, name="disk", header=header),
            Fake(400, name="remote"),
        ][-tiers:]
        self.made = {
            "policy": policy,
            "write_through": through,
            "queue_entries": queue,
            "tenant_bytes": {"x": 120},
            "clock": self.clock,
            "timer": self.clock,
        }
        self.latest: dict = {}
        self.handles: list = []
        self.count = 0
        self.faults = 0
        self.open()

    def open(self):
        self.store = Store(self.tiers, **self.made)
        self.accesses = 0

    def faulty(self):
        return any(any(tier.fail.values()) or tier.corrupt for tier in self.tiers)

    def expected(self, tenant, key):
        known = self.latest.get((tenant, key))
        return None if known is None or self.clock() >= known[1] else known[0]

    @rule(key=KEYS, tenant=TENANTS, size=SIZES, ttl=st.sampled_from([None, 5]), pin=st.booleans())
    def put(self, key, tenant, size, ttl, pin):
        self.count += 1
        pin = pin and self.count % 4 == 0
        kept = self.store.put(key, entry(self.count, size), tenant=tenant, ttl=ttl, pin=pin)
        self.latest.pop((tenant, key), None)
        if kept:
            end = self.clock() + ttl if ttl else float("inf")
            self.latest[tenant, key] = self.count, end
        elif not self.faulty() and not self.store.stats(detailed=True)["by_entry"]:
            # With nothing there, only what is larger than every tier has no room.
            assert size > max(t.max_bytes - t.header for t in self.tiers) or tenant == "x"

    @rule(keys=st.lists(KEYS, unique=True, max_size=4), tenant=TENANTS, size=SIZES)
    def put_many(self, keys, tenant, size):
        first = self.count + 1
        self.count += len(keys)
        values = [entry(first + i, size) for i in range(len(keys))]
        kept = self.store.put_many(keys, values, tenant=tenant)
        for i, key in enumerate(keys):
            self.latest.pop((tenant, key), None)
            if kept[i]:
                self.latest[tenant, key] = first + i, float("inf")

    @rule(key=KEYS, tenant=TENANTS)
    def get(self, key, tenant):
        sure = self.resident(tenant, key) and not self.faulty()
        got = number(self.store.get(key, tenant=tenant))
        self.accesses += 1
        assert got in (None, self.expected(tenant, key))
        if sure:
            assert got == self.expected(tenant, key)

    @rule(keys=st.lists(KEYS, max_size=4), tenant=TENANTS)
    def get_many(self, keys, tenant):
        got = self.store.get_many(keys, tenant=tenant)
        self.accesses += len(keys)
        for key, what in zip(keys, got, strict=True):
            assert number(what) in (None, self.expected(tenant, key))

    def resident(self, tenant, key):
        return any(
            (e["tenant"], e["key"]) == (tenant, key)
            for e in self.store.stats(detailed=True)["by_entry"]
        )

    @rule(key=KEYS, tenant=TENANTS)
    def contains(self, key, tenant):
        found = self.store.contains(key, tenant=tenant)
        assert not found or self.expected(tenant, key) is not None

    @rule(key=KEYS, tenant=TENANTS)
    def remove(self, key, tenant):
        faulty = self.faulty()
        try:
            self.store.remove(key, tenant=tenant)
        except TierError:  # it is not said to be gone where it may not be
            assert faulty
        else:
            assert all(entry_name(tenant, key) not in tier.entries for tier in self.tiers)
        self.latest.pop((tenant, key), None)
        assert not self.resident(tenant, key)

    @precondition(lambda self: len(self.handles) < 2)
    @rule(key=KEYS, tenant=TENANTS)
    def hold(self, key, tenant):
        self.accesses += 1
        try:
            handle = self.store.open(key, tenant=tenant)
        except KeyError:
            return
        self.handles.append((handle, tenant, self.latest[tenant, key]))

    @precondition(lambda self: self.handles)
    @rule()
    def release(self):
        handle, _, known = self.handles.pop()
        assert number(handle.entry) == known[0]
        handle.release()
        handle.release()

    @rule(key=KEYS)
    def unpin(self, key):
        self.store.unpin(key)

    @rule(keys=st.lists(KEYS, max_size=3))
    def prefetch(self, keys):
        self.store.prefetch(keys)

    @rule(at=st.integers(0, 2), limit=st.sampled_from([100, 200, 300]))
    def resize(self, at, limit):
        if at < len(self.tiers) and not self.handles:
            self.store.resize(at, max_bytes=limit)

    @rule(seconds=st.sampled_from([1, 4, 100]))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule(older_than=st.sampled_from([None, 50]))
    def sweep(self, older_than):
        self.store.sweep(older_than)

    @rule()
    def clear(self):
        with contextlib.suppress(TierError):
            self.store.clear(tenant="x")
        self.latest = {k: v for k, v in self.latest.items() if k[0] != "x"}

    @rule(
        at=st.integers(0, 2),
        what=st.sampled_from(["write", "read", "delete"]),
        times=st.integers(1, 3),
    )
    def fail(self, at, what, times):
        if at < len(self.tiers):
            self.faults += 1
            self.tiers[at].fail[what] = times

    @rule(at=st.integers(0, 2), key=KEYS, tenant=TENANTS)
    def damage(self, at, key, tenant):
        name = entry_name(tenant, key)
        if at < len(self.tiers) and name in self.tiers[at].entries:
            self.faults += 1
            self.tiers[at].corrupt.add(name)

    @rule()
    def mend(self):
        for tier in self.tiers:
            tier.fail = dict.fromkeys(tier.fail, 0)
            tier.corrupt.clear()

    @rule()
    def drain(self):
        self.store.drain()
        sound = not self.faulty() and not self.faults
        figures = check(self.store, self.accesses, exact=not self.pinned_over())
        if sound:
            assert figures["lost"] == 0
            for state, tier in zip(self.store._index.tiers, self.tiers, strict=True):
                assert state.bytes == tier.nbytes
            for handle, tenant, known in self.handles:
                if self.latest.get((tenant, handle.key)) == known and known[1] > self.clock():
                    assert self.resident(tenant, handle.key)

    def pinned_over(self):
        """What is pinned or held does not go where a limit was lowered, or nothing can be freed."""
        return self.faults or any(e["pinned"] for e in self.store.stats(detailed=True)["by_entry"])

    @rule()
    def restart(self):
        self.mend()
        for handle, *_ in self.handles:
            handle.release()
        self.handles = []
        self.store.close()
        check(self.store, self.accesses, exact=False)
        if not self.tiers[0].persistent:
            self.tiers[0].entries.clear()
        self.open()

    @invariant()
    def balanced(self):
        check(self.store, self.accesses, exact=False)

    def teardown(self):
        if hasattr(self, "store"):
            self.mend()
            self.handles = []
            self.store.close()


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=int(os.environ.get("JKV_EXAMPLES", 60)),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
