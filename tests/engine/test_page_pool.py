"""The page pool: owners and contents of pages, what is found again, and what that costs."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from jkv.engine.page_pool import PagePool, PageSequence
from jkv.errors import PoolFullError
from jkv.store.policy import ARC, LFU, LRU, SLRU, CostAware
from tests.engine.rows import POLICIES, Device, name, snapshot

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_forks_of_a_partly_filled_page(order):
    """Each writes its own tokens after the same ones; then they close, in all orders."""
    device = Device(pages=6, page=4)
    first, _ = device.prompt([1, 2, 3, 4, 5])
    rows = [first, device.fork(first), device.fork(first)]
    assert device.pool.stats()["used"] == 2
    assert device.pool.stats()["shared"] == 2
    for i, row in enumerate(rows):
        last = i == 2  # alone by then: it writes where the others were
        assert device.pool.needs(row.seq, 6) == (not last)
        copies = row.seq.reserve(6)
        assert len(copies) == (not last)
        device.perform(copies)
        device.write(row, [60 + i])
        device.check()
    assert [row.tokens[-1] for row in rows] == [60, 61, 62]
    assert device.pool.stats()["copies"] == 2
    assert device.pool.stats()["used"] == 4
    for i in order:
        device.close(rows[i])
        device.check()
    assert device.pool.stats()["used"] == 0
    assert device.pool.stats()["cached"] == 1


def test_a_full_page_is_shared_without_a_copy():
    device = Device(pages=6, page=4)
    first, _ = device.prompt([1, 2, 3, 4])
    other = device.fork(first)
    assert first.seq.reserve(5) == []
    assert other.seq.reserve(5) == []
    assert first.seq.table[0] == other.seq.table[0]
    assert first.seq.table[1] != other.seq.table[1]


def test_a_published_page_is_not_written():
    """Cropped in its middle and written again: the old and the new contents are both found."""
    device = Device(pages=6, page=4)
    row, _ = device.prompt([1, 2, 3, 4, 5, 6, 7, 8])
    row.seq.crop(6)
    del row.tokens[6:]
    assert device.pool.needs(row.seq, 6) == 0
    assert device.pool.needs(row.seq, 8) == 1
    old = row.seq.table[1]
    device.extend(row, [70, 80])
    assert row.seq.table[1] != old
    device.check()
    for tail in ([7, 8], [70, 80]):
        seq = device.pool.sequence()
        assert seq.match([1, 2, 3, 4, 5, 6, *tail]) == 8
        assert device.contents[seq.table[1]] == [5, 6, *tail]
        seq.close()


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_prompts_of_exactly_so_many_pages(pages):
    """A cold pool has nothing; a warm one all but the page with the last token, or all."""
    page = 4
    tokens = list(range(pages * page))
    device = Device(pages=12, page=page)
    row, found = device.prompt(tokens)
    assert found == 0
    warm, found = device.prompt(tokens)  # while the first still has them
    assert found == (pages - 1) * page
    device.close(row)
    device.close(warm)
    row, found = device.prompt(tokens)  # and once all are closed
    assert found == (pages - 1) * page
    assert device.pool.stats()["hits_tokens"] == 2 * (pages - 1) * page
    assert device.pool.stats()["asked_tokens"] == 3 * pages * page
    seq = device.pool.sequence()
    assert seq.match(tokens) == pages * page
    seq.crop(0)
    assert seq.match([*tokens, 99], limit=len(tokens)) == pages * page
    seq.crop(0)
    assert seq.match(tokens, limit=0) == 0
    assert seq.match(tokens, limit=-1) == 0
    assert seq.match(tokens[:-1]) == (pages - 1) * page
    device.pool.check()


def test_outputs_are_found_by_the_next_turn():
    device = Device(pages=12, page=4)
    row, _ = device.prompt([1, 2, 3])
    for token in (4, 5, 6, 7, 8):
        device.extend(row, [token])
    # 9 was sampled and is not written: it is not published either.
    device.close(row)
    _, found = device.prompt([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert found == 8
    _, found = device.prompt([1, 2, 3, 4, 5, 6, 7, 9, 9, 10])
    assert found == 4


def test_equal_pages_are_kept_once():
    """Of two sequences that computed the same page, the first one's is found, and one freed."""
    device = Device(pages=6, page=2)
    tokens = [1, 2, 3]
    rows = []
    for _ in range(2):
        row = device.new()
        assert row.seq.match(tokens, limit=2) == 0
        rows.append(row)
    for row in rows:
        device.extend(row, tokens)
    assert device.pool.stats()["used"] == 4
    first = rows[0].seq.table[0]
    device.close(rows[1])
    device.close(rows[0])
    assert device.pool.stats()["cached"] == 1
    row, found = device.prompt(tokens)
    assert found == 2
    assert row.seq.table[0] == first


def test_publishing_again_changes_nothing():
    device = Device(pages=6, page=2)
    row, _ = device.prompt([1, 2, 3, 4, 5])
    before = snapshot(device.pool)
    row.seq.publish(row.tokens)
    row.seq.publish(row.tokens[:3])
    assert snapshot(device.pool) == before


