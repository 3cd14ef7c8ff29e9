"""The engine: a request's tokens do not depend on what runs beside it or on what is cached."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import threading
import time

import jax
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv.engine import decode_state
from jkv.engine.stats import prometheus
from jkv.errors import NonFiniteError
from tests.decoding import oracle
from tests.engine.engines import HOT, PAGE, PROMPTS, PUSHED, check_empty, make_engine


def test_tokens_equal_those_of_each_request_alone(engine, alone):
    requests = [engine.submit(p, max_new_tokens=5 + i, stop=()) for i, p in enumerate(PROMPTS)]
    engine.run()
    for i, (request, prompt) in enumerate(zip(requests, PROMPTS, strict=True)):
        assert request.tokens == alone(prompt, 5 + i)
        assert (request.state, request.finish_reason) == ("finished", "length")
    assert engine.stats()["tokens"] == sum(len(r.tokens) for r in requests)


def test_samplers_beside_each_other(engine, alone):
    ways = [
        {},
        {"sampler": HOT, "key": jax.random.key(1)},
        {"sampler": jkv.sampling.temperature(0.9), "key": jax.random.key(2)},
        {"sampler": PUSHED},
    ]
    requests = [
        (p, ways[i % 4], engine.submit(p, max_new_tokens=9, stop=(), **ways[i % 4]))
        for i, p in enumerate(PROMPTS[:8])
    ]
    engine.run()
    for prompt, how, request in requests:
        assert request.tokens == alone(prompt, 9, **how)
    greedy = {tuple(alone(p, 9)) for p, *_ in requests}
    assert sum(tuple(r.tokens) in greedy for *_, r in requests) < len(requests)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_too_few_pages_change_no_token(lm, alone, preemption):
    # 14 pages of 4 tokens; four requests that end with 7 to 12 pages each.
    engine = make_engine(lm, pages=14, preemption=preemption, share=False)
    ways = [{}, {"sampler": HOT, "key": jax.random.key(1)}, {"sampler": PUSHED}]
    asked = [(PROMPTS[7 + i % 5], 18 + 2 * i, ways[i % 3]) for i in range(6)]
    requests = [engine.submit(p, max_new_tokens=n, stop=(), **how) for p, n, how in asked]
    engine.run()
    for request, (prompt, new, how) in zip(requests, asked, strict=True):
        assert request.tokens == alone(prompt, new, **how)
    assert engine.stats()["preemptions"][preemption] > 0
    assert sum(engine.stats()["preemptions"].values()) == sum(r.preemptions for r in requests)
    check_empty(engine)


@pytest.mark.parametrize(("length", "found"), [(7, 4), (8, 4), (9, 8), (12, 8), (13, 12)])
def test_prompts_of_whole_pages_cold_and_warm(engine, alone, length, found):
    prompt = [(3 * i + i * i + length) % 11 for i in range(length)]
    cold = engine.submit(prompt, max_new_tokens=3, stop=())
    engine.run()
    assert cold.cached_tokens == 0
    warm = engine.submit(prompt, max_new_tokens=3, stop=())
    engine.run()
    # The last token is always computed: its logits are wanted.
    assert warm.cached_tokens == found
    assert cold.tokens == warm.tokens == alone(prompt, 3)


def test_the_next_turn_finds_the_answer_but_its_last_token(engine, alone):
    prompt = [1, 2, 3, 4, 5]
    first = engine.submit(prompt, max_new_tokens=8, stop=())
    engine.run()
    # 12 tokens are in the cache, three pages, and the 13th is not.
    turn = prompt + first.tokens + [7]
    second = engine.submit(turn, max_new_tokens=4, stop=())
    engine.run()
    assert second.cached_tokens == 12
    assert second.tokens == alone(turn, 4)


def test_tenants_do_not_share(engine, alone):
    prompt = list(range(10))
    for tenant, found in (("a", 0), ("b", 0), ("a", 8), ("b", 8), ("", 0)):
        request = engine.submit(prompt, max_new_tokens=2, stop=(), tenant=tenant)
        engine.run()
        assert request.cached_tokens == found
        assert request.tokens == alone(prompt, 2)


def test_samples_share_the_pages_of_their_prompt(engine, tiny_model):
    prompt, key = [*range(11), 3, 1], jax.random.key(5)
    requests = engine.submit(prompt, max_new_tokens=6, stop=(), sampler=HOT, key=key, samples=3)
    most_shared = 0
    while engine.step():
        most_shared = max(most_shared, engine.stats()["pages"]["shared"])
    how = {"max_new_tokens": 6, "sampler": HOT, "key": key, "stop": (), "slots": 64}
    out = jkv.generate(tiny_model, [prompt], samples=3, **how)
    assert [r.tokens for r in requests] == out.tokens.tolist()
    assert [r.cached_tokens for r in requests] == [0, 12, 12]
    assert most_shared == 3


def test_share_false_finds_no_pages(lm, alone):
    engine = make_engine(lm, share=False)
    for _ in range(2):
        request = engine.submit(PROMPTS[7], max_new_tokens=3, stop=())
        engine.run()
        assert request.tokens == alone(PROMPTS[7], 3)
        assert request.cached_tokens == 0
    check_empty(engine)


def test_stops_by_id_and_by_text(engine, alone, lm):
    prompt = PROMPTS[6]
    whole = alone(prompt, 12)
    by_id = engine.submit(prompt, max_new_tokens=12, stop=whole[4])
    text = lm.tokenizer.decode(whole)
    by_text = engine.submit(prompt, max_new_tokens=12, stop=[text[3:6]])
    engine.run()
    assert by_id.tokens == whole[: whole.index(whole[4]) + 1]
    assert by_id.finish_reason == by_text.finish_reason == "stop"
    want = jkv.generate(lm, [prompt], max_new_tokens=12, stop=[text[3:6]], slots=64)
    assert by_text.tokens == want.tokens[0].tolist()
    assert by_text.text == lm.tokenizer.decode(by_text.tokens)


def test_tokens_as_they_come(engine, alone):
    request = engine.submit(PROMPTS[4], max_new_tokens=9, stop=())
    other = engine.submit(PROMPTS[5], max_new_tokens=4, stop=())
    seen = []
    for token in request:
        seen.append(token)
        assert len(request.tokens) >= len(seen)
    assert seen == alone(PROMPTS[4], 9)
    assert other.result() == alone(PROMPTS[5], 4)
    engine.run()


def test_tokens_can_be_read_at_any_time(engine, alone, lm):
    """Between steps, in another request's callback, in a thread, or only at the end."""
    asked, grew = [], []

    def spying(request, token):
        for other in asked:
            grew.append((other, list(other.tokens)))

    want = [alone(p, 24) for p in PROMPTS[4:8]]
    text = lm.tokenizer.decode(want[1])[5:8]
    for i, prompt in enumerate(PROMPTS[4:8]):
        how = [{"on_token": spying}, {"stop": [text]}, {}, {}][i]
        asked.append(engine.submit(prompt, max_new_tokens=24, **({"stop": ()} | how)))

    over = threading.Event()

    def watching():
        while not over.wait(0.0005):
            grew.append((asked[2], list(asked[2].tokens)))

    thread = threading.Thread(target=watching)
    thread.start()
    try:
        while engine.step():
            grew.append((asked[2], list(asked[2].tokens)))
    finally:
        over.set()
        thread.join()
    cut = jkv.generate(lm, [PROMPTS[5]], max_new_tokens=24, stop=[text], slots=64)
    want[1] = cut.tokens[0, : cut.lengths[0]].tolist()
    assert len(want[1]) < 24
    assert [request.tokens for request in asked] == want
    for request, tokens in grew:
        assert tokens == want[asked.index(request)][: len(tokens)]
    for i in (2, 3):  # without a callback or a stop string, and still they are seen to grow
        assert len({len(tokens) for request, tokens in grew if request is asked[i]}) > 3


