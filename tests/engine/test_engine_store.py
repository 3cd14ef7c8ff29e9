"""The engine over a store: evicted pages and swapped requests come back."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
import pytest

import jkv
from jkv.engine.swap import PageStore
from jkv.ops import dispatch
from jkv.ops.pages import TpuPages
from jkv.store import Disk, Entry, Memory, Store
from tests.decoding import oracle
from tests.engine.engines import HOT, PROMPTS, SHAPE, check_empty
from tests.ops.calls import needs

pytestmark = pytest.mark.slow  # programs for each engine

RNG = np.random.default_rng(5)
TEXTS = [RNG.integers(0, 11, 18).tolist() for _ in range(6)]


def asked(engine, prompts):
    found = []
    for prompt in prompts:
        request = engine.submit(prompt, max_new_tokens=3, stop=())
        engine.run()
        found.append((request.cached_tokens, request.tokens))
    return found


def test_evicted_pages_are_found_in_the_store(lm, alone):
    want = [alone(p, 3) for p in TEXTS]
    with Store(tiers=[Memory(1 << 24)]) as store:
        engine = jkv.Engine(lm, pages=12, store=store, **SHAPE)
        cold = asked(engine, TEXTS)
        assert [n for n, _ in cold] == [0] * 6
        # Each leaves five pages; those of the first are in the store by now.
        assert store.stats()["entries"] >= 12
        warm = asked(engine, TEXTS)
        assert [n for n, _ in warm] == [16] * 6
        assert [t for _, t in cold] == [t for _, t in warm] == want
        check_empty(engine)
    without = jkv.Engine(lm, pages=12, **SHAPE)
    asked(without, TEXTS)
    assert [n for n, _ in asked(without, TEXTS)] == [0] * 6


def test_stored_pages_are_for_all_processes_and_one_model(lm, alone, tmp_path, tiny_model):
    def engine(which, store):
        return jkv.Engine(which, pages=12, store=store, **SHAPE)

    with Store(tiers=[Memory(1 << 24), Disk(tmp_path, 1 << 26)]) as store:
        asked(engine(lm, store), TEXTS)
    leaves, tree = jax.tree.flatten(tiny_model)
    other = oracle.lm(jax.tree.unflatten(tree, [leaves[0] * np.float32(1.1), *leaves[1:]]))
    for which, found in ((other, 0), (lm, 16)):
        with Store(tiers=[Memory(1 << 24), Disk(tmp_path, 1 << 26)]) as store:
            assert asked(engine(which, store), TEXTS[:1])[0][0] == found


@needs("mosaic_tpu")
def test_stored_pages_do_not_depend_on_the_layout(lm, alone):
    """Pages that a TPU has stored are found by a CPU, and the other way round."""
    prompt, want = (np.arange(40) % 11).tolist(), []
    with Store(tiers=[Memory(1 << 24)]) as store:
        for there in (True, False, True):
            with dispatch.target("tpu") if there else contextlib.nullcontext():
                # Other pages than before: what is traced keeps its choice.
                engine = jkv.Engine(lm, pages=16 + there, store=store, **SHAPE | {"page": 16})
                tiled = isinstance(engine.core.runner.layers[0].k_pages, TpuPages)
                want.append((tiled, asked(engine, [prompt])[0]))
            engine.close()
    assert want == [(t, (n, alone(prompt, 3))) for t, n in ((True, 0), (False, 32), (True, 32))]


@pytest.mark.parametrize("room", [1 << 24, 1])
def test_requests_are_swapped_to_the_store_where_it_has_room(lm, alone, room):
    with Store(tiers=[Memory(room)]) as store:
        engine = jkv.Engine(lm, pages=14, store=store, share=False, preemption="swap", **SHAPE)
        ways = [{}, {"sampler": HOT, "key": jax.random.key(1)}]
        plan = [(PROMPTS[7 + i % 5], 18 + 2 * i, ways[i % 2]) for i in range(6)]
        requests = [engine.submit(p, max_new_tokens=n, stop=(), **how) for p, n, how in plan]
        engine.run()
        for request, (prompt, new, how) in zip(requests, plan, strict=True):
            assert request.tokens == alone(prompt, new, **how)
        counts = engine.stats()["preemptions"]
        assert (counts["swap"] > 0) == (room > 1)
        assert counts["swap"] + counts["recompute"] > 0
        assert store.stats()["entries"] == 0
        check_empty(engine)


def test_swapped_pages_that_were_lost_are_recomputed(lm, alone):
    with Store(tiers=[Memory(1 << 24)]) as store:
        engine = jkv.Engine(lm, pages=14, store=store, share=False, preemption="swap", **SHAPE)
        plan = [(PROMPTS[7 + i % 5], 18 + 2 * i) for i in range(6)]
        requests = [engine.submit(p, max_new_tokens=n, stop=()) for p, n in plan]
        lost = 0
        while engine.step():
            for request in requests:
                if request.swapped is not None and request.swapped.key is not None:
                    lost += store.remove(request.swapped.key)
        assert lost > 0
        for request, (prompt, new) in zip(requests, plan, strict=True):
            assert request.tokens == alone(prompt, new)
        check_empty(engine)


def test_close_stores_the_cached_pages(lm):
    with Store(tiers=[Memory(1 << 24)]) as store:
        with jkv.Engine(lm, pages=32, store=store, **SHAPE) as engine:
            asked(engine, TEXTS[:1])
            waiting = engine.submit(TEXTS[1], max_new_tokens=3)
            assert store.stats()["entries"] == 0
        assert waiting.finish_reason == "cancelled"
        assert store.stats()["entries"] == 5  # 20 tokens
        assert asked(jkv.Engine(lm, pages=32, store=store, **SHAPE), TEXTS[:1])[0][0] == 16
        # What is there already is not written again.
        assert store.stats()["replaced"] == 0


def test_a_failing_store_ends_requests_only(lm, alone):
    store = Store(tiers=[Memory(1 << 24)])
    engine = jkv.Engine(lm, pages=32, store=store, **SHAPE)
    store.close()
    requests = [engine.submit(p, max_new_tokens=3) for p in TEXTS[:2]]
    engine.run()
    for request in requests:
        assert request.finish_reason == "error"
        with pytest.raises(ValueError, match="closed"):
            request.result()
    check_empty(engine)
    short = engine.submit([1, 2], max_new_tokens=3, stop=())  # nothing to be looked for
    assert short.result() == alone([1, 2], 3)
    engine.run()
    check_empty(engine)


@pytest.mark.parametrize("lost", [False, True])
def test_swapped_pages_stay_until_they_are_taken_back(lost):
    """Later pages do not evict it; once loaded it is gone, also if it was lost."""
    pages = [(np.arange(64, dtype=np.float32).reshape(4, 16), np.ones((4, 16), np.float32))]
    form = [((4, 16), np.dtype(np.float32))] * 2
    with Store([Memory(max_entries=4)], fingerprint=b"another") as store:
        kept = PageStore(store, b"engine")
        key = kept.key_of(0)
        assert kept.save_request(key, pages, 4)
        for i in range(20):
            store.put(f"page/{i}", Entry({"0": pages[0][1]}, {}))
        leaves = kept.load_request(key, form[1:] if lost else form)
        if lost:
            assert leaves is None
        else:
            np.testing.assert_array_equal(leaves, pages[0])
        assert store.get_entry(key, fingerprint=b"engine") is None
        assert store.stats()["entries"] == 3


def as_int32(arrays):
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def a_token_less(arrays):
    return {name: array[:, :-1] for name, array in arrays.items()}


def a_leaf_less(arrays):
    return dict(list(arrays.items())[1:])


def a_leaf_more(arrays):
    return {**arrays, str(len(arrays)): arrays["0"]}


@pytest.mark.parametrize("lie", [as_int32, a_token_less, a_leaf_less, a_leaf_more, None])
def test_stored_pages_of_another_form_are_rejected(lm, alone, tmp_path, lie):
    """Under the right name, fingerprint and seal they are misses, counted and quarantined."""
    with Store(tiers=[Disk(tmp_path)]) as store:
        asked(jkv.Engine(lm, pages=12, store=store, **SHAPE), TEXTS)
        keys = [record.key for record in store._index.records.values()]
        mark = next(iter(store._index.records.values())).fingerprint
        for key in keys:
            entry = store.get(key, recompute_seconds=float("inf"))
            if lie is not None:
                entry = Entry(lie(dict(entry.arrays)), entry.meta)
            store.put(key, entry, fingerprint=mark, seconds=1e6)  # never slower to read
        engine = jkv.Engine(lm, pages=12, store=store, **SHAPE)
        ((found, tokens),) = asked(engine, TEXTS[:1])
        assert found == (16 if lie is None else 0)
        assert tokens == alone(TEXTS[0], 3)
        assert store.stats()["tiers"]["disk"]["corrupt"] == (0 if lie is None else 1)
        check_empty(engine)
    assert (tmp_path / "quarantine").exists() == (lie is not None)


def test_swapped_pages_of_another_form_are_recomputed(lm, alone):
    plan = [(p, 12) for p in PROMPTS]
    with Store(tiers=[Memory(1 << 24)]) as store:
        engine = jkv.Engine(lm, pages=12, preemption="swap", store=store, **SHAPE)
        requests = [engine.submit(p, max_new_tokens=n, stop=()) for p, n in plan]
        lied = 0
        while engine.step():
            for record in list(store._index.records.values()):
                if record.key.startswith("waiting/") and not record.whole:
                    entry = store.get_entry(record.key)
                    wrong = Entry(as_int32(dict(entry.arrays)), entry.meta)
                    how = {"fingerprint": record.fingerprint, "whole": True, "pin": True}
                    lied += store.put(record.key, wrong, **how) is not None
        assert lied > 0
        assert [r.tokens for r in requests] == [alone(p, n) for p, n in plan]
        assert store.stats()["tiers"]["memory"]["corrupt"] > 0
        check_empty(engine)


def test_an_object_that_is_no_store_is_refused(lm):
    with pytest.raises(TypeError, match=r"expected a jkv\.store\.Store"):
        jkv.Engine(lm, pages=8, store="dir")
