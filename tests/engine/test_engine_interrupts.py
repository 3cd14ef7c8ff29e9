"""An interrupt at any place of any call costs time, and no token, request or page."""

from __future__ import annotations

import os

import jax
import pytest

import jkv
from tests.engine.engines import HOT, PROMPTS, empty, made
from tests.engine.interrupts import Interrupt

ALL = os.environ.get("JKV_SOAK") == "1"
PLACES = 16  # of each scenario, where not all


class Scenario:
    """Requests through every call of an engine, each interrupted or not, and what must come out."""

    def __init__(self, lm, alone, **how):
        self.lm, self.alone = lm, alone
        self.engine = made(lm, **how)
        self.engine.warm()  # with and without a sampler's structure, which an interrupt forgets
        self.engine.warm([HOT])
        self.text = lm.tokenizer.decode(alone(PROMPTS[6], 12))[3:6]
        stopped = jkv.generate(lm, [PROMPTS[6]], max_new_tokens=12, stop=[self.text], slots=64)
        hot = {"sampler": HOT, "key": jax.random.key(1)}
        self.asked = [
            ({"prompt": PROMPTS[7], "max_new_tokens": 9, "stop": ()}, alone(PROMPTS[7], 9)),
            ({"prompt": PROMPTS[7], "max_new_tokens": 8, "stop": (), **hot},
             alone(PROMPTS[7], 8, **hot)),
            ({"prompt": PROMPTS[6], "max_new_tokens": 12, "stop": [self.text]},
             stopped.tokens[0, : stopped.lengths[0]].tolist()),
            ({"prompt": PROMPTS[5], "max_new_tokens": 10, "stop": ()}, alone(PROMPTS[5], 10)),
            ({"prompt": PROMPTS[4], "max_new_tokens": 6, "stop": ()}, alone(PROMPTS[4], 6)),
        ]  # fmt: skip

    def run(self, interrupt, again=None):
        """The scenario under an interrupt, and another one where the first has struck."""
        engine, told, requests = self.engine, {}, []

        def attempt(work, default=None):
            for strike in (interrupt, again):
                if strike is None or (strike is again and not interrupt.where):
                    continue
                try:
                    with strike:
                        return work()
                except KeyboardInterrupt:
                    pass
            return default

        def hear(request, token):
            told.setdefault(request.number, []).append((len(request.tokens), token))

        for i, (how, want) in enumerate(self.asked):
            more = {"on_token": hear} if i in (1, 2) else {}
            request = attempt(lambda how=how, more=more: engine.submit(**how, **more))
            if request is None:  # interrupted, and once more in peace
                request = engine.submit(**how, **more)
            requests.append((request, want))
        for turn in range(30):
            attempt(engine.step)
            if turn == 3:
                attempt(requests[4][0].cancel)
            if turn == 6:
                attempt(requests[3][0].cancel)
            if turn == 8:
                attempt(engine.stats)
        attempt(engine.run)
        engine.run()
        for i, (request, want) in enumerate(requests):
            tokens = request.tokens
            assert request.state == "finished"
            if request.finish_reason == "cancelled":
                assert i in (3, 4)
                assert tokens == want[: len(tokens)]
            else:
                assert tokens == request.result() == want
                assert request.finish_reason == ("stop" if i == 2 else "length")
            heard = told.get(request.number, [])
            if i in (1, 2):  # none twice, and one not at all where the interrupt came between
                assert len(tokens) - 1 <= len(heard) <= len(tokens)
                assert all(tokens[at - 1] == token for at, token in heard)
                assert sorted(set(heard)) == heard
        empty(engine)
        assert engine.requests.live == {}


def places(count, skip=0):
    """Which of the events; in a soak all of them."""
    if ALL:
        return range(count)
    step = max(1, count // PLACES)
    return range(skip % step, count, step)


def strike_everywhere(scenario, bytecodes, inside=("/engine/",)):
    counting = Interrupt(-1, inside, bytecodes)
    scenario.run(counting)
    assert counting.count > 1000
    for at in places(counting.count, skip=7):
        interrupt = Interrupt(at, inside, bytecodes)
        try:
            scenario.run(interrupt)
        except BaseException as error:
            error.add_note(f"interrupted at {interrupt.where}, event {at}")
            raise


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_an_interrupt_anywhere_costs_no_token_and_no_page(lm, alone, preemption):
    scenario = Scenario(lm, alone, pages=13, preemption=preemption)
    strike_everywhere(scenario, bytecodes=True)
    assert scenario.engine.stats()["preemptions"][preemption] > 0
