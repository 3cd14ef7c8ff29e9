"""Beam search against a few lines of numpy over a model without a cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv.errors import CacheFullError
from tests.cache.kinds import KINDS
from tests.decoding import oracle

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

PROMPTS = [[3], [1, 2, 3, 4, 5, 6, 7], [(7 * i + i * i) % 11 for i in range(20)]]
STOPS = [[], [1, 5], [6]]
NEW = 10


@pytest.fixture(scope="module")
def model(tiny_model):
    """One that is less sure of what it says, so that the likeliest text is not the greedy one."""
    flat = nnx.clone(tiny_model)
    flat.embedding[...] = tiny_model.embedding[...] / 6
    return flat


@pytest.fixture(scope="module")
def spy(model):
    return oracle.Spy(model)


class Wanted:
    """The same search, hypothesis by hypothesis, each prefix recomputed; never ended early."""

    def __init__(self, model):
        self.model, self.known = model, {}

    def logprobs(self, row):
        if tuple(row) not in self.known:
            scores = oracle.logits(self.model, row)[-1].astype(np.float64)
            scores -= scores.max()
            self.known[tuple(row)] = scores - np.log(np.exp(scores).sum())
        return self.known[tuple(row)]

    def __call__(self, prompt, beams, new, *, stop=(), penalty=1.0, early=False):
        running, found = [(0.0, [])], []
        for step in range(1, new + 1):
            extended = [
                (total + logprob, [*said, token])
                for total, said in running
                for token, logprob in enumerate(self.logprobs([*prompt, *said]))
            ]
            extended.sort(key=lambda e: -e[0])
            for total, said in extended[:beams]:
                if said[-1] in stop or step == new:
                    reason = "stop" if said[-1] in stop else "length"
                    found.append((total / len(said) ** penalty, said, reason))
            found = sorted(found, key=lambda f: -f[0])[:beams]
            if early and len(found) == beams:
                break
            running = [e for e in extended if e[1][-1] not in stop][:beams]
        return found


@pytest.fixture(scope="module")
def wanted(model):
    return Wanted(model)


def check(out, row, found):
    """A prompt's hypotheses are those of the oracle."""
    for beam, (score, said, reason) in enumerate(found):
        assert out.tokens[row, beam, : len(said)].tolist() == said
        assert (out.tokens[row, beam, len(said) :] == -1).all()
        assert out.lengths[row, beam] == len(said)
        assert out.finish_reasons[row][beam] == reason
        np.testing.assert_allclose(out.scores[row, beam], score, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.5, -1.0])
@pytest.mark.parametrize("beams", [2, 4])
def test_hypotheses_and_scores(model, wanted, beams, penalty):
    out = jkv.beam_search(
        model, PROMPTS, max_new_tokens=NEW, beams=beams, length_penalty=penalty, stop=STOPS
    )
    assert out.tokens.shape == (3, beams, out.lengths.max())
    assert (np.diff(out.scores, axis=1) <= 0).all()
    assert out.scores.dtype == np.float32
    for row, (prompt, stop) in enumerate(zip(PROMPTS, STOPS, strict=True)):
        check(out, row, wanted(prompt, beams, NEW, stop=stop, penalty=penalty))


def test_the_cases_are_not_easy(model, wanted):
    """Beams beat greedy decoding, hypotheses of several lengths and reasons are found."""
    found = [
        [wanted(p, 4, NEW, stop=s, penalty=x) for x in (-1.0, 0.0, 1.0, 2.5)]
        for p, s in zip(PROMPTS, STOPS, strict=True)
    ]
    greedy = [oracle.greedy(model, p, NEW) for p in PROMPTS]
    assert any(f[2][0][1] != g for f, g in zip(found, greedy, strict=True))
    assert {reason for f in found for per in f for _, _, reason in per} == {"stop", "length"}
    assert len({len(said) for f in found for per in f for _, said, _ in per}) > 3
    assert [said for _, said, _ in found[1][0]] != [said for _, said, _ in found[1][3]]


