"""Failing steps, iterations that are left, and samplers: each concerns its own request only."""

from __future__ import annotations

import asyncio
import gc
import os
import signal

import jax
import numpy as np
import pytest

import jkv
from jkv.engine import decode_state
from tests.engine.engines import HOT, PROMPTS, check_empty, make_engine

HOW = {"max_new_tokens": 9, "stop": ()}


@pytest.mark.parametrize("which", ["prefill_jit", "decode_jit"])
def test_a_step_that_cannot_be_dispatched_ends_its_requests_alone(
    engine, alone, monkeypatch, which
):
    first = engine.submit(PROMPTS[4], **HOW)
    while len(first.tokens) < 2:
        engine.step()
    other = engine.submit(PROMPTS[7], **HOW)
    run, left = getattr(decode_state, which), [1]

    def failing(*given):
        if left:
            left.pop()
            raise ArithmeticError("no such program")
        return run(*given)

    monkeypatch.setattr(decode_state, which, failing)
    waiting = engine.submit(PROMPTS[5], **HOW)
    engine.run()
    failed = [r for r in (first, other, waiting) if r.finish_reason == "error"]
    assert failed
    assert waiting not in failed or which == "prefill_jit"
    assert first not in failed or which == "decode_jit"
    for request, prompt in ((first, PROMPTS[4]), (other, PROMPTS[7]), (waiting, PROMPTS[5])):
        if request in failed:
            with pytest.raises(ArithmeticError, match="no such program"):
                request.result()
        else:
            assert request.tokens == alone(prompt, 9)
    assert engine.stats()["reasons"]["error"] == len(failed)


def test_a_step_that_fails_on_the_device_ends_its_requests_alone(engine, alone, monkeypatch):
    first = engine.submit(PROMPTS[4], **HOW)
    while len(first.tokens) < 3:
        engine.step()
    read, left = engine.core.runner.read, [1]

    def failing(part):
        if left:
            left.pop()
            raise jax.errors.JaxRuntimeError("INTERNAL: the device")
        return read(part)

    monkeypatch.setattr(engine.core.runner, "read", failing)
    late = engine.submit(PROMPTS[5], **HOW)
    engine.run()
    assert (first.finish_reason, late.finish_reason) == ("error", "length")
    assert first.tokens == alone(PROMPTS[4], 9)[: len(first.tokens)]
    assert late.tokens == alone(PROMPTS[5], 9)


def test_a_failing_swap_ends_one_request(lm, alone, monkeypatch):
    engine = make_engine(lm, pages=14, preemption="swap", share=False)
    save, left = engine.core.swap.save, [1]

    def failing(*given):
        if left:
            left.pop()
            raise OSError("no memory")
        return save(*given)

    monkeypatch.setattr(engine.core.swap, "save", failing)
    requests = [engine.submit(PROMPTS[7], max_new_tokens=18, stop=()) for _ in range(4)]
    engine.run()
    assert sorted(r.finish_reason for r in requests) == ["error", "length", "length", "length"]
    assert all(r.tokens == alone(PROMPTS[7], 18) for r in requests if r.error is None)
    check_empty(engine)


def test_prompts_samplers_and_keys_are_on_the_host(engine, alone):
    device = jax.devices()[0]
    sampler = jax.tree.map(lambda leaf: jax.device_put(np.float32(leaf), device), HOT)
    key = jax.device_put(jax.random.key(1), device)
    prompt = jax.device_put(np.asarray(PROMPTS[4], np.int32), device)
    request = engine.submit(prompt, sampler=sampler, key=key, **HOW)
    assert isinstance(request.prompt, np.ndarray)
    for leaf in jax.tree.leaves((request.sampler, request.key)):
        assert not isinstance(leaf, jax.Array)
    for leaf in (*jax.tree.leaves(sampler), key):
        leaf.delete()
    engine.run()
    assert request.tokens == alone(PROMPTS[4], 9, sampler=HOT, key=jax.random.key(1))


def test_an_iteration_that_is_left_cancels_its_request(engine, alone):
    def broken(request):
        for _ in request:
            break

    def raising(request):
        def fail():
            for token in request:
                raise KeyError(token)

        with pytest.raises(KeyError):
            fail()

    def closed(request):
        tokens = iter(request)
        next(tokens)
        tokens.close()

    def collected(request):
        tokens = iter(request)
        next(tokens)
        cycle = [tokens]
        cycle.append(cycle)
        del tokens, cycle
        gc.collect()

    def awaited(request):
        async def first():
            async for _ in request:
                break
            assert request.state == "finished"

        asyncio.run(first())

    def aclosed(request):
        async def first():
            tokens = aiter(request)
            await anext(tokens)
            await tokens.aclose()
            assert request.state == "finished"

        asyncio.run(first())

    def given_up(request):
        async def first():
            async for _ in request:
                await asyncio.sleep(60)

        async def soon():
            task = asyncio.create_task(first())
            while not request.tokens:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(soon())

    other = engine.submit(PROMPTS[5], max_new_tokens=200, stop=())
    for leave in (broken, raising, closed, collected, awaited, aclosed, given_up):
        request = engine.submit(PROMPTS[4], max_new_tokens=100, stop=())
        leave(request)
        assert (request.state, request.finish_reason) == ("finished", "cancelled"), leave
        assert 0 < len(request.tokens) < 100
        assert engine.stats()["running"] == 1
    assert list(engine.submit(PROMPTS[4], **HOW)) == alone(PROMPTS[4], 9)
    other.cancel()


