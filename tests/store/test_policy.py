"""Eviction policies against lists that are searched, by hand, and what an operation costs."""

from __future__ import annotations

import copy
import itertools
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jkv.store.policy import ARC, FIFO, LFU, LRU, SLRU, CostAware, Evictor, Policy
from jkv.store.policy import POLICIES as LIBRARY
from tests.store import models

PAIRS: dict[str, tuple[Policy, Any]] = {
    "fifo": (FIFO(), models.FIFO),
    "lru": (LRU(), models.LRU),
    "lfu": (LFU(), models.LFU),
    "lfu, no aging": (LFU(aging=False), models.NoAging),
    "slru": (SLRU(0.5), models.SLRU),
    "arc": (ARC(), models.ARC),
    "cost-aware": (CostAware(), models.CostAware),
}
EVERY = LIBRARY | {name: policy for name, (policy, _) in PAIRS.items() if name not in LIBRARY}
every_policy = pytest.mark.parametrize("policy", EVERY.values(), ids=list(EVERY))
CAPACITY = 6


def victim(evictor: Evictor) -> Any:
    try:
        return evictor.victim()
    except LookupError:
        return None


def drained(evictor: Evictor) -> list[Any]:
    """In which order everything would go; the evictor stays as it is."""
    evictor = copy.deepcopy(evictor)
    order = []
    while (key := victim(evictor)) is not None:
        evictor.evicted(key)
        order.append(key)
    return order


def serve(evictor: Evictor, trace: Any, capacity: int) -> list[bool]:
    """Which requests hit, with entries of one size."""
    hits = []
    for key in trace:
        hits.append(key in evictor)
        if hits[-1]:
            evictor.touch(key)
            continue
        evictor.expect(key)
        if len(evictor) == capacity:
            evictor.evicted(evictor.victim())
        evictor.add(key)
    return hits


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["ask", "ask", "ask", "evict", "hold", "release", "any", "remove", "expect", "update"]
        ),
        st.integers(0, 11),
        st.sampled_from([1, 1, 2, 3]),
        st.sampled_from([0.0, 1.0, 1.0, 5.0]),
    ),
    max_size=60,
)


def test_every_policy_of_the_library_has_a_model():
    assert {type(policy) for policy in LIBRARY.values()} == {type(p) for p, _ in PAIRS.values()}


@pytest.mark.parametrize("name", PAIRS)
@given(steps=STEPS)
@settings(max_examples=60, deadline=None)
def test_what_goes_next_is_what_a_search_finds(name, steps):
    policy, model = PAIRS[name]
    evictor, model = policy.start(CAPACITY), model(CAPACITY)
    for step, key, size, cost in steps:
        here = key in model.entries
        held = here and model.entries[key]["held"]
        if step == "ask" and here:
            both = [(m.touch, (key,)) for m in (evictor, model)]
        elif step == "ask":
            both = [(m.add, (key, size, cost)) for m in (evictor, model)]
        elif step == "evict" and model.victim() is not None:
            both = [(m.evicted, (model.victim(),)) for m in (evictor, model)]
        elif step == "any" and here and not held:
            both = [(m.evicted, (key,)) for m in (evictor, model)]
        elif step == "hold" and here and not held:
            both = [(m.hold, (key,)) for m in (evictor, model)]
        elif step == "release" and held:
            both = [(m.release, (key,)) for m in (evictor, model)]
        elif step == "update" and here:
            both = [(m.update, (key, size, cost)) for m in (evictor, model)]
        elif step == "remove" and here:
            both = [(m.removed, (key,)) for m in (evictor, model)]
        elif step == "expect" and not here:
            both = [(m.expect, (key,)) for m in (evictor, model)]
        else:
            continue
        for method, arguments in both:
            method(*arguments)
        assert victim(evictor) == model.victim()
        assert len(evictor) == len(model.entries)
        assert all((k in evictor) == (k in model.entries) for k in range(12))