def test_without_a_cache(model, wanted):
    out = jkv.beam_search(model, PROMPTS, max_new_tokens=NEW, stop=STOPS, cache=jkv.none())
    for row, (prompt, stop) in enumerate(zip(PROMPTS, STOPS, strict=True)):
        check(out, row, wanted(prompt, 4, NEW, stop=stop))


def test_as_many_beams_as_tokens(model, wanted):
    """More than can be filled at the first step; and in one step, all of the vocabulary."""
    stop = list(range(8))
    for new in (1, 4):
        out = jkv.beam_search(model, PROMPTS[:1], max_new_tokens=new, beams=11, stop=stop)
        check(out, 0, wanted(PROMPTS[0], 11, new, stop=stop))
    every = jkv.beam_search(model, PROMPTS[:1], max_new_tokens=4, beams=3, stop=list(range(11)))
    check(every, 0, wanted(PROMPTS[0], 3, 4, stop=list(range(11))))
    assert every.lengths.tolist() == [[1, 1, 1]]


def test_a_prompt_alone_says_the_same(model):
    together = jkv.beam_search(model, PROMPTS, max_new_tokens=NEW, stop=STOPS)
    for row, (prompt, stop) in enumerate(zip(PROMPTS, STOPS, strict=True)):
        alone = jkv.beam_search(model, [prompt], max_new_tokens=NEW, stop=[stop])
        size = alone.tokens.shape[2]
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row, :, :size])
        assert (together.tokens[row, :, size:] == -1).all()
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=1e-5)
        assert alone.finish_reasons[0] == together.finish_reasons[row]


def test_one_beam_is_greedy(model):
    stops = [[], [int(oracle.greedy(model, PROMPTS[1], 4)[3])], [2]]
    want = jkv.generate(model, PROMPTS, max_new_tokens=NEW, stop=stops, return_logprobs=True)
    assert set(want.finish_reasons) == {"stop", "length"}
    out = jkv.beam_search(model, PROMPTS, max_new_tokens=NEW, stop=stops, beams=1)
    np.testing.assert_array_equal(out.tokens[:, 0], want.tokens)
    assert tuple(reasons[0] for reasons in out.finish_reasons) == want.finish_reasons
    mean = want.logprobs.sum(axis=1) / want.lengths
    np.testing.assert_allclose(out.scores[:, 0], mean, rtol=1e-4)


def test_early_stopping(model, wanted):
    """The first W that end; the positive twin finds better ones later."""
    stop, apart = [1, 5, 6], 0
    asked = {"max_new_tokens": NEW, "beams": 2, "stop": stop, "length_penalty": 2.5}
    early = jkv.beam_search(model, PROMPTS, early_stopping=True, **asked)
    late = jkv.beam_search(model, PROMPTS, **asked)
    for row, prompt in enumerate(PROMPTS):
        check(early, row, wanted(prompt, 2, NEW, stop=stop, penalty=2.5, early=True))
        check(late, row, wanted(prompt, 2, NEW, stop=stop, penalty=2.5))
        apart += early.tokens[row, 0, 0] != late.tokens[row, 0, 0] or (
            early.lengths[row].tolist() != late.lengths[row].tolist()
        )
    assert apart