@pytest.mark.parametrize("policy", [LRU(), LFU(), SLRU(), ARC(), CostAware()], ids=repr)
def test_the_end_of_a_chain_is_evicted_first(policy):
    """Pages behind an evicted one could not be found."""
    device = Device(pages=6, page=2, policy=policy)
    row, _ = device.prompt([1, 2, 3, 4, 5, 6, 7, 8])
    device.close(row)
    for pages, left in [(3, 6), (4, 4), (5, 2), (6, 0)]:
        filler = device.pool.sequence()
        filler.reserve(2 * pages)
        filler.close()
        seq = device.pool.sequence()
        assert seq.match([1, 2, 3, 4, 5, 6, 7, 8]) == left
        seq.close()
    assert device.pool.stats()["evicted"] == 4


def test_an_evicted_page_is_not_found():
    device = Device(pages=3, page=2)
    row, _ = device.prompt([1, 2, 3])
    device.close(row)
    assert device.pool.stats()["cached"] == 1
    assert device.pool.free_pages == 3
    row, found = device.prompt([5, 6, 7, 8, 9])
    assert found == 0
    assert device.pool.stats()["evicted"] == 1
    device.close(row)
    _, found = device.prompt([1, 2, 3])
    assert found == 0


def test_the_policy_sees_each_use():
    """LFU keeps the prefix that was used most, LRU the one that was used last."""
    kept = {}
    for policy in (LRU(), LFU()):
        device = Device(pages=4, page=2, policy=policy)
        for tokens in [[1, 2, 0]] * 4 + [[3, 4, 0]]:
            row, _ = device.prompt(tokens)
            device.close(row)
        assert device.pool.stats()["cached"] == 2
        filler = device.pool.sequence()
        filler.reserve(6)
        ((_, left),) = device.pool.cached()
        kept[type(policy)] = device.contents[left]
    assert kept == {LRU: [3, 4], LFU: [1, 2]}


# Each is not found by the other, and found by itself.
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("", [1, 2, 3, 4, 0]), ("a", [1, 2, 3, 4, 0])),
        (("a", [1, 2, 3, 4, 0]), ("aa", [1, 2, 3, 4, 0])),
        (("a", [1, 2, 3, 4, 0]), ("a\0", [1, 2, 3, 4, 0])),
        (("1", [2, 3, 4, 5, 0]), ("12", [3, 4, 5, 6, 0])),
        (("", [1, 2, 3, 4, 0]), ("", [2, 1, 3, 4, 0])),
        (("", [12, 3, 4, 5, 0]), ("", [1, 23, 4, 5, 0])),
        (("", [1, 256, 3, 4, 0]), ("", [257, 0, 3, 4, 0])),
        (("", [0, 0, 1, 1, 0]), ("", [1, 1, 0, 0, 0])),
        (("", [-1, 2, 3, 4, 0]), ("", [1, 2, 3, 4, 0])),
        (("\ud800", [1, 2, 3, 4, 0]), ("\ud801", [1, 2, 3, 4, 0])),
    ],
)
def test_other_contents_are_not_found(one, other):
    device = Device(pages=20, page=2)
    for tenant, tokens in (one, other):
        row, found = device.prompt(tokens, tenant)
        assert found == 0
        device.close(row)
    for tenant, tokens in (one, other):
        row, found = device.prompt(tokens, tenant)
        assert found == 4
        device.check()


def test_a_name_depends_on_the_tokens_before_the_page():
    """The same page after another one is another page."""
    device = Device(pages=20, page=2)
    device.prompt([1, 2, 3, 4, 0])
    _, found = device.prompt([9, 9, 3, 4, 0])
    assert found == 0
    _, found = device.prompt([1, 2, 9, 9, 0])
    assert found == 2


def names_of(fingerprint: bytes, tenant: str, page: int = 2) -> set[bytes]:
    device = Device(pages=4, page=page, fingerprint=fingerprint)
    row, _ = device.prompt([1, 2, 3, 4, 0], tenant)
    names = row.seq.names(row.tokens)
    device.close(row)
    assert {name for name, _ in device.pool.cached()} == set(names)
    return set(names)


def test_names_depend_on_model_tenant_and_page():
    parts = [(b"ab", "c", 2), (b"a", "bc", 2), (b"abc", "", 2), (b"", "abc", 2), (b"ab", "c", 4)]
    names = [names_of(*part) for part in parts]
    for a, b in itertools.combinations(names, 2):
        assert not a & b
    for part, found in zip(parts, names, strict=True):
        assert names_of(*part) == found


def test_names_are_the_same_in_every_process():
    code = (
        "from jkv.engine.page_pool import PagePool\n"
        "p = PagePool(pages=2, page=2, fingerprint=b'm'); s = p.sequence(tenant='t')\n"
        "s.reserve(4); s.publish([1, 2, 3, 4]); print([n.hex() for n in s.names([1, 2, 3, 4])])\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", "import sys; sys.modules['jax'] = None\n" + code],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    pool = PagePool(pages=2, page=2, fingerprint=b"m")
    assert printed == {str([name(pool, "t", [1, 2, 3, 4][:n]).hex() for n in (2, 4)])}