class MostRecent(Evictor):
    """A policy of one's own: the latest goes first. No more than it must implement."""

    def __init__(self, capacity):
        super().__init__(capacity)
        self.stack = []

    def _insert(self, item):
        self.stack.append(item.key)

    def _touch(self, item):
        if not item.pinned:
            self._remove(item)
            self._insert(item)

    def _remove(self, item):
        self.stack.remove(item.key)

    def _next(self):
        return self.stack[-1]


def test_a_policy_of_one_s_own_owes_four_methods():
    assert Evictor.__abstractmethods__ == {"_insert", "_touch", "_remove", "_next"}
    evictor = MostRecent(4)
    for key in "abcd":
        evictor.add(key)
    evictor.hold("d")
    evictor.touch("d")
    evictor.touch("a")
    assert drained(evictor) == list("acb")
    evictor.release("d")
    evictor.update("b", size=2)
    assert drained(evictor) == list("dacb")
    evictor.hold("b")
    evictor.removed("b")
    evictor.hold("c")
    with pytest.raises(ValueError, match="is held"):
        evictor.evicted("c")
    assert drained(evictor) == list("da")
    assert len(evictor) == 3


@every_policy
def test_a_value_serves_several_tiers(policy):
    one, two = policy.start(2), policy.start(2)
    one.add("a")
    assert "a" in one
    assert "a" not in two
    assert policy == copy.copy(policy)
    with pytest.raises(AttributeError):
        policy.aging = False


@every_policy
def test_misuse_raises_and_changes_nothing(policy):
    evictor = policy.start(4)
    for key in "abcd":
        evictor.add(key)
    evictor.touch("b")
    evictor.hold("c")
    before = drained(evictor)
    assert sorted(before) == ["a", "b", "d"]
    for wrong, error in [
        (lambda: evictor.add("a"), ValueError),
        (lambda: evictor.add("c"), ValueError),
        (lambda: evictor.add("new", size=0), ValueError),
        (lambda: evictor.add("new", size=float("nan")), ValueError),
        (lambda: evictor.add("new", cost=-1), ValueError),
        (lambda: evictor.add("new", cost=float("inf")), ValueError),
        (lambda: evictor.touch("x"), KeyError),
        (lambda: evictor.update("x"), KeyError),
        (lambda: evictor.update("a", size=0), ValueError),
        (lambda: evictor.update("c", cost=-1), ValueError),
        (lambda: evictor.hold("x"), KeyError),
        (lambda: evictor.hold("c"), ValueError),
        (lambda: evictor.release("x"), KeyError),
        (lambda: evictor.release("a"), ValueError),
        (lambda: evictor.evicted("x"), KeyError),
        (lambda: evictor.evicted("c"), ValueError),
        (lambda: evictor.removed("x"), KeyError),
        (lambda: evictor.resize(0), ValueError),
    ]:
        with pytest.raises(error):
            wrong()
        assert drained(evictor) == before
        assert len(evictor) == 4
        assert "new" not in evictor
    evictor.release("c")
    assert sorted(drained(evictor)) == ["a", "b", "c", "d"]
    for key in "abcd":
        evictor.hold(key)
    with pytest.raises(LookupError, match="all 4 entries are held"):
        evictor.victim()
    evictor.removed("a")
    assert "a" not in evictor
    with pytest.raises(LookupError, match="no entry"):
        policy.start(1).victim()


@pytest.mark.parametrize("capacity", [0, -1, float("nan"), float("inf")])
@every_policy
def test_a_capacity_that_cannot_be(policy, capacity):
    with pytest.raises(ValueError, match="capacity got"):
        policy.start(capacity)


@pytest.mark.parametrize("share", [0, 1, -0.5, float("nan")])
def test_a_share_that_cannot_be(share):
    with pytest.raises(ValueError, match="protected got"):
        SLRU(share)


