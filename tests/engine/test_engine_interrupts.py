"""An interrupt at any place of any call costs time, but no token, request or page."""

from __future__ import annotations

import os
import random
import sys

import pytest

from jkv.store import Memory, Store
from tests.engine.engines import PROMPTS, check_empty, make_engine
from tests.engine.interrupts import Interrupt
from tests.engine.scenario import Scenario, Spied

ALL = os.environ.get("JKV_SOAK") == "1"
PLACES = 14  # of each script, where not all
PAGES = 9  # too few for two of the long requests


def strike(scenario, places, inside=("/engine/",)):
    for call, at, then in places:
        strikes = {call: Interrupt(at, inside, signals=ALL)}
        if then is not None:
            strikes[call + 1] = Interrupt(then, inside, signals=ALL)
        try:
            scenario.run(strikes)
        except BaseException as error:
            error.add_note(f"interrupted at {[s.where for s in strikes.values()]}, call {call}")
            raise


def places(scenario, inside, twice):
    """Return places (call, event, event of the next call), some of each call.

    In a soak all before which Python delivers a signal, some 18,000.
    """
    counting = [Interrupt(-1, inside, signals=ALL) for _ in scenario.run({})]
    scenario.run(dict(enumerate(counting)))
    every = [(call, at) for call, it in enumerate(counting) for at in range(it.count)]
    assert len(every) > 1000
    rng = random.Random(7)
    if not ALL:
        calls = rng.sample(range(len(counting)), min(PLACES, len(counting)))
        every = [(call, rng.randrange(counting[call].count)) for call in calls]
    # The call after an interrupted one begins with the recovery.
    return [
        (call, at, rng.randrange(400 if ALL else 2000) if twice else None) for call, at in every
    ]


# Python prints and drops an interrupt that comes while an iteration is finalised.
in_finalisers = pytest.mark.filterwarnings(
    "ignore:(?s)Exception ignored.*Engine.watch.*KeyboardInterrupt"
    ":pytest.PytestUnraisableExceptionWarning"
)


@in_finalisers
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("calls", ["steps", "waits", "closes"])
def test_an_interrupt_anywhere_loses_no_token_and_no_page(lm, alone, calls, twice):
    how = {"preemption": "recompute" if twice else "swap"}
    scenario = Scenario(lm, alone, calls, pages=PAGES, **how)
    strike(scenario, places(scenario, ("/engine/",), twice))
    assert sum(scenario.engine.stats()["preemptions"].values()) > 0


@in_finalisers
@pytest.mark.parametrize("calls", ["steps", "closes"])
def test_an_interrupt_leaves_nothing_in_a_store(lm, alone, calls):
    with Store(tiers=[Memory(1 << 24)]) as store:
        how = {"preemption": "swap", "store": Spied(store)}
        scenario = Scenario(lm, alone, calls, pages=PAGES, **how)
        strike(scenario, places(scenario, ("/engine/",), False))
        assert scenario.engine.stats()["preemptions"]["swap"] > 0


def at_every_place(inside, call):
    """Repeat a call with an interrupt at another bytecode each time; yield each place."""
    for at in range(10_000):
        it = Interrupt(at, inside)
        try:
            with it:
                call()
        except KeyboardInterrupt:
            pass
        if not it.where:
            assert at > 10
            return
        yield it.where


def steps(engine):
    """Run an engine to its end, which is near."""
    assert any(not engine.step() for _ in range(60)), "the engine never rests"


def test_an_iteration_whose_end_is_interrupted_leaves_no_request(lm):
    engine = make_engine(lm, pages=PAGES, max_batch=2)
    asked = {"max_new_tokens": 4, "stop": ()}
    requests = []

    def leave():
        engine.abandon(requests[-1])

    requests.append(engine.submit(PROMPTS[2], **asked))
    for where in at_every_place(("abandon", "Request.end"), leave):
        steps(engine)
        assert engine.core.scheduler.requests.live == {}, where
        assert requests[-1].state == "finished", where
        requests.append(engine.submit(PROMPTS[2], **asked))
    check_empty(engine)


