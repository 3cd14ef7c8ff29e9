"""What is done before it is asked for."""

from __future__ import annotations

import time

import pytest

from jkv.store import Predictor, Store
from jkv.store.prefetch import Prefetcher
from tests.store.fakes import Clock, Fake, check, entry, number


def test_warming_makes_what_is_missing():
    made = []

    def make(item):
        made.append(item)
        return entry(len(made))

    with Store([Fake()], chunk=4) as store:
        store.put("a", entry(9))
        assert store.warm(["a", "b", range(20), list(range(20)), range(10)], make, seconds=1.0) == 3
        assert [x if isinstance(x, str) else list(x) for x in made] == [
            "b",
            list(range(20)),
            list(range(10)),
        ]
        assert number(store.get("a")) == 9
        with store.longest_prefix(range(20)) as match:
            assert match.length == 20
        assert store.warm(["b", range(20)], make) == 0
        check(store, accesses=2)  # looking whether it is there is none
        history = ["x", "y", "x", range(5), "z", "z", "z", tuple(range(5)), range(5), range(5)]
        made.clear()
        assert store.warm_from(history, make, most=2) == 2
        assert made == [tuple(range(5)), "z"]
        assert store.stats(detailed=True)["by_entry"][-1]["seconds"] >= 0


def test_prefetching_brings_it_up():
    memory, disk = Fake(200), Fake(name="disk")
    with Store([memory, disk]) as store:
        for i in range(5):
            store.put(f"k{i}", entry(i))
        store.drain()
        assert store.prefetch(["k0", "k1", "nothing"]) == 2
        store.drain()
        assert sorted(memory.entries) == ["0::k0", "0::k1"]
        check(store, accesses=0)


def test_guesses():
    only = {kind: Predictor([kind]) for kind in ("next", "markov", "frequent")}
    for key in ["a", "b", "a", "b", "a", "c", "chat/09"]:
        for predictor in only.values():
            predictor.noted(key)
    assert only["next"].guesses() == [("chat/10", "next")]
    assert only["frequent"].guesses()[0] == ("a", "frequent")
    for predictor in only.values():
        predictor.noted("a")
    assert only["markov"].guesses() == [("b", "markov"), ("c", "markov")]
    assert only["next"].guesses() == []
    assert Predictor().guesses() == []
    with pytest.raises(ValueError, match="expected some of"):
        Predictor(["oracle"])
    with pytest.raises(ValueError, match="from 1"):
        Predictor(at_once=0)


def test_precision_counts_what_was_asked_for_in_time():
    predictor = Predictor(["next", "markov"], horizon=2)
    predictor.acted("soon", "next")
    predictor.acted("never", "markov")
    predictor.acted("late", "next")
    for key in ["soon", "x", "y", "late"]:
        predictor.noted(key)
    said = predictor.stats()
    assert (said["right"], said["wrong"], said["open"]) == (1, 2, 0)
    assert said["precision"] == pytest.approx(1 / 3)
    assert said["by_kind"]["next"]["precision"] == 0.5
    assert said["by_kind"]["markov"]["precision"] == 0


def test_what_a_predictor_remembers_is_bounded():
    predictor = Predictor(remembers=50)
    for i in range(2000):
        predictor.noted(f"k{i * 7919 % 1000}")
        predictor.noted("often")
    assert len(predictor._after) <= 50
    assert len(predictor._uses) <= 101
    assert max(map(len, predictor._after.values())) <= 32
    assert predictor._uses["often"] == 2000


def eventually(condition):
    for _ in range(12_000):  # two minutes; a busy machine takes its time
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_the_next_turn_is_there_before_it_is_asked_for():
    memory, disk = Fake(300), Fake(name="disk")
    with Store([memory, disk], predictor=Predictor(["next"])) as store:
        for i in range(8):
            store.put(f"chat/{i}", entry(i))
        store.drain()
        store.get("chat/1")
        assert eventually(lambda: "0::chat/2" in memory.entries)
        assert eventually(lambda: store.stats()["prediction"]["open"] == 1)
        store.drain()
        before = store.stats()["tiers"]["memory"]["hits"]
        assert number(store.get("chat/2")) == 2
        assert store.stats()["tiers"]["memory"]["hits"] == before + 1
        said = store.stats()["prediction"]
        assert (said["right"], said["precision"]) == (1, 1)
        check(store, accesses=2)


def test_nothing_is_brought_up_while_somebody_reads():
    clock = Clock(0)
    memory, disk = Fake(300), Fake(name="disk")
    with Store([memory, disk], timer=clock) as store:
        for i in range(8):
            store.put(f"chat/{i}", entry(i))
        store.drain()
        parts = store._index, store._tiering, store._reader
        stopped = store._lifecycle.stopped
        fetch = Prefetcher(*parts, Predictor(["next"]), stopped, idle_seconds=0.05)
        assert fetch._idle()
        store.get("chat/1")
        store.drain()
        assert not fetch._idle()  # somebody did just now
        clock.now += 0.05
        assert fetch._idle()
        store._reader.reading += 1
        assert not fetch._idle()
        store._reader.reading -= 1
        assert fetch._idle()
        memory.delay = 0.2
        store.prefetch(["chat/3"])
        assert not fetch._idle()  # something is on its way up
        store.drain()
        assert fetch._idle()
