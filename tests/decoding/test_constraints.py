"""Penalties, biases, least lengths, n-grams and plain functions, against loops in Python."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv import sampling
from tests.decoding import oracle

INF = np.inf
PROMPTS = [[1], [2, 3, 4, 5, 6], [7, 8, 9]]
NEW = 14
EVEN = tuple(range(0, 11, 2))

# Each as (logits [V], prompt, generated) to logits [V].
Processor = Callable[[np.ndarray, list[int], list[int]], np.ndarray]


def presence(penalty: float) -> Processor:
    return lambda row, prompt, new: row - np.float32(penalty) * np.isin(np.arange(len(row)), new)


def frequency(penalty: float) -> Processor:
    def process(row: np.ndarray, prompt: list[int], new: list[int]) -> np.ndarray:
        counts = collections.Counter(new)
        return row - np.asarray([penalty * counts[t] for t in range(len(row))], np.float32)

    return process


def repetition(penalty: float) -> Processor:
    def process(row: np.ndarray, prompt: list[int], new: list[int]) -> np.ndarray:
        row = row.copy()
        for token in {*prompt, *new}:
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        return row

    return process


def bias(values: dict[int, float]) -> Processor:
    def process(row: np.ndarray, prompt: list[int], new: list[int]) -> np.ndarray:
        row = row.copy()
        for token, value in values.items():
            row[token] += value
        return row

    return process


def least(count: int, ends: tuple[int, ...]) -> Processor:
    def process(row: np.ndarray, prompt: list[int], new: list[int]) -> np.ndarray:
        row = row.copy()
        if len(new) < count:
            row[list(ends)] = -INF
        return row

    return process


def no_repeat(n: int) -> Processor:
    def process(row: np.ndarray, prompt: list[int], new: list[int]) -> np.ndarray:
        row, said = row.copy(), [*prompt, *new]
        grams = {tuple(said[i : i + n]) for i in range(len(said) - n + 1)}
        for token in range(len(row)):
            if (*said[len(said) - n + 1 :], token) in grams:
                row[token] = -INF
        return row

    return process


def odd_only(logits: Any) -> Any:
    """A user's function: no even token."""
    return logits.at[:, ::2].set(-jnp.inf)


def fewer_even(logits: Any) -> Any:
    """Another: even tokens are less likely."""
    return logits.at[:, ::2].add(-4.0)


