"""Requests that are refused, cancelled, fail or are interrupted do not disturb the others."""

from __future__ import annotations

import gc

import jax
import numpy as np
import pytest

import jkv
from jkv.errors import PoolFullError
from tests.engine.engines import HOT, PROMPTS, check_empty, make_engine


def test_cancelled_while_waiting_and_while_running(engine, alone):
    requests = [engine.submit(p, max_new_tokens=40, stop=()) for p in PROMPTS[4:10]]
    for _ in range(6):
        engine.step()
    running, waiting = requests[1], requests[5]
    assert (running.state, waiting.state) == ("running", "waiting")
    running.cancel()
    waiting.cancel()
    running.cancel()  # again: nothing happens
    engine.run()
    assert (running.finish_reason, waiting.finish_reason) == ("cancelled", "cancelled")
    assert running.tokens == alone(PROMPTS[5], 40)[: len(running.tokens)]
    assert 0 < len(running.tokens) < 40
    assert waiting.tokens == []
    for request, prompt in zip(requests, PROMPTS[4:10], strict=True):
        if request not in (running, waiting):
            assert request.tokens == alone(prompt, 40)


def test_an_error_in_a_callback_ends_its_request_alone(engine, alone):
    heard = []

    def broken(request, token):
        heard.append(token)
        if len(heard) == 3:
            raise KeyError("a user's mistake")

    bad = engine.submit(PROMPTS[4], max_new_tokens=20, stop=(), on_token=broken)
    good = engine.submit(PROMPTS[5], max_new_tokens=20, stop=())
    engine.run()
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
    assert heard == alone(PROMPTS[4], 20)[:3]
    assert good.tokens == alone(PROMPTS[5], 20)
    with pytest.raises(KeyError, match="a user's mistake"):
        bad.result()
    assert engine.stats()["reasons"]["error"] == 1


def test_a_callback_may_submit_and_cancel_but_not_run(engine, alone):
    more = []

    def once(request, token):
        if not more:
            more.append(engine.submit(PROMPTS[2], max_new_tokens=3, stop=()))
        elif len(request.tokens) > 4:
            request.cancel()

    request = engine.submit(PROMPTS[1], max_new_tokens=20, stop=(), on_token=once)
    nested = engine.submit(PROMPTS[1], max_new_tokens=3, on_token=lambda r, t: engine.step())
    engine.run()
    assert request.finish_reason == "cancelled"
    assert more[0].tokens == alone(PROMPTS[2], 3)
    assert isinstance(nested.error, RuntimeError)


def test_a_request_that_can_never_fit_is_refused(lm, alone):
    engine = make_engine(lm, pages=6)
    with pytest.raises(PoolFullError, match=r"need 7 pages of 4, and the pool has 6"):
        engine.submit(PROMPTS[7], max_new_tokens=5)
    request = engine.submit(PROMPTS[7], max_new_tokens=4, stop=())  # 24 tokens, all of the pool
    engine.run()
    assert request.tokens == alone(PROMPTS[7], 4)
    with pytest.raises(ValueError, match="more than the model's context of 256"):
        engine.submit(PROMPTS[0], max_new_tokens=256)
    check_empty(engine)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({"prompt": []}, ValueError, "empty"),
        ({"prompt": [11]}, ValueError, "ids from 0 to 10"),
        ({"prompt": 3}, TypeError, "expected a list of token ids"),
        ({"max_new_tokens": 0}, ValueError, "at least 1"),
        ({"stop": [1.5]}, TypeError, "token id or a string"),
        ({"priority": "high"}, TypeError, "an integer"),
        ({"tenant": 4}, TypeError, "a text"),
        ({"on_token": 4}, TypeError, "a function"),
        ({"sampler": HOT}, ValueError, "needs key"),
        ({"sampler": 0.7}, TypeError, "transforms"),
        ({"samples": 2}, ValueError, "would all be the same"),
        ({"sampler": HOT, "key": 3}, TypeError, "jax.random.key"),
        ({"sampler": HOT, "key": jax.random.split(jax.random.key(0))}, ValueError, r"shape \(2,\)"),
    ],
)
def test_bad_requests_are_refused(lm, bad, error, match):
    engine = make_engine(lm)
    with pytest.raises(ValueError, match="at most 16"):
        engine.core.runner.check_stop_ids(tuple(range(17)))
    with pytest.raises(error, match=match):
        engine.submit(**({"prompt": [1, 2], "max_new_tokens": 4} | bad))
    assert not engine.step()
    check_empty(engine)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({"pages": 0}, ValueError, "at least 1"),
        ({"max_batch": 1.5}, ValueError, "at least 1"),
        ({"cache": jkv.dense()}, TypeError, "jkv.paged"),
        ({"preemption": "kill"}, ValueError, "recompute"),
    ],
)
def test_bad_engines_are_refused(lm, bad, error, match):
    with pytest.raises(error, match=match):
        make_engine(lm, **bad)