@every_policy
def test_asking_for_the_victim_changes_nothing(policy):
    asked, plain = policy.start(4), policy.start(4)
    rng = random.Random(0)
    for _ in range(200):
        key = rng.randrange(9)
        hits = [serve(evictor, [key], 4)[0] for evictor in (asked, plain)]
        assert hits[0] == hits[1]
        assert asked.victim() == asked.victim()
        assert drained(asked) == drained(plain)


def test_known_sequences():
    """By hand: a b c, b again, a again; then what goes, in order."""
    want = {
        "fifo": "abc",
        "lru": "cba",
        "lfu": "cba",
        "slru": "cba",
        "arc": "cba",
        "cost-aware": "cba",
    }
    for name, order in want.items():
        evictor = PAIRS[name][0].start(6)
        for key in "abc":
            evictor.add(key)
        evictor.touch("b")
        evictor.touch("a")
        assert "".join(drained(evictor)) == order, name


def test_fifo_keeps_the_place_of_what_was_held():
    evictor = FIFO().start(4)
    for key in "abcd":
        evictor.add(key)
    evictor.hold("a")
    assert evictor.victim() == "b"
    evictor.touch("a")
    evictor.release("a")
    assert drained(evictor) == list("abcd")


def test_lru_counts_what_was_held_as_used_until_now():
    evictor = LRU().start(4)
    for key in "abcd":
        evictor.add(key)
    evictor.hold("a")
    evictor.touch("b")
    evictor.release("a")
    assert drained(evictor) == list("cdba")


def test_lfu_ages():
    """What was popular once goes in the end; without aging it never does."""
    trace = ["old"] * 20 + list(range(100))
    aging, plain = (LFU(aging=a).start(3) for a in (True, False))
    serve(aging, trace, 3)
    serve(plain, trace, 3)
    assert "old" not in aging
    assert "old" in plain
    # By then newcomers stay long enough to be asked for twice.
    assert sum(serve(aging, [0, 1, 0, 1], 3)) == 2
    assert sum(serve(plain, [0, 1, 2, 0, 1, 2], 3)) == 0


def test_lfu_keeps_its_counts_while_held():
    evictor = LFU().start(3)
    for key in "ab":
        evictor.add(key)
    for _ in range(3):
        evictor.touch("a")
    evictor.hold("a")
    evictor.touch("a")
    evictor.release("a")
    evictor.touch("b")
    assert drained(evictor) == ["b", "a"]


@pytest.mark.parametrize(
    ("policy", "resists"),
    [(LRU(), False), (FIFO(), False), (SLRU(), True), (ARC(), True), (LFU(), True)],
    ids=lambda value: type(value).__name__,
)
def test_a_scan_passes_by_what_is_used_again(policy, resists):
    evictor = policy.start(10)
    hot = list(range(5))
    serve(evictor, hot * 3, 10)
    serve(evictor, range(100, 115), 10)
    assert all(serve(evictor, hot, 10)) == resists


def test_slru_by_hand():
    """Of 4, 2 are protected: the third that is used again pushes the oldest of them out."""
    evictor = SLRU(0.5).start(4)
    for key in "abcd":
        evictor.add(key)
    for key in "abc":
        evictor.touch(key)
    assert drained(evictor) == list("dabc")


def test_slru_counts_sizes():
    evictor = SLRU(0.5).start(8)
    evictor.add("a", size=3)
    evictor.add("b", size=3)
    evictor.touch("a")
    evictor.touch("b")  # 6 of 4: a is the newest of the first line
    evictor.add("c", size=1)
    assert drained(evictor) == list("acb")
    evictor.resize(2)  # b does not fit either: it is the newest of the first line
    assert drained(evictor) == list("acb")
    evictor.add("d", size=1)
    assert drained(evictor) == list("acbd")