CASES: dict[str, tuple[Any, Processor]] = {
    "presence": (sampling.presence_penalty(3.0), presence(3.0)),
    "presence, encouraging": (sampling.presence_penalty(-2), presence(-2)),
    "frequency": (sampling.frequency_penalty(1.5), frequency(1.5)),
    "repetition": (sampling.repetition_penalty(3.0), repetition(3.0)),
    "bias": (sampling.logit_bias({3: 4.0, 7: -INF}), bias({3: 4.0, 7: -INF})),
    "bias of all": (
        sampling.logit_bias(np.linspace(-5, 5, 11)),
        bias(dict(enumerate(np.linspace(-5, 5, 11).tolist()))),
    ),
    "least length": (sampling.min_new_tokens(5, EVEN), least(5, EVEN)),
    "unigrams": (sampling.no_repeat_ngram(1), no_repeat(1)),
    "bigrams": (sampling.no_repeat_ngram(2), no_repeat(2)),
    "trigrams": (sampling.no_repeat_ngram(3), no_repeat(3)),
    "a function": (fewer_even, bias(dict.fromkeys(EVEN, -4.0))),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class ByStep:
    """Forbids two tokens, others at each step: its state is how many steps there were."""

    def init(self, tokens: Any, vocab: int) -> Any:
        del vocab
        return jnp.zeros((tokens.shape[0],), jnp.int32)

    def update(self, logits: Any, state: Any, token: Any) -> Any:
        del token
        rows = jnp.arange(logits.shape[0])
        for turn in range(2):
            logits = logits.at[rows, (state * 3 + turn) % logits.shape[1]].set(-jnp.inf)
        return logits, state + 1


def by_step(row: np.ndarray, prompt: list[int], new: list[int]) -> np.ndarray:
    row = row.copy()
    row[[(len(new) * 3 + turn) % len(row) for turn in range(2)]] = -INF
    return row


CASES["a state that counts"] = ByStep(), by_step

# All that looks back, in one chain: one program for every loop.
TOGETHER = [
    "repetition",
    "presence, encouraging",
    "frequency",
    "bias",
    "trigrams",
    "a function",
    "a state that counts",
]
CHAIN = sampling.chain(*(CASES[name][0] for name in TOGETHER), sampling.greedy())


def together(row: np.ndarray, prompt: list[int], new: list[int]) -> np.ndarray:
    for name in TOGETHER:
        row = CASES[name][1](row, prompt, new)
    return row


def wanted(model: Any, prompt: list[int], process: Processor, new: int) -> list[int]:
    """The greedy continuation under a processor, the whole prefix recomputed for each token."""
    generated: list[int] = []
    while len(generated) < new:
        logits = oracle.logits(model, [*prompt, *generated])[-1]
        generated.append(int(np.argmax(process(logits, prompt, generated))))
    return generated


@pytest.mark.parametrize("name", CASES)
def test_each_against_its_loop(name):
    """Logits and tokens at random, ragged rows, one of them without a prompt."""
    transform, process = CASES[name]
    transform = sampling.bind(transform, 11)
    rng = np.random.default_rng(1)
    prompts = [*PROMPTS, []]
    tokens = np.full((4, 24), -1, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    update = jax.jit(transform.update)
    state = transform.init(jnp.asarray(tokens), 11)
    generated: list[list[int]] = [[] for _ in prompts]
    token = np.full(4, -1, np.int32)
    for _ in range(NEW):
        logits = (rng.normal(size=(4, 11)) * 3).astype(np.float32)
        logits[0, 4] = -INF
        got, state = update(logits, state, token)
        for row, prompt, new, before in zip(
            np.asarray(got), prompts, generated, logits, strict=True
        ):
            np.testing.assert_allclose(row, process(before, prompt, new), rtol=1e-6, atol=1e-6)
        token = rng.integers(0, 4, size=4).astype(np.int32)
        for new, said in zip(generated, token.tolist(), strict=True):
            new.append(said)


@pytest.fixture(scope="module")
def continuations(tiny_model):
    """What each prompt is continued with under the chain."""
    return [wanted(tiny_model, prompt, together, 24) for prompt in PROMPTS]


OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "stop": (), "sampler": CHAIN}


def test_generate_and_stream_say_what_the_loop_says(tiny_model, continuations):
    out = jkv.generate(tiny_model, PROMPTS, **OPTIONS)
    assert oracle.generated(out) == continuations
    blocks = jkv.stream(tiny_model, PROMPTS, block=32, **OPTIONS)
    assert np.concatenate([b.tokens for b in blocks], axis=1).tolist() == continuations


def test_rollout_says_what_the_loop_says(tiny_model, continuations):
    """Of left-padded rows too: padding is no token."""

    @jax.jit
    def run(model, tokens, counts, said):
        cache = jkv.init_cache(model.config, jkv.dense(), batch=3, slots=32)
        logits, cache = jkv.prefill(model, jnp.maximum(tokens, 0), cache, counts)
        return jkv.rollout(model, logits, cache, steps=24, sampler=CHAIN, history=said).tokens

    tokens, said = (np.full((3, 5), -1, np.int32) for _ in range(2))
    for i, prompt in enumerate(PROMPTS):
        tokens[i, : len(prompt)] = said[i, 5 - len(prompt) :] = prompt
    got = run(tiny_model, tokens, np.asarray([1, 5, 3], np.int32), said)
    assert got.tolist() == continuations


def test_a_rollout_looks_back_at_its_own_tokens(tiny_model):
    """Also where it is not told of those before."""

    @jax.jit
    def run(model, tokens):
        cache = jkv.init_cache(model.config, jkv.dense(), batch=1, slots=32)
        logits, cache = jkv.prefill(model, tokens, cache)
        sampler = sampling.chain(sampling.no_repeat_ngram(2), sampling.greedy())
        return jkv.rollout(model, logits, cache, steps=NEW, sampler=sampler).tokens

    want = wanted(tiny_model, [5], lambda row, _, new: no_repeat(2)(row, [], new), NEW)
    assert run(tiny_model, np.asarray([[5]])).tolist() == [want]
    assert want != oracle.greedy(tiny_model, [5], NEW)


def test_samples_look_back_too(tiny_model):
    sampler = sampling.chain(sampling.frequency_penalty(1.5), sampling.no_repeat_ngram(2))
    options: dict[str, Any] = {"max_new_tokens": NEW, "stop": (), "sampler": sampler}
    options["key"] = jax.random.key(3)
    twice = [prompt for prompt in PROMPTS for _ in range(2)]
    want = jkv.generate(tiny_model, twice, **options).tokens
    samples = jkv.generate(tiny_model, PROMPTS, samples=2, **options).tokens
    np.testing.assert_array_equal(samples, want)
    for row, prompt in zip(want.tolist(), twice, strict=True):
        pairs = list(zip([*prompt, *row], [*prompt[1:], *row], strict=False))
        assert len(set(pairs)) == len(pairs)


def test_no_end_before_the_least_length(tiny_model):
    """The ends are those of each row of the call, unless others are named."""
    greedy = [oracle.greedy(tiny_model, prompt, 8) for prompt in PROMPTS]
    stop: Any = [[row[0]] for row in greedy]
    sampler = sampling.chain(sampling.min_new_tokens(4), sampling.greedy())
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=9, stop=stop, sampler=sampler)
    for row, ends, prompt in zip(oracle.generated(out), stop, PROMPTS, strict=True):
        want = wanted(tiny_model, prompt, least(4, tuple(ends)), 9)
        end = next((i + 1 for i, t in enumerate(want) if t in ends), 9)
        assert row == want[:end]
        assert len(row) > 4
    assert (
        jkv.generate(tiny_model, PROMPTS, max_new_tokens=9, stop=stop).lengths.tolist() == [1] * 3
    )
    # New are the tokens of this call.
    more = jkv.generate(
        tiny_model, [[], [], []], max_new_tokens=9, stop=stop, sampler=sampler, resume=out
    )
    assert (more.lengths > 4).all()


