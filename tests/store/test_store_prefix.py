"""Entries found by what they were made of, and by nothing that is only like it."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jkv.store import Disk, Memory, Remote, Store, keys, lifecycle
from tests.store.fakes import Batched, Clock, Fake, check, entry, number

TEXT = list(range(100, 150))


def length(store, tokens, **more):
    """Tokens found, and none where there is no entry."""
    match = store.longest_prefix(tokens, **more)
    if match is None:
        return 0
    with match:
        return match.length


def test_any_prefix_of_a_chunk_and_more_is_found_to_the_token():
    with Store([Fake()], chunk=4) as store:
        key = store.put(None, entry(1), tokens=TEXT)
        assert key.startswith("sha256:")
        for same in range(len(TEXT) + 1):
            asked = [*TEXT[:same], 7, 8, 9, 10, 11]
            assert length(store, asked) == (same if same >= 4 else 0), same
            assert length(store, TEXT[:same]) == (same if same >= 4 else 0)
        with store.longest_prefix(TEXT) as match:
            assert (match.key, number(match.value)) == (key, 1)
        assert number(store.get(key)) == 1
        assert store.put(None, entry(2), tokens=np.array(TEXT)) == key
        figures = check(store)
        assert figures["replaced"] == 1
        assert figures["tokens_found"] <= figures["tokens_asked"]
        store.remove(key)
        assert length(store, TEXT) == 0
        assert len(store._index.prefixes) == 0


def test_a_limit_leaves_tokens_to_compute():
    with Store([Fake()], chunk=4) as store:
        store.put("a", entry(1), tokens=TEXT[:16])
        assert length(store, TEXT[:16]) == 16
        assert length(store, TEXT[:16], limit=15) == 15
        assert length(store, TEXT[:16], limit=3) == 0


def test_the_longest_of_several_then_the_nearest():
    memory, disk = Fake(100), Fake(name="disk")
    with Store([memory, disk], chunk=4) as store:
        store.put("long", entry(1), tokens=TEXT[:20])
        store.put("other", entry(2), tokens=[*TEXT[:20], 1, 2])
        store.put("short", entry(3), tokens=TEXT[:10])
        store.drain()
        assert "0::short" in memory.entries
        with store.longest_prefix([*TEXT[:20], 1, 3]) as match:
            assert (match.key, match.length) == ("other", 21)
        store.drain()
        store.get("long")
        store.drain()
        assert "0::long" in memory.entries
        with store.longest_prefix(TEXT) as match:
            assert (match.key, match.length) == ("long", 20)
        with store.longest_prefix([*TEXT[:9], 0, 0]) as match:
            assert (match.key, match.length) == ("long", 9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_as_a_search_through_all(seed, chunk):
    draw = random.Random(seed)
    with Store([Fake()], chunk=chunk) as store:
        known = {}
        for i in range(20):
            stem = draw.choice([[], *known.values()])
            tokens = [*stem[: draw.randrange(9)], *(draw.randrange(2) for _ in range(12))]
            known[str(i)] = tokens
            store.put(str(i), entry(i), tokens=tokens)
            if draw.random() < 0.2:
                gone = draw.choice(list(known))
                store.remove(gone)
                del known[gone]
            asked = [draw.randrange(2) for _ in range(draw.randrange(16))]
            common = [
                next(
                    (i for i, (x, y) in enumerate(zip(a, asked, strict=False)) if x != y),
                    min(len(a), len(asked)),
                )
                for a in known.values()
            ]
            best = max(common, default=0)
            assert length(store, asked) == (best if best >= chunk else 0)


@pytest.mark.parametrize(
    ("changed", "more"),
    [
        ("fingerprint", {"fingerprint": b"other weights"}),
        ("fingerprint, by a byte", {"fingerprint": b"weight"}),
        ("tenant", {"tenant": "y"}),
        ("no tenant", {"tenant": ""}),
        ("both, joined alike", {"fingerprint": b"weightsx", "tenant": ""}),
    ],
)
def test_every_part_of_a_key_counts(changed, more):
    same = {"fingerprint": b"weights", "tenant": "x"}
    with Store([Fake()], chunk=4) as store:
        key = store.put(None, entry(1), tokens=TEXT, **same)
        assert length(store, TEXT, **same) == 50, changed
        assert length(store, TEXT, **{**same, **more}) == 0
        assert number(store.get(key, **same)) == 1
        assert store.get(key, **{**same, **more}) is None
        assert not store.contains(key, **{**same, **more})
        assert store.contains(key, **same)
        check(store)


def test_a_token_that_is_another_one():
    with Store([Fake()], chunk=4) as store:
        store.put("a", entry(1), tokens=TEXT)
        for at in range(8):
            asked = list(TEXT)
            asked[at] += 2**16  # the same in its lower bits
            assert length(store, asked) == (at if at >= 4 else 0)


def test_what_the_digest_would_not_tell_apart_the_tokens_do(monkeypatch):
    monkeypatch.setattr(keys.digest, "chain", lambda parent, tokens: b"the same")
    with Store([Fake()], chunk=4) as store:
        store.put("a", entry(1), tokens=TEXT, tenant="x", fingerprint=b"w")
        assert length(store, TEXT, tenant="x", fingerprint=b"w") == 50
        assert length(store, [5, *TEXT[1:]], tenant="x", fingerprint=b"w") == 0
        assert length(store, TEXT, tenant="y", fingerprint=b"w") == 0
        assert length(store, TEXT, tenant="x", fingerprint=b"v") == 0


def test_the_stores_own_fingerprint_is_asked_for():
    tier = Fake(name="disk")
    with Store([tier], fingerprint=b"one", chunk=4) as store:
        store.put("a", entry(1), tokens=TEXT)
        assert number(store.get("a")) == 1
    for learned in (True, False):
        with Store([tier], fingerprint=b"two", chunk=4) as store:
            if learned:
                store.drain()
            assert store.get("a") is None
            assert length(store, TEXT) == 0
            assert number(store.get("a", fingerprint=b"one")) == 1
            assert length(store, TEXT, fingerprint=b"one") == 50
            assert check(store)["misses_by_reason"]["foreign"] == 1
            store.put("a", entry(1), tokens=TEXT, fingerprint=b"one")


def test_entries_of_which_nothing_can_be_cut():
    with Store([Fake()], chunk=4) as store:
        store.put("ring", entry(1), tokens=TEXT[:30], whole=True)
        assert length(store, TEXT[:29]) == 0
        assert length(store, TEXT[:30]) == 30
        assert length(store, TEXT) == 30
        assert length(store, TEXT, limit=29) == 0
        store.put("plain", entry(2), tokens=TEXT[:10])
        assert length(store, TEXT[:29]) == 10  # a shorter one, where the longer one is of no use


@pytest.mark.parametrize("lasting", [Disk, lambda path: Remote(f"file://{path}/")])
def test_it_is_found_after_a_restart(tmp_path, lasting):
    clock = Clock()
    with Store([Memory(), lasting(tmp_path)], chunk=4, clock=clock) as store:
        store.put("a", entry(1), tokens=TEXT[:30], seconds=3, tenant="x")
        store.put("b", entry(2), tokens=TEXT[:40], whole=True, ttl=10, tenant="x")
    clock.now += 1
    with Store([Memory(), lasting(tmp_path)], chunk=8, clock=clock) as store:  # any chunk
        store.drain()
        assert length(store, TEXT, tenant="x") == 40
        assert length(store, TEXT[:39], tenant="x") == 30
        assert length(store, TEXT) == 0
        assert check(store, accesses=3)["seconds_saved"] == 3
        clock.now += 9
        assert length(store, TEXT, tenant="x") == 30
        (it,) = [e for e in store.stats(detailed=True)["by_entry"] if e["key"] == "a"]
        assert (it["created"], it["tokens"], it["seconds"]) == (1000, 30, 3)


def test_a_search_waits_for_what_is_there_from_before(monkeypatch):
    monkeypatch.setattr(lifecycle, "_INDEX_WAIT", 60.0)  # longer than any machine is busy
    tier = Fake(name="disk")
    with Store([tier], chunk=4) as store:
        store.put("a", entry(1), tokens=TEXT)
    describe = tier.describe
    for search in ("longest_prefix", "longest_prefix_many"):
        asked = threading.Event()

        def slow(name, asked=asked):
            assert asked.wait(60)  # nothing is indexed before it is asked for
            return describe(name)

        monkeypatch.setattr(tier, "describe", slow)
        with Store([tier], chunk=4) as store:
            waited = store._lifecycle.indexed.wait
            monkeypatch.setattr(
                store._lifecycle.indexed, "wait", lambda *a, w=waited, e=asked: e.set() or w(*a)
            )
            found = getattr(store, search)(TEXT if search == "longest_prefix" else [TEXT])
            assert (found if search == "longest_prefix" else found[0]).length == 50


def test_a_match_is_held_and_a_corrupt_one_is_passed_over():
    disk = Fake(400, name="disk")
    with Store([disk], chunk=4) as store:
        store.put("long", entry(1), tokens=TEXT[:30])
        store.put("short", entry(2), tokens=TEXT[:20])
        disk.corrupt.add("0::long")
        match = store.longest_prefix(TEXT)
        assert (match.key, match.length) == ("short", 20)
        for i in range(9):
            store.put(f"k{i}", entry(i))
        assert "0::short" in disk.entries
        match.release()
        for i in range(9):
            store.put(f"k{i}", entry(i))
        assert "0::short" not in disk.entries
        figures = check(store, accesses=1)
        assert (figures["hits"], figures["lost"]) == (1, 1)


def test_several_are_found_as_each_alone():
    tier = Batched(name="disk")
    rows = [TEXT, [7, 7, 7, 7, 7], TEXT[:20], [*TEXT[:9], 5], TEXT, []]
    limits = [49, None, 19, None, 30, None]
    with Store([tier], chunk=4) as store:
        store.put("long", entry(1), tokens=TEXT[:30], tenant="x")
        store.put("short", entry(2), tokens=TEXT[:20], tenant="x")
        store.put("theirs", entry(3), tokens=TEXT)
        alone = [
            length(store, row, limit=limit, tenant="x")
            for row, limit in zip(rows, limits, strict=True)
        ]
        assert alone == [30, 0, 19, 9, 30, 0]
        tier.calls.clear()
        matches = store.longest_prefix_many(rows, limits=limits, tenant="x")
        assert [0 if m is None else m.length for m in matches] == alone
        (read,) = [call for call in tier.calls if call[0] == "read_many"]
        assert read[1] <= 2  # each entry once
        figures = check(store, accesses=12)
        assert figures["tenants"]["x"]["hits"] == 8
        assert figures["tenants"]["x"]["tokens_found"] == 2 * sum(alone)
        # Each is held until it is let go of, though two are one entry.
        for match in matches[:-2]:
            if match is not None:
                match.release()
        store.resize(0, max_entries=1)
        assert matches[4].key in {name.split(":")[-1] for name in tier.entries}
        with pytest.raises(ValueError, match=r"shorter|longer"):
            store.longest_prefix_many(rows, limits=[1])
        assert store.longest_prefix_many([]) == []


def test_of_several_each_falls_back_by_itself():
    tier = Batched(name="disk")
    with Store([tier], chunk=4) as store:
        store.put("long", entry(1), tokens=TEXT[:30])
        store.put("short", entry(2), tokens=TEXT[:20])
        tier.corrupt.add("0::long")
        matches = store.longest_prefix_many([TEXT, TEXT[:18], [1, 2, 3, 4]])
        assert [m and (m.key, m.length) for m in matches] == [("short", 20), ("short", 18), None]
        assert check(store, accesses=3)["hits"] == 2


def test_a_prefix_is_declined_by_its_share():
    timer = Clock(0)
    disk = Fake(name="disk")
    read = disk.read

    def slow(key):
        timer.now += 1
        return read(key)

    disk.read = slow
    with Store([disk], chunk=4, timer=timer) as store:
        store.put("a", entry(1), tokens=TEXT, seconds=1.5)
        assert length(store, TEXT) == 50
        assert length(store, TEXT) == 50
        assert length(store, TEXT[:25]) == 0  # 0.75 seconds to make, 1 to read
        assert length(store, TEXT[:25], recompute_seconds=1.1) == 25
        assert check(store, accesses=4)["misses_by_reason"]["declined"] == 1


def test_names():
    texts = ["", "a", "1:a", ":", "1::", "ü", "0::a", "a:b"]
    made = {keys.entry_name(t, k): (t, k) for t in texts for k in texts}
    assert len(made) == len(texts) ** 2
    assert all(keys.split_name(name) == pair for name, pair in made.items())
    assert keys.split_name("somebody else's") == ("", "somebody else's")
    assert keys.content_key(b"", np.arange(3)) != keys.content_key(b"", np.arange(4))
    assert keys.content_key(b"a", np.arange(3)) != keys.content_key(b"", np.arange(3))


def test_marks_say_whose_they_are():
    ids = np.arange(8)
    mine = list(keys.prefix_hashes(b"weights", "x", ids, 4))
    assert len(set(mine)) == 2
    assert mine == list(keys.prefix_hashes(b"weights", "x", np.arange(11), 4))
    for other in (
        keys.prefix_hashes(b"other", "x", ids, 4),
        keys.prefix_hashes(b"weights", "y", ids, 4),
        keys.prefix_hashes(b"weightsx", "", ids, 4),
        keys.prefix_hashes(b"weights", "x", ids, 8),
        keys.prefix_hashes(b"weights", "x", ids + 1, 4),
    ):
        assert not set(mine) & set(other)