@pytest.mark.parametrize("seed", range(6))
def test_arc_is_the_paper_s(seed):
    """Hit for hit, where entries have one size and room is made for what is expected."""
    rng = random.Random(seed)
    capacity = rng.randrange(1, 12)
    scans = itertools.count(1000)
    trace: list[int] = []
    for _ in range(60):
        span = rng.choice([4, 10, 30])
        trace += [rng.randrange(span) for _ in range(rng.randrange(20))]
        trace += [next(scans) for _ in range(rng.randrange(8))]
    assert serve(ARC().start(capacity), trace, capacity) == models.paper_arc(trace, capacity)


def test_arc_s_ghosts_move_the_target():
    evictor: Any = ARC().start(4)
    serve(evictor, "abab", 4)  # a and b in the second line
    serve(evictor, "cdefgh", 4)  # once each, two at a time; c, d, e, f are gone
    assert evictor._target == 0
    assert serve(evictor, "e", 4) == [False]  # e went too early: the first line gets room
    assert evictor._target > 0
    grown = evictor._target
    evictor.evicted("b")
    serve(evictor, "b", 4)  # and so did b of the second
    assert evictor._target < grown


def test_arc_learns_once_from_what_it_expects():
    evictor: Any = ARC().start(2)
    serve(evictor, "aab" + "c", 2)
    assert "b" not in evictor
    for _ in range(5):
        evictor.expect("b")
        assert evictor._target == 1
    evictor.evicted(evictor.victim())
    evictor.add("b")
    assert evictor._target == 1


def test_arc_remembers_no_more_than_it_may():
    evictor: Any = ARC().start(50)
    rng = random.Random(1)
    for _ in range(3000):
        serve(evictor, [rng.randrange(400)], 50)
        assert len(evictor._ghosts[0]) + len(evictor._ghosts[1]) <= 50
        assert evictor._learnt <= {*evictor._ghosts[0], *evictor._ghosts[1]}
    # Removed is not evicted: nothing remembers it.
    key = evictor.victim()
    evictor.removed(key)
    assert evictor._ghost_segment(key) is None


def test_cost_aware_by_hand():
    """Worth is uses x cost / size above that of what went last."""
    evictor = CostAware().start(100)
    evictor.add("cheap", size=10, cost=1)  # 0.1
    evictor.add("big", size=40, cost=8)  # 0.2
    evictor.add("dear", size=10, cost=9)  # 0.9
    assert drained(evictor) == ["cheap", "big", "dear"]
    evictor.touch("cheap")
    evictor.touch("cheap")  # 0.3
    assert drained(evictor) == ["big", "cheap", "dear"]
    evictor.evicted("big")  # the floor is 0.2 now
    evictor.add("new", size=10, cost=2)  # 0.4
    assert drained(evictor) == ["cheap", "new", "dear"]
    evictor.evicted("new")  # out of turn: 0.4
    evictor.add("newer", size=10, cost=6)  # 1.0
    assert drained(evictor) == ["cheap", "dear", "newer"]


@pytest.mark.parametrize("policy", [CostAware(), LFU(), FIFO()], ids=repr)
def test_a_heap_does_not_outgrow_its_entries(policy):
    evictor: Any = policy.start(10)
    evictor.add("first", cost=0)
    for i in range(500):
        evictor.add(i)
        evictor.hold("first")
        for _ in range(3):
            evictor.touch(i)
        evictor.hold(i)
        evictor.victim() if len(evictor) > 2 else None
        evictor.release("first")
        evictor.release(i)
        if i % 2:
            evictor.removed(i)
            evictor.removed(i - 1)
        assert len(evictor._heap) < 2 * len(evictor) + 70


def test_policies_need_no_jax():
    code = (
        "import sys; sys.modules['jax'] = sys.modules['numpy'] = None\n"
        "import jkv.store, jkv.store.policy\n"
        "assert jkv.store.LRU is jkv.store.policy.LRU\n"
        "assert 'LRU' in dir(jkv.store)\n"
        "try: jkv.store.nothing\n"
        "except AttributeError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no attribute 'nothing'" in done.stdout