def test_penalties_count_what_this_call_generates(tiny_model):
    sampler = sampling.chain(sampling.presence_penalty(3.0), sampling.greedy())
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=5, stop=(), sampler=sampler)
    more = jkv.generate(
        tiny_model, [[], [], []], max_new_tokens=5, stop=(), sampler=sampler, resume=out
    )
    fresh = [row.tolist() for row in out.history]
    want = [wanted(tiny_model, prompt, presence(3.0), 5) for prompt in fresh]
    assert oracle.generated(more) == want


# The engine


@pytest.mark.parametrize("how", ["recompute", "swap"])
def test_a_preempted_request_remembers(tiny_model, continuations, how):
    """The state is that of a request that was never preempted, beside one without a sampler."""
    engine = jkv.Engine(tiny_model, pages=12, page=4, max_batch=3, block=4, preemption=how)
    requests = [engine.submit(prompt, **OPTIONS) for prompt in PROMPTS]
    plain = engine.submit(PROMPTS[1], max_new_tokens=24, stop=())
    assert [request.result() for request in requests] == continuations
    assert plain.result() == oracle.greedy(tiny_model, PROMPTS[1], 24)
    assert engine.stats()["preemptions"][how] > 0
    assert any(request.preemptions for request in requests)


def test_the_engine_holds_ends_of_requests_apart(tiny_model):
    sampler = sampling.chain(sampling.min_new_tokens(4), sampling.greedy())
    engine = jkv.Engine(tiny_model, pages=12, page=4, max_batch=3, block=4)
    stops = [[oracle.greedy(tiny_model, prompt, 1)[0]] for prompt in PROMPTS]
    requests = [
        engine.submit(prompt, max_new_tokens=9, sampler=sampler, stop=stop)
        for prompt, stop in zip(PROMPTS, stops, strict=True)
    ]
    want = jkv.generate(tiny_model, PROMPTS, max_new_tokens=9, sampler=sampler, stop=stops)
    assert [request.result() for request in requests] == oracle.generated(want)