def test_several_tasks_wait_for_tokens(engine, alone):
    async def say(prompt):
        return [token async for token in engine.submit(prompt, max_new_tokens=7, stop=())]

    async def all_of_them():
        return await asyncio.gather(*map(say, PROMPTS[:5]))

    assert asyncio.run(all_of_them()) == [alone(p, 7) for p in PROMPTS[:5]]
    engine.run()


def test_higher_priority_goes_first_within_64_requests(lm):
    engine = make_engine(lm, max_batch=1)
    order = []

    def ended(request, token):
        if token is not None and len(request.tokens) == 1:
            order.append(request.number)

    how = {"max_new_tokens": 1, "stop": (), "on_token": ended}
    plain = [engine.submit([1], **how) for _ in range(3)]
    urgent = [engine.submit([2], priority=1, **how) for _ in range(70)]
    engine.run()
    numbers = [r.number for r in plain + urgent]
    assert sorted(order) == numbers
    # 64 that come later go before one without priority, and no more.
    assert [order.index(r.number) for r in plain] == [61, 63, 65]
    check_empty(engine)


def test_nothing_is_compiled_after_warm(lm, compiles):
    engine = make_engine(lm, pages=14, preemption="swap", share=False)
    engine.warm(samplers=[HOT])
    first = engine.submit([1], max_new_tokens=2, sampler=HOT, key=jax.random.key(0))
    engine.submit([1], max_new_tokens=2)
    engine.run()
    assert first.state == "finished"
    with compiles:
        for i, prompt in enumerate(PROMPTS * 2):
            how = {"sampler": HOT, "key": jax.random.key(0)} if i % 3 == 0 else {}
            engine.submit(prompt, max_new_tokens=3 + i % 20, stop=(), **how)
            if i % 4 == 0:
                engine.step()
        engine.run()
        assert compiles.count == 0
    assert engine.stats()["preemptions"]["swap"] > 0  # there and back, and nothing compiled
    check_empty(engine)