@pytest.mark.parametrize("read", [iter, aiter])
def test_an_interrupt_while_an_iteration_is_finalised_is_noticed(lm, monkeypatch, read):
    """Python drops it, and a hook may keep the exception with all that its frames hold."""
    kept = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: kept.append(raised.exc_value))
    engine = make_engine(lm, pages=PAGES, max_batch=2)
    request = engine.submit(PROMPTS[2], max_new_tokens=12, stop=())
    readers = [read(request)]
    engine.step()
    assert request.state == "running"
    for at in range(100):
        with Interrupt(at, ("Engine.watch.<locals>",)) as it:
            readers.clear()
        if not it.where:
            break
        assert [type(raised) for raised in kept] == [KeyboardInterrupt], it.where
        engine.stats()
        assert request.finish_reason == "cancelled", it.where
        kept.clear()
        request = engine.submit(PROMPTS[2], max_new_tokens=12, stop=())
        readers.append(read(request))
        engine.step()
    assert at > 1
    engine.stats()
    assert request.finish_reason == "cancelled"
    assert engine.core.scheduler.requests.live == {}
    check_empty(engine)


def test_an_interrupted_generate_cancels_its_requests(lm):
    engine = make_engine(lm, pages=PAGES, max_batch=2)

    def generate():
        engine.generate([PROMPTS[2]], max_new_tokens=1, stop=())

    inside = ("Engine._queue", "RequestQueue.add", "RequestQueue.push")
    for where in at_every_place(inside, generate):
        engine.stats()
        assert engine.core.scheduler.requests.live == {}, where
    reasons = engine.stats()["reasons"]
    assert reasons["cancelled"] > 0
    assert sum(reasons.values()) == reasons["cancelled"] + 1
    check_empty(engine)


def test_an_interrupted_update_is_completed_by_the_next_call(lm, alone, monkeypatch):
    engine = make_engine(lm, pages=PAGES, max_batch=2)
    reset = engine.core.runner.reset

    def torn():
        monkeypatch.setattr(engine.core.runner, "reset", reset)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.core.runner, "reset", torn)
    with pytest.raises(KeyboardInterrupt):
        engine.update(lm.model)
    # The weights are new, and those that were taken are not: that is the engine's to mend.
    engine.core.runner.weights = [None, *engine.core.runner.weights[1:]]
    request = engine.submit(PROMPTS[2], max_new_tokens=4, stop=())
    assert request.result() == alone(PROMPTS[2], 4)
    assert engine.model is lm.model
    check_empty(engine)


def test_close_ends_requests_of_a_failed_step(lm, monkeypatch):
    engine = make_engine(lm, pages=PAGES, max_batch=2)
    request = engine.submit(PROMPTS[2], max_new_tokens=4, stop=())
    waiting = engine.submit(PROMPTS[2], max_new_tokens=4, stop=(), priority=-1)
    engine.step()

    def failing(part):
        raise OSError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine.core.runner, "read", failing)
        engine.close()
    assert request.finish_reason == "error"
    assert isinstance(request.error, OSError)
    assert waiting.state == "finished"
    check_empty(engine)


def test_an_interrupted_submit_has_queued_its_request_or_not(lm):
    engine = make_engine(lm, pages=PAGES, max_batch=2)

    def submit():
        engine.submit(PROMPTS[2], max_new_tokens=1, stop=())

    for where in at_every_place(("RequestQueue.add", "RequestQueue.push"), submit):
        steps(engine)
        assert engine.core.scheduler.requests.live == {}, where
    steps(engine)  # the one that was not interrupted
    check_empty(engine)


def test_the_end_of_a_request_is_counted_once(lm, monkeypatch):
    engine = make_engine(lm, pages=PAGES, max_batch=2)
    first, second = (engine.submit(PROMPTS[2], max_new_tokens=4, stop=()) for _ in range(2))

    def torn(number):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.core.scheduler.requests, "discard", torn)
        with pytest.raises(KeyboardInterrupt):
            second.cancel()
    first.end("cancelled")  # to be counted before it by the recovery
    assert engine.stats()["reasons"]["cancelled"] == 2
    check_empty(engine)


def test_a_request_missing_from_the_order_is_still_run(lm, monkeypatch):
    engine = make_engine(lm)

    def struck(*_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.core.scheduler.requests, "push", struck)
    with pytest.raises(KeyboardInterrupt):
        engine.submit(PROMPTS[1], max_new_tokens=2, stop=())
    request = engine.submit(PROMPTS[2], max_new_tokens=2, stop=())
    for _ in range(20):
        if not engine.step():
            break
    assert len(request.tokens) == 2
    check_empty(engine)