def test_each_prompt_is_prefilled_once_and_the_search_ends_when_nothing_can_win(spy, wanted):
    """Of forty steps few are made, and the oracle, which makes them all, finds nothing else."""
    stops = [list(range(8)), [5], [6]]
    spy.passes()
    out = jkv.beam_search(spy, PROMPTS, max_new_tokens=40, stop=stops, length_penalty=0.0)
    passes = spy.passes()
    prefill = [counts for size, counts in passes if size > 1]
    assert np.sum(prefill, axis=0).tolist() == [len(p) for p in PROMPTS]
    steps = [counts for size, counts in passes if size == 1]
    assert all(len(counts) == 12 for counts in steps)
    assert max(out.lengths.flat) <= len(steps) + 1 < 40
    active = np.sum(steps, axis=0).reshape(3, 4)
    assert (active == active[:, :1]).all()
    assert len(set(active[:, 0].tolist())) > 1  # prompts end apart
    for row, prompt in enumerate(PROMPTS):
        check(out, row, wanted(prompt, 4, 40, stop=stops[row], penalty=0.0))


def test_going_on_from_a_result(model, wanted):
    out = jkv.generate(model, PROMPTS, max_new_tokens=5)
    found = jkv.beam_search(model, [[5], [], [1, 2]], max_new_tokens=6, resume=out, stop=())
    for row, more in enumerate(([5], [], [1, 2])):
        check(found, row, wanted([*out.history[row].tolist(), *more], 4, 6))
    oracle.check_cache(model, out)  # as it was


def test_texts_and_the_models_own_ends(model, wanted):
    ending = nnx.clone(model)
    ending.config = dataclasses.replace(model.config, end_ids=(4, 9))
    out = jkv.beam_search(oracle.lm(ending), ["abc", [1], "d"], max_new_tokens=6)
    for row, prompt in enumerate(([0, 1, 2], [1], [3])):
        check(out, row, wanted(prompt, 4, 6, stop=(4, 9)))


def test_room_for_exactly_what_is_asked(model, wanted):
    out = jkv.beam_search(model, PROMPTS, max_new_tokens=5, stop=(), slots=24)
    check(out, 2, wanted(PROMPTS[2], 4, 5))
    with pytest.raises(CacheFullError, match="at least 24"):
        jkv.beam_search(model, PROMPTS, max_new_tokens=5, stop=(), slots=23)


@functools.partial(jax.jit, static_argnums=3)
def rescored(model, prompt, said, kind):
    """Log-probabilities of tokens [W, T] after a prompt, one step after the other."""
    cache = jkv.init_cache(model.config, kind, batch=1, slots=48)
    logits, cache = jkv.prefill(model, prompt[None], cache)
    cache = cache.fork(said.shape[0])

    def step(carry, token):
        logits, cache = carry
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        return jkv.decode_step(model, token, cache), logprob

    logits = jnp.repeat(logits, said.shape[0], axis=0)
    return jax.lax.scan(step, (logits, cache), said.T)[1].T


# One of each way to store tokens: that all kinds are reordered alike is tests/cache's to show.
FORMS = [k for k in KINDS if k.name in ("window", "int4", "sparse", "evicting")]


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_beams_keep_their_own_caches(model, case):
    """Taken by the wrong beam, a cache gives other log-probabilities than its hypothesis has."""
    out = jkv.beam_search(
        model, PROMPTS[1:2], max_new_tokens=12, beams=3, stop=(), cache=case.kind, slots=48
    )
    assert len({tuple(row) for row in out.tokens[0, :, :11].tolist()}) > 1
    logprobs = rescored(model, jnp.asarray(PROMPTS[1]), jnp.asarray(out.tokens[0]), case.kind)
    np.testing.assert_allclose(out.scores[0], np.mean(logprobs, axis=1), rtol=1e-3)


def test_other_requests_compile_nothing(model, compiles):
    def request(new, penalty, stop, prompts, early=False):
        jkv.beam_search(
            model,
            prompts,
            max_new_tokens=new,
            length_penalty=penalty,
            stop=stop,
            early_stopping=early,
        )

    request(NEW, 1.0, STOPS, PROMPTS)
    with compiles:
        request(3, 0.7, 5, PROMPTS)
        request(16, 2, (), [[1], [2, 3], [4] * 20], True)
        assert compiles.count == 0
        request(17, 2, (), PROMPTS)
        assert compiles.count > 0