def test_steps_are_no_wider_than_their_lanes(engine, alone, monkeypatch):
    widths, shapes = [], []
    decode_jit, prefill_jit = decode_state.decode_jit, decode_state.prefill_jit

    def saying(size, frame, weights, layers, state, at, *rest):
        widths.append(len(at))
        return decode_jit(size, frame, weights, layers, state, at, *rest)

    def reading(frame, weights, layers, state, at, tokens, *rest):
        shapes.append(tokens.shape)
        return prefill_jit(frame, weights, layers, state, at, tokens, *rest)

    monkeypatch.setattr(decode_state, "decode_jit", saying)
    monkeypatch.setattr(decode_state, "prefill_jit", reading)
    last = [engine.submit(PROMPTS[1], max_new_tokens=n, stop=()) for n in (9, 9, 9, 27)][-1]
    engine.run()
    assert last.tokens == alone(PROMPTS[1], 27)
    assert max(widths) == 4
    assert widths[-5:] == [1] * 5  # in the last lane of four
    assert set(shapes) <= {(1, 4), (2, 4)}
    shapes.clear()
    long = engine.submit(PROMPTS[11], max_new_tokens=1, stop=())
    engine.run()
    assert long.tokens == alone(PROMPTS[11], 1)
    assert shapes == [(1, 8)] * 4  # 30 tokens


def test_a_step_is_dispatched_before_the_last_one_is_read(engine, alone, monkeypatch):
    events = []
    runner = engine.core.runner
    execute, read = runner.execute, runner.read

    def executing(schedule):
        steps = execute(schedule)
        events.extend((False, step) for step in steps)
        return steps

    def reading(step):
        events.append((True, step))
        return read(step)

    monkeypatch.setattr(runner, "execute", executing)
    monkeypatch.setattr(runner, "read", reading)
    request = engine.submit(PROMPTS[3], max_new_tokens=30, stop=())
    engine.run()
    assert request.tokens == alone(PROMPTS[3], 30)
    sent = [(at, step) for at, (is_read, step) in enumerate(events) if not is_read]
    reads = [(at, step) for at, (is_read, step) in enumerate(events) if is_read]
    assert len(reads) == len(sent) > 4
    # Two are under way whenever one is read, until there is nothing more to dispatch.
    for n, (at, step) in enumerate(reads[:-1]):
        assert sum(when < at for when, _ in sent) == n + 2
        assert step is sent[n][1]


