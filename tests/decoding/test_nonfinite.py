"""Logits that are NaN or infinite are errors with a row and a step, in every loop."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv.errors import NonFiniteError
from jkv.models import Decoder
from jkv.store import Memory, Store
from tests.decoding import oracle, texts

NEW = 9
ROWS = [[1, 2, 3], [4, 5, 6, 7, 8]]
BY_MODEL = "the model's logits are NaN"
BY_SAMPLER = "the sampler left nothing to draw from"


@pytest.fixture(scope="module")
def untied(tiny_config):
    """One layer, and a head of its own: a token may be bad to read and good to predict."""
    config = dataclasses.replace(tiny_config, layers=1, tied=False)
    model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    model.embedding[...] = model.embedding[...] * 50
    model.head.kernel[...] = model.head.kernel[...] * 10
    return model


def poisoned(model: Decoder, token: int, value: float = np.nan) -> Decoder:
    """A copy in which one token's embedding is not finite."""
    copy = nnx.clone(model)
    copy.embedding[...] = copy.embedding[...].at[token].set(value)
    return copy


@pytest.fixture(scope="module")
def good(untied) -> list[list[int]]:
    """What the rows say with finite weights."""
    return oracle.generated(jkv.generate(untied, ROWS, max_new_tokens=NEW))


@pytest.fixture(scope="module")
def bad(untied, good) -> tuple[Decoder, int, int]:
    """A model that fails on the first token that row 0 says and row 1 has not; and the step."""
    token = next(t for t in good[0] if t not in {*ROWS[0], *ROWS[1], *good[1]})
    return poisoned(untied, token), token, good[0].index(token) + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Closing:
    """A mask that leaves some value everywhere, from one step of each row on."""

    step: Any
    value: Any

    def init(self, tokens: Any, vocab: int) -> Any:
        return jnp.zeros((tokens.shape[0],), jnp.int32)

    def update(self, logits: Any, state: Any, token: Any) -> Any:
        closed = (state >= self.step)[:, None]
        return jnp.where(closed, jnp.float32(self.value), logits), state + 1


CLOSING = jkv.sampling.chain(Closing(3, -np.inf), jkv.sampling.greedy())


def test_generate_raises_with_the_row_and_the_step(bad, good):
    model, _, step = bad
    with pytest.raises(NonFiniteError, match=rf"row 0 at step {step}: {BY_MODEL}"):
        jkv.generate(model, ROWS, max_new_tokens=NEW)
    # The row beside it is fine, alone and up to there.
    assert oracle.generated(jkv.generate(model, ROWS[1:], max_new_tokens=NEW)) == good[1:]
    short = jkv.generate(model, ROWS, max_new_tokens=step)
    assert oracle.generated(short) == [row[:step] for row in good]


def test_a_prompt_that_cannot_be_read_fails_at_step_0(untied):
    # Token 0 is what rows are padded with, too: the other row must not see it.
    model = poisoned(untied, 0, np.inf)
    with pytest.raises(NonFiniteError, match=rf"\): row 1 at step 0: {BY_MODEL}"):
        jkv.generate(model, [ROWS[1], [4, 0]], max_new_tokens=1)


@pytest.mark.parametrize("kind", [jkv.none(), jkv.quantized(bits=8)])
def test_other_kinds_raise_too(bad, kind):
    with pytest.raises(NonFiniteError, match=r"row 0|rows \[0\]"):
        jkv.generate(bad[0], ROWS, max_new_tokens=NEW, cache=kind)


def test_a_stream_gives_what_is_good_first(bad, good):
    model, _, step = bad
    stream, seen = jkv.stream(model, ROWS, max_new_tokens=NEW, block=4), []

    def read() -> None:
        for block in stream:
            seen.extend(block.tokens[0][block.tokens[0] >= 0].tolist())

    with pytest.raises(NonFiniteError, match=rf"row 0 at step {step}"):
        read()
    assert seen == good[0][:step]
    with pytest.raises(jkv.errors.JkvError):
        _ = stream.result


def test_a_draft_changes_nothing(bad, good):
    model, _, step = bad
    draft = jkv.prompt_lookup(tokens=3)
    with pytest.raises(NonFiniteError, match=rf"row 0 at step {step}: {BY_MODEL}"):
        jkv.generate(model, ROWS, max_new_tokens=NEW, draft=draft)
    out = jkv.generate(model, ROWS[1:], max_new_tokens=NEW, draft=draft)
    assert oracle.generated(out) == good[1:]
    hot = jkv.sampling.Temperature(np.float32(0))  # 0/0 and x/0
    how = {"draft": draft, "sampler": hot, "key": jax.random.key(0)}
    with pytest.raises(NonFiniteError, match=rf"row 0 at step 0, row 1 at step 0: {BY_SAMPLER}"):
        jkv.generate(model, ROWS, max_new_tokens=NEW, **how)