def test_misuse_raises_and_changes_nothing():
    device = Device(pages=6, page=2)
    pool = device.pool
    row, _ = device.prompt([1, 2, 3, 4, 5])
    other, _ = device.prompt([1, 2, 7])
    closed = pool.sequence()
    closed.close()
    row.seq.drop_before(2)
    foreign = PagePool(pages=6, page=2).sequence()
    before = snapshot(pool)
    for error, wrong in [
        (PoolFullError, lambda: row.seq.reserve(100)),
        (ValueError, lambda: row.seq.match([1, 2])),
        (ValueError, lambda: row.seq.publish([1, 2, 3, 4, 5, 6])),
        (ValueError, lambda: row.seq.crop(6)),
        (ValueError, lambda: row.seq.crop(-1)),
        (ValueError, lambda: row.seq.crop(1)),
        (ValueError, lambda: row.seq.drop_before(6)),
        (ValueError, lambda: pool.needs(foreign, 3)),
        (ValueError, lambda: pool.needs(closed, 3)),
        (ValueError, lambda: closed.close()),
        (ValueError, lambda: closed.fork()),
        (ValueError, lambda: closed.crop(0)),
        (ValueError, lambda: closed.match([1])),
        (ValueError, lambda: closed.publish([])),
        (ValueError, lambda: closed.reserve(1)),
        (ValueError, lambda: closed.drop_before(0)),
        (TypeError, lambda: pool.sequence().match([1, 2**70])),
    ]:
        with pytest.raises(error):
            wrong()
        for seq in pool._open - {r.seq for r in device.rows}:
            seq.close()
        assert snapshot(pool) == before
    device.extend(other, [8], publish=False)
    with pytest.raises(TypeError, match="whole numbers"):
        other.seq.publish([1, 2, 7, 2**63])
    assert row.seq.reserve(3) == []  # it has them
    device.close(row)
    device.close(other)
    assert pool.free_pages == 6
    for pages, page in [(0, 1), (1, 0)]:
        with pytest.raises(ValueError, match="at least 1 of each"):
            PagePool(pages=pages, page=page)


def test_extend_equals_reserve_where_pages_are_free():
    tables = []
    for way in (PageSequence.reserve, PageSequence.extend):
        pool = PagePool(pages=8, page=4)
        old = pool.sequence()
        old.reserve(8)
        old.publish(list(range(8)))
        old.close()  # two pages that are found, and go last
        one, other = pool.sequence(), pool.sequence()
        one.reserve(3)
        other.reserve(4)
        for seq, length in ((one, 4), (one, 5), (other, 5), (one, 13), (other, 14)):
            way(seq, length)
        pool.check()
        tables.append((one.table, other.table, one.length, other.length, pool.stats()))
    assert tables[0] == tables[1]
    assert tables[0][-1]["evicted"] == 2


def test_drop_before_releases_pages():
    device = Device(pages=3, page=4)
    row = device.new()
    for token in range(40):
        device.extend(row, [token])
        row.seq.drop_before(max(0, token - 3))
        assert device.pool.stats()["used"] <= 2
        device.check()
    assert row.seq.table[:9] == [-1] * 9
    other = device.fork(row)
    device.close(row)
    device.check()
    other.seq.crop(0)
    other.tokens = []
    device.extend(other, [1, 2])
    device.check()


def test_nothing_is_found_after_clear():
    device = Device(pages=8, page=2)
    old, _ = device.prompt([1, 2, 3])
    gone, _ = device.prompt([5, 6, 7])
    device.close(gone)
    device.pool.clear()
    device.check()
    assert device.pool.stats()["cached"] == 0
    device.extend(old, [4, 5])  # from before, and so is what it writes
    device.close(old)
    assert device.pool.stats()["cached"] == 0
    for found in (0, 4):
        row, got = device.prompt([1, 2, 3, 4, 5])
        assert got == found
        device.close(row)


def test_the_pool_empties_in_any_order():
    rng = random.Random(0)
    for _ in range(20):
        device = Device(pages=16, page=2, policy=rng.choice(POLICIES))
        rows = [device.prompt([rng.randrange(2) for _ in range(4)])[0] for _ in range(4)]
        rows += [device.fork(rng.choice(rows)) for _ in range(3)]
        rng.shuffle(rows)
        for row in rows:
            device.close(row)
            device.check()
        assert device.pool.free_pages == 16


def cost_ratio(measure: str, pages: int) -> float:
    """Return the cost of a request among so many pages, over that among 1000."""
    # In another process: here every call is checked, which takes longer than what it does.
    code = f"from tests.engine.cost import *; print({measure}({pages}) / {measure}(1000))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return float(done.stdout)


def test_the_operations_of_a_request_do_not_grow_with_the_pool():
    assert cost_ratio("counted", 30_000) < 1.1


@pytest.mark.soak
def test_the_time_of_a_request_does_not_grow_with_the_pool():
    assert cost_ratio("timed", 10**6) < 8  # a search in C through all takes 15 times as long