def test_an_iteration_that_is_left_before_its_first_token(engine):
    def dropped(request):
        iter(request)

    def closed(request):
        tokens = iter(request)
        tokens.close()
        assert next(tokens, None) is None

    def awaited(request):
        aiter(request)

    for leave in (dropped, closed, awaited):
        request = engine.submit(PROMPTS[4], max_new_tokens=100, stop=())
        leave(request)
        gc.collect()
        assert (request.tokens, request.finish_reason) == ([], "cancelled"), leave


def test_a_closed_iteration_gives_no_more_tokens(engine):
    request = engine.submit(PROMPTS[4], max_new_tokens=100, stop=())
    tokens = iter(request)
    next(tokens)
    tokens.close()
    assert list(tokens) == []


def test_generate_in_one_call(engine, lm, alone, tiny_model):
    key = jax.random.key(3)
    requests = engine.generate(PROMPTS[:6], sampler=HOT, key=key, request_ids="abcdef", **HOW)
    want = jkv.generate(tiny_model, PROMPTS[:6], sampler=HOT, key=key, slots=64, **HOW)
    assert [r.tokens for r in requests] == want.tokens.tolist()
    assert [r.request_id for r in requests] == list("abcdef")
    texts = engine.generate(["abc", "fed"], **HOW)
    assert [r.tokens for r in texts] == [alone([0, 1, 2], 9), alone([5, 4, 3], 9)]
    assert [r.prompt.tolist() for r in engine.generate("abc", **HOW)] == [[0, 1, 2]]
    with pytest.raises(ValueError, match="ids for 2 prompts"):
        engine.generate(["a", "b"], request_ids=[1], **HOW)
    with pytest.raises(TypeError, match="prompt 1"):
        engine.generate(["a", 3], **HOW)
    assert engine.core.scheduler.requests.live == {}

    def failing(request, token):
        if request.request_id == 1:
            raise OSError("gone")

    failed, good = engine.generate([[1], [2]], on_token=failing, request_ids=[1, 2], **HOW)
    assert isinstance(failed.error, OSError)
    assert good.tokens == alone([2], 9)

    def interrupting(request, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1], [2]], on_token=interrupting, **HOW)
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0


def test_the_last_in_rank_is_preempted(lm, alone):
    engine = make_engine(lm, pages=12, page=4, max_batch=2, share=False)
    requests = [engine.submit(PROMPTS[5], max_new_tokens=20, stop=()) for _ in range(2)]
    engine.run()
    assert [r.tokens for r in requests] == [alone(PROMPTS[5], 20)] * 2
    assert requests[0].preemptions == 0
    assert requests[1].preemptions > 0


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_sampler_keeps_its_history_over_a_preemption(lm, alone, preemption):
    sampler = jkv.sampling.chain(jkv.sampling.repetition_penalty(3.0), jkv.sampling.greedy())
    engine = make_engine(lm, pages=14, preemption=preemption, share=False, max_batch=2)
    prompts = [PROMPTS[4], PROMPTS[5]]
    requests = [engine.submit(p, max_new_tokens=36, stop=(), sampler=sampler) for p in prompts]
    engine.run()
    assert sum(r.preemptions for r in requests) > 0
    assert engine.stats()["preemptions"][preemption] > 0
    for request, prompt in zip(requests, prompts, strict=True):
        want = alone(prompt, 36, sampler=sampler)
        assert request.tokens == want
        assert want != alone(prompt, 36)  # it does look back


def test_a_callback_gets_each_token_once_at_a_stop_string(engine, alone, lm):
    text = lm.tokenizer.decode(alone(PROMPTS[6], 12))[3:6]
    heard = []

    def hear(request, token):
        heard.append(token)
        assert request.tokens == heard

    request = engine.submit(PROMPTS[6], max_new_tokens=12, stop=[text], on_token=hear)
    engine.run()
    assert request.finish_reason == "stop"
    want = jkv.generate(lm, [PROMPTS[6]], max_new_tokens=12, stop=[text], slots=64)
    assert heard == request.tokens == want.tokens[0, : want.lengths[0]].tolist()
    assert len(heard) < 12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_is_refused(engine, lm, tmp_path):
    from jkv.store import Memory, Store

    engine.submit([1, 2], **HOW).result()
    store = Store(tiers=[Memory(1 << 20)])
    calls = (
        lambda: engine.submit([1], **HOW),
        engine.step,
        lambda: engine.generate([[1]], **HOW),
        lambda: jkv.generate(lm, [[1]], **HOW),
        lambda: jkv.load("shakespeare"),
        lambda: store.get("key"),
    )
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        told = []
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                told.append("spawn" in str(error))
        os._exit(0 if told == [True] * len(calls) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.close()
    assert engine.submit([1, 2], **HOW).result()