def test_samples_and_resumed_turns(bad, good):
    model, token, step = bad
    hot, key = jkv.sampling.temperature(1e-3), jax.random.key(0)
    how = {"sampler": hot, "key": key}
    with pytest.raises(NonFiniteError, match=rf"row 0 at step {step}, row 1 at step {step}: "):
        jkv.generate(model, ROWS, max_new_tokens=NEW, samples=2, **how)
    first = jkv.generate(model, ROWS, max_new_tokens=1)
    with pytest.raises(NonFiniteError, match="row 1 at step 0"):
        jkv.generate(model, [[], [token]], max_new_tokens=1, resume=first)


def test_beams(bad, untied):
    model = bad[0]
    with pytest.raises(NonFiniteError, match=rf"row 0 at step \d+.*: {BY_MODEL}"):
        jkv.beam_search(model, ROWS, max_new_tokens=NEW, beams=2)
    with pytest.raises(NonFiniteError, match="row 1 at step 0"):
        jkv.beam_search(poisoned(untied, 8), ROWS, max_new_tokens=1, beams=2)


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
def test_a_mask_that_leaves_nothing(untied, good, value):
    sampler = jkv.sampling.chain(Closing(3, value), jkv.sampling.greedy())
    with pytest.raises(NonFiniteError, match=rf"row 0 at step 3, row 1 at step 3: {BY_SAMPLER}"):
        jkv.generate(untied, ROWS, max_new_tokens=NEW, sampler=sampler)
    # Some of it is what masks are for.
    out = jkv.generate(untied, ROWS, max_new_tokens=3, sampler=sampler)
    assert oracle.generated(out) == [row[:3] for row in good]


def test_a_row_that_has_ended_does_not_raise(bad, good):
    model, token, step = bad
    out = jkv.generate(model, ROWS, max_new_tokens=NEW, stop=[[token], []])
    assert oracle.generated(out) == [good[0][:step], good[1]]
    # Nor one that the host ends, after the device went on with it.
    lm = oracle.lm(model)
    text = lm.tokenizer.decode([token])
    if text:
        out = jkv.generate(lm, ROWS, max_new_tokens=NEW, stop=[[text], []])
        assert out.finish_reasons[0] == "stop"


def test_a_rollout_flags_and_its_check_raises(bad, good):
    model, _, step = bad

    @jax.jit
    def together(model):
        tokens = jnp.asarray([[*ROWS[0], 0, 0], ROWS[1]])
        cache = jkv.init_cache(model.config, batch=2, slots=32)
        logits, cache = jkv.prefill(model, tokens, cache, jnp.asarray([3, 5]))
        return jkv.rollout(model, logits, cache, steps=NEW)

    out = together(model)
    assert out.tokens[0].tolist() == good[0][:step] + [-1] * (NEW - step)
    assert out.tokens[1].tolist() == good[1]
    assert np.all(np.isfinite(out.logprobs))
    assert out.state.faults.position.tolist() == [3 + step, -1]
    with pytest.raises(NonFiniteError, match=rf"row 0 at step {step}: {BY_MODEL}"):
        out.check()


def test_a_check_of_a_rollout_raises_where_its_cache_was_full(untied):
    @functools.partial(jax.jit, static_argnums=1)
    def together(model, steps):
        cache = jkv.init_cache(model.config, batch=1, slots=4)
        logits, cache = jkv.prefill(model, jnp.asarray([[1, 2, 3]]), cache)
        return jkv.rollout(model, logits, cache, steps=steps)

    with pytest.raises(jkv.errors.CacheFullError, match=r"rows \[0\]"):
        together(untied, 4).check()
    fits = together(untied, 2)
    assert fits.check() is fits


def test_a_turn_that_fails_leaves_the_conversation(tiny_config):
    lm = texts.noise(dataclasses.replace(tiny_config, layers=1))
    chat = jkv.Chat(lm, max_new_tokens=4, sampler=CLOSING, stop=())
    with pytest.raises(NonFiniteError, match=f"row 0 at step 3: {BY_SAMPLER}"):
        chat.send("why")
    assert chat.messages == []


def test_nothing_of_it_goes_to_the_store(bad, good):
    model, _, step = bad
    with Store(tiers=[Memory(1 << 20)]) as store:
        with pytest.raises(NonFiniteError):
            jkv.generate(model, ROWS, max_new_tokens=NEW, store=store)
        assert len(store) == 0
        out = jkv.generate(model, ROWS, max_new_tokens=step, store=store)
        assert out.reused.tolist() == [0, 0]
        assert oracle.generated(out) == [row[:step] for row in good]
        assert len(store) == 2