def test_an_interrupted_step_loses_no_token(engine, alone):
    def interrupting(request, token):
        if len(request.tokens) == 3:
            raise KeyboardInterrupt

    requests = [engine.submit(p, max_new_tokens=12, stop=()) for p in PROMPTS[3:6]]
    requests.insert(1, engine.submit(PROMPTS[1], max_new_tokens=12, stop=(), on_token=interrupting))
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    prompts = [PROMPTS[3], PROMPTS[1], *PROMPTS[4:6]]
    for request, prompt in zip(requests[:2], prompts, strict=False):  # an unwatched one too
        assert 0 < len(request.tokens) < 12
        assert request.tokens == alone(prompt, 12)[: len(request.tokens)]
    engine.run()
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.tokens == alone(prompt, 12)


def test_a_request_interrupted_at_admission_can_be_cancelled(engine, monkeypatch):
    request = engine.submit(PROMPTS[3], max_new_tokens=4, stop=())

    def torn(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.core.pages, "match", torn)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    request.cancel()
    assert (request.state, request.finish_reason) == ("finished", "cancelled")
    engine.run()


def test_an_interrupt_during_preemption_loses_no_request(lm, alone, monkeypatch):
    engine = make_engine(lm, pages=14, preemption="recompute", share=False)
    requests = [engine.submit(PROMPTS[7], max_new_tokens=18, stop=()) for _ in range(4)]
    close = engine.core.pages.close

    def torn(held):
        if any(request.preemptions for request in requests):
            monkeypatch.setattr(engine.core.pages, "close", close)
            raise KeyboardInterrupt
        close(held)

    monkeypatch.setattr(engine.core.pages, "close", torn)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.run()
    assert [request.tokens for request in requests] == [alone(PROMPTS[7], 18)] * 4
    check_empty(engine)


def test_a_failing_sampler_is_refused_alone(engine, alone):
    class Broken:
        def init(self, tokens, vocab):
            return ()

        def update(self, logits, state, token):
            raise ArithmeticError("a user's mistake")

    jax.tree_util.register_pytree_node(Broken, lambda b: ((), None), lambda *_: Broken())
    with pytest.raises(ArithmeticError, match="a user's mistake"):
        engine.submit([1], max_new_tokens=3, sampler=Broken(), key=jax.random.key(0))
    assert engine.submit([1], max_new_tokens=3, stop=()).result() == alone([1], 3)
    engine.run()


def test_a_sampler_that_cannot_run_under_vmap_is_refused(engine, alone):
    """A callback without a rule for `vmap` works alone, and would fail in a step over lanes."""

    def called(logits):
        return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(logits.shape, "float32"), logits)

    other = engine.submit([1], max_new_tokens=3, stop=())
    with pytest.raises(NotImplementedError, match="vmap is only supported"):
        engine.submit([2], max_new_tokens=3, sampler=called, key=jax.random.key(0))
    assert other.result() == alone([1], 3)


def soak(lm, alone, count, seed):
    """Run short requests with all that can happen to them, on few pages."""
    rng = np.random.default_rng(seed)
    engine = make_engine(lm, pages=11, preemption="auto")
    prompts = [rng.integers(0, 11, n).tolist() for n in rng.integers(1, 14, 12)]
    live, checked = [], 0

    def raising(request, token):
        if len(request.tokens) > 2:
            raise OSError("gone")

    for i in range(count):
        prompt, new = prompts[rng.integers(12)], int(rng.integers(1, 4)) * 4
        how = {"priority": int(rng.integers(-1, 2)), "tenant": "ab"[rng.integers(2)]}
        if rng.random() < 0.05:
            how["on_token"] = raising
        live.append((engine.submit(prompt, max_new_tokens=new, stop=(), **how), prompt, new))
        while len(live) > 12:
            engine.step()
            if rng.random() < 0.03:
                live[rng.integers(len(live))][0].cancel()
            for request, prompt, new in [x for x in live if x[0].state == "finished"]:
                want = alone(prompt, new)
                if request.finish_reason == "length":
                    assert request.tokens == want
                    checked += 1
                else:
                    assert request.tokens == want[: len(request.tokens)]
            live = [x for x in live if x[0].state != "finished"]
        if i % 50 == 0:
            for pool in engine.core.pages.pools:
                pool.check()
    engine.run()
    check_empty(engine)
    figures = engine.stats()
    assert figures["finished"] == count == sum(figures["reasons"].values())
    assert checked > count / 2
    assert sum(figures["preemptions"].values()) > 0
    assert min(figures["reasons"][r] for r in ("length", "cancelled", "error")) > 0
    return engine


def test_many_short_requests_on_few_pages(lm, alone):
    soak(lm, alone, 150, 0)


@pytest.mark.soak
def test_five_thousand_requests_leave_nothing_behind(lm, alone):
    soak(lm, alone, 200, 1)
    gc.collect()
    before = len(jax.live_arrays())
    engine = soak(lm, alone, 5000, 2)
    del engine
    gc.collect()
    assert len(jax.live_arrays()) <= before
