"""The scheduler alone: which requests run, what a step computes, and which are preempted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.engine.machine import Machine, answer

RNG = np.random.default_rng(1)
PROMPTS = [RNG.integers(0, 97, n).tolist() for n in (1, 3, 4, 5, 8, 9, 13, 21, 2, 16, 7, 30)]


def test_it_needs_no_jax():
    code = (
        "import sys; sys.modules['jax'] = None; from jkv.engine.scheduler import Scheduler;"
        "print(Scheduler.__name__)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.stdout.strip() == "Scheduler", done.stderr


@pytest.mark.parametrize("pages", [13, 64])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("windows", [(None,), (3, None), (6,)])
@pytest.mark.parametrize("how", [{}, {"preemption": "swap"}, {"preemption": "swap", "room": False}])
def test_tokens_do_not_depend_on_the_schedule(pages, share, windows, how):
    """Each token is a sum of all tokens before it, which the fake device reads from the pages."""
    machine = Machine(pages=pages, share=share, windows=windows, **how)
    for _ in range(2):  # the second time some prompts are found
        plan = [(p, 5 + 2 * i) for i, p in enumerate(PROMPTS[:8])]
        requests = [machine.submit(p, n) for p, n in plan]
        machine.run()
        assert [r.tokens for r in requests] == [answer(p, n) for p, n in plan]
        assert {r.finish_reason for r in requests} == {"length"}
    counts = machine.stats.counts
    swaps = how.get("preemption") == "swap" and how.get("room", True)
    short = pages == 13 and None in windows  # a window of all layers needs few pages
    assert (counts["swap" if swaps else "recompute"] > 0) == short
    assert swaps or not counts["swap"]


def test_requests_are_preempted_only_once_outputs_are_known():
    machine = Machine(pages=8, lanes=2, share=False)
    first, second = machine.submit(PROMPTS[4], 20), machine.submit(PROMPTS[4], 20)
    scheduler, answers = machine.scheduler, []
    schedule = scheduler.schedule

    def watched(*, in_flight):
        before = first.preemptions + second.preemptions
        made = schedule(in_flight=in_flight)
        preempted = first.preemptions + second.preemptions - before
        answers.append((in_flight, made is None, preempted))
        return made

    scheduler.schedule = watched
    machine.run()
    assert (True, True, 0) in answers
    assert not any(preempted for in_flight, _, preempted in answers if in_flight)
    assert not any(refused for in_flight, refused, _ in answers if not in_flight)
    # The last in rank goes, and the first is never disturbed.
    assert first.preemptions == 0
    assert second.preemptions > 0
    assert first.tokens == second.tokens == answer(PROMPTS[4], 20)


def test_lanes_go_to_the_first_in_rank():
    machine = Machine(lanes=2)
    late, soon, sooner = (machine.submit(PROMPTS[i], 4, rank=-100 * i) for i in range(3))
    machine.step()
    assert [r.state for r in (late, soon, sooner)] == ["waiting", "running", "running"]
    machine.run()
    assert late.tokens == answer(PROMPTS[0], 4)


def test_prompts_share_one_chunk():
    machine = Machine(lanes=3, chunk=8)
    for i in (11, 7, 9):
        machine.submit(PROMPTS[i], 1)
    machine.run()
    sizes = [[p.stop - p.start for p in s.prefills] for s in machine.schedules if s.prefills]
    # Two at a time share the chunk; the last one is alone in the end.
    assert sizes == [[4, 4]] * 5 + [[4, 1], [4, 4], [2, 4], [8]]


def test_an_equal_prefix_is_waited_for_and_found():
    machine = Machine(lanes=3, chunk=4)
    prompt = PROMPTS[11]
    first, same, other = (machine.submit(prompt, 3, tenant=t) for t in ("a", "a", "b"))
    machine.step()
    assert [r.state for r in (first, same, other)] == ["running", "waiting", "running"]
    machine.run()
    # The last token is computed in any case: its logits are wanted.
    assert [r.cached_tokens for r in (first, same, other)] == [0, 28, 0]
    assert [r.tokens for r in (first, same, other)] == [answer(prompt, 3)] * 3


def test_evicted_pages_are_found_in_a_store():
    machine = Machine(pages=10, store=True)
    plan = [(PROMPTS[i], 4) for i in (7, 9, 6, 5)]
    found = []
    for prompt, new in 2 * plan:
        request = machine.submit(prompt, new)
        machine.run()
        assert request.tokens == answer(prompt, new)
        found.append(request.cached_tokens)
    # All pages but those with the last token, whose logits are wanted.
    assert found == [0] * 4 + [(len(prompt) - 1) // 4 * 4 for prompt, _ in plan]
    assert len(machine.swap.stored) > 10  # more than the pool has


def test_pages_out_of_a_window_are_given_back():
    machine = Machine(pages=16, windows=(3, None), share=False)
    machine.submit(PROMPTS[11], 20)
    least = [16, 16]
    while machine.step():
        least = [min(n, p.free_pages) for n, p in zip(least, machine.pages.pools, strict=True)]
    assert least == [16 - 2, 16 - 13]


def test_a_running_request_keeps_a_page_to_go_on():
    """A request that would leave none for it is not admitted beside it."""
    machine = Machine(pages=8, lanes=2, share=False)
    first = machine.submit(PROMPTS[9], 8)
    for _ in range(3):
        machine.step()
    second = machine.submit(PROMPTS[7][:8], 2)
    machine.step()
    assert [r.state for r in (first, second)] == ["running", "waiting"]
    machine.run()
    assert first.preemptions == second.preemptions == 0


def test_an_error_while_swapping_ends_one_request(monkeypatch):
    machine = Machine(pages=8, lanes=2, share=False, preemption="swap")
    first, second = machine.submit(PROMPTS[4], 20), machine.submit(PROMPTS[4], 20)

    def failing(sequence):
        raise OSError("no memory")

    monkeypatch.setattr(machine.swap, "save", failing)
    machine.run()
    assert (first.finish_reason, second.finish_reason) == ("length", "error")
    assert isinstance(second.error, OSError)
    assert first.tokens == answer(PROMPTS[4], 20)


def test_an_error_at_admission_is_reported_alone(monkeypatch):
    machine = Machine(lanes=2)
    bad, good = machine.submit(PROMPTS[4], 3), machine.submit(PROMPTS[5], 3)
    match = machine.pages.match

    def failing(page_tables, ids):
        if ids == PROMPTS[4]:
            raise ValueError("the store is closed")
        return match(page_tables, ids)

    monkeypatch.setattr(machine.pages, "match", failing)
    admitted, failed = machine.scheduler.admit()
    assert [s.request for s in admitted] == [good]
    assert [(r, str(e)) for r, e in failed] == [(bad, "the store is closed")]
    assert machine.pages.stats()["sequences"] == 1


def test_after_a_reset_all_requests_wait_with_their_tokens():
    machine = Machine(lanes=2)
    plan = [(PROMPTS[4], 12), (PROMPTS[5], 12), (PROMPTS[6], 12)]
    requests = [machine.submit(p, n) for p, n in plan]
    for _ in range(5):
        machine.step()
    assert all(0 < len(r.tokens) < 12 for r in requests[:2])
    machine.in_flight = []  # lost, like all that the device had
    machine.pages.reset()
    machine.scheduler.reset()
    machine.scheduler.recover(machine.outputs.end_if_complete)
    assert [r.state for r in requests] == ["waiting"] * 3
    machine.run()
    assert [r.tokens for r in requests] == [answer(p, n) for p, n in plan]
    assert [r.preemptions for r in requests] == [1, 1, 0]