def test_the_host_step_costs_the_same_for_any_number_of_lanes(lm):
    engine = make_engine(lm, page=64, max_batch=32, prefill_rows=8)

    def calls():
        """Count the calls, in Python and from it, of a step in which every request goes on."""
        count = 0

        def count_call(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        engine.step()
        engine.step()
        sys.setprofile(count_call)
        try:
            engine.step()
        finally:
            sys.setprofile(None)
        return count

    def joined(count):
        requests = [engine.submit([1], max_new_tokens=50, stop=()) for _ in range(count)]
        while min(len(request.tokens) for request in requests) < 3:
            engine.step()

    joined(4)
    few = calls()
    joined(28)
    assert engine.stats()["running"] == 32
    assert calls() <= few + 4
    engine.close()


def test_figures(engine, alone):
    assert engine.stats()["time_to_first_token"] == {"p50": None, "p99": None}
    for prompt in PROMPTS:
        engine.submit(prompt, max_new_tokens=12, stop=())
    engine.run()
    figures = engine.stats()
    assert figures["finished"] == figures["reasons"]["length"] == len(PROMPTS)
    assert figures["tokens"] == 12 * len(PROMPTS)
    assert figures["prefill_tokens"] == sum(map(len, PROMPTS)) - figures["hit_tokens"]
    for name in ("time_to_first_token", "time_between_tokens"):
        assert 0 < figures[name]["p50"] <= figures[name]["p99"]
    assert 0 <= figures["waste"] < 0.5
    lost = prometheus(figures | {"tokens": 1234567})
    assert "jkv_engine_tokens_total 1234567" in lost.splitlines()
    lines = prometheus(figures).splitlines()
    assert f"jkv_engine_tokens_total {12 * len(PROMPTS)}" in lines
    assert 'jkv_engine_pages{state="used"} 0' in lines
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    assert all(line.startswith(("#", "jkv_engine_")) for line in lines)


@pytest.mark.slow  # rounding kinds take long to compile
def test_quantized_pages_generate_what_their_kind_does(lm, tiny_model):
    kind = jkv.paged(page=PAGE, bits=8)
    # One chunk: tokens of a chunk see each other before they are rounded.
    engine = make_engine(lm, cache=kind, prefill_chunk=16, prefill_rows=1)
    requests = [engine.submit(p, max_new_tokens=6, stop=()) for p in PROMPTS[3:7]]
    engine.run()
    for prompt, request in zip(PROMPTS[3:7], requests, strict=True):
        how = {"cache": kind, "slots": 64, "stop": (), "prefill_chunk": 16}
        out = jkv.generate(tiny_model, [prompt], max_new_tokens=6, **how)
        assert request.tokens == out.tokens[0].tolist()
    check_empty(engine)
    # A model that makes NaN of one token: its request gets the error, and its pages are not reused.
    leaves, tree = jax.tree.flatten(tiny_model)
    at = next(i for i, leaf in enumerate(leaves) if leaf.shape == tiny_model.embedding[...].shape)
    leaves[at] = leaves[at].at[9].set(np.nan)
    engine = make_engine(oracle.lm(jax.tree.unflatten(tree, leaves)), cache=kind, prefill_chunk=16)
    bad = engine.submit([1, 9, 1, 1, 1], max_new_tokens=6, stop=())
    engine.run()
    with pytest.raises(NonFiniteError, match="NaN or infinity of this request's tokens, at step 0"):
        bad.result()
    assert engine.stats()["pages"]["cached"] == 0
    check_empty(engine)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_pages_outside_windows_are_released(tiny_config, preemption):
    config = dataclasses.replace(tiny_config, windows=(3, None))  # one smaller than a page
    model = jax.jit(lambda: jkv.Decoder(config, rngs=nnx.Rngs(2)))()
    model.embedding[...] = model.embedding[...] * 50
    engine = make_engine(model, pages=16, preemption=preemption)
    plan = [(PROMPTS[7 + i % 5], 14 + 2 * i) for i in range(6)]
    want = [
        jkv.generate(model, [p], max_new_tokens=n, stop=(), slots=64).tokens[0].tolist()
        for p, n in plan
    ]
    least = 16
    for turn in range(2):  # the second may find what the first has left
        requests = [engine.submit(p, max_new_tokens=n, stop=()) for p, n in plan]
        while engine.step():
            least = min(least, *(pool.free_pages for pool in engine.core.pages.pools))
            for request in requests[turn :: 3 + turn]:
                if request.preemptions and not request.tokens:
                    request.cancel()
        for request, tokens in zip(requests, want, strict=True):
            assert request.tokens == tokens[: len(request.tokens)]
            assert request.finish_reason == "cancelled" or request.tokens == tokens
    assert sum(engine.stats()["preemptions"].values()) > 0
    check_empty(engine)


def test_idle_time_is_no_latency(engine, monkeypatch):
    clock, idle = time.perf_counter, 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + idle)
    for _ in range(3):
        engine.submit([1], max_new_tokens=9, stop=())
        engine.run()
        idle += 1e6
    assert engine.stats()["time_between_tokens"]["p99"] < 1e5