# Functions


@pytest.mark.parametrize(
    "function",
    [
        odd_only,
        functools.partial(lambda logits, step: logits.at[:, ::step].set(-jnp.inf), step=2),
        jax.tree_util.Partial(
            lambda mask, logits: logits + mask, jnp.where(jnp.arange(11) % 2, 0, -INF)[None]
        ),
        jax.jit(odd_only),
    ],
    ids=["def", "partial", "a pytree of arrays", "jit"],
)
def test_functions_of_the_logits(tiny_model, function):
    key = jax.random.key(0)
    out = jkv.generate(tiny_model, PROMPTS, max_new_tokens=6, sampler=function, key=key, stop=())
    assert (out.tokens % 2 == 1).all()


def test_the_same_function_compiles_nothing(tiny_model, compiles):
    def run():
        sampler = sampling.chain(odd_only, sampling.greedy())
        jkv.generate(tiny_model, PROMPTS, max_new_tokens=3, sampler=sampler)

    run()
    with compiles:
        run()
        assert compiles.count == 0


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (lambda tokens, logits: logits, r"one argument.*logits \[B, V\].*init and update"),
        (lambda: None, "one argument"),
        (sampling.temperature, r"such as jkv\.sampling\.temperature\(0\.8\)"),
        (sampling.no_repeat_ngram, r"such as jkv\.sampling\.temperature\(0\.8\)"),
        ("hot", r"function of the logits"),
    ],
    ids=["two arguments", "no argument", "a maker", "another maker", "a text"],
)
def test_what_is_no_function_of_the_logits(tiny_model, sampler, message):
    engine = jkv.Engine(tiny_model, pages=8, page=4, max_batch=1)
    for call in (
        lambda: jkv.generate(tiny_model, PROMPTS, max_new_tokens=2, sampler=sampler),
        lambda: sampling.chain(sampler),
        lambda: engine.submit([1], max_new_tokens=2, sampler=sampler),
        lambda: engine.warm([sampler]),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def first_token(logits: Any) -> Any:
    """A mistake: the best tokens instead of logits."""
    return jnp.argmax(logits, axis=1)


def test_what_a_function_returns_is_looked_at(tiny_model):
    sampler = sampling.chain(first_token, sampling.greedy())
    engine = jkv.Engine(tiny_model, pages=8, page=4, max_batch=1)
    for call in (
        lambda: jkv.generate(tiny_model, PROMPTS, max_new_tokens=2, sampler=sampler),
        lambda: engine.submit([1], max_new_tokens=2, sampler=sampler),
    ):
        with pytest.raises(
            ValueError, match=r"first_token made int32\[[13]\].*float32\[[13], 11\]"
        ):
            call()


# Drafts


@pytest.mark.parametrize(
    "transform",
    [
        sampling.presence_penalty(1.0),
        sampling.frequency_penalty(1.0),
        sampling.no_repeat_ngram(2),
        sampling.min_new_tokens(2),
    ],
    ids=lambda t: type(t).__name__,
)
def test_drafts_refuse_what_looks_back(tiny_model, transform):
    sampler = sampling.chain(transform, sampling.greedy())
    with pytest.raises(ValueError, match="no_repeat_ngram"):
        jkv.generate(
            tiny_model, PROMPTS, max_new_tokens=4, sampler=sampler, draft=jkv.prompt_lookup()
        )


def test_a_draft_goes_with_a_bias(tiny_model):
    sampler = sampling.chain(CASES["bias"][0], sampling.greedy())
    out = jkv.generate(
        tiny_model, PROMPTS, max_new_tokens=NEW, sampler=sampler, stop=(), draft=jkv.prompt_lookup()
    )
    want = [wanted(tiny_model, prompt, CASES["bias"][1], NEW) for prompt in PROMPTS]
    assert oracle.generated(out) == want
