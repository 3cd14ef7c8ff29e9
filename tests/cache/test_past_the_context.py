"""Past the length that a model was made for: what goes on, what is refused, and what it costs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv.decoding import capacity
from jkv.models import Decoder
from tests.decoding import oracle, texts

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

CONTEXT, NEW = 32, 2000
KINDS = {
    "cache": jkv.window(12, 4),
    "clamped": jkv.window(12, 4, "clamped"),
}


@pytest.fixture(scope="module")
def model(tiny_config):
    config = dataclasses.replace(tiny_config, context=CONTEXT)
    return jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def learned(tiny_config):
    config = dataclasses.replace(tiny_config, rope=None, layers=1, context=CONTEXT)
    return jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_tokens(model, kind):
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8]]
    options: dict[str, Any] = {"max_new_tokens": NEW, "stop": (), "return_logprobs": True}
    out = jkv.generate(model, prompts, cache=KINDS[kind], **options)
    assert out.lengths.tolist() == [NEW, NEW]
    assert np.isfinite(out.logprobs).all()
    assert (out.logprobs < 0).all()
    assert out.cache.nbytes == jkv.init_cache(model.config, KINDS[kind], batch=2, slots=1).nbytes
    if kind != "cache":
        return
    more = jkv.generate(model, [[1], []], max_new_tokens=5, stop=(), resume=out)
    assert np.asarray(more.cache.lengths).tolist() == [7 + NEW + 5, 1 + NEW + 4]


def test_what_needs_the_whole_text_is_refused(model, learned):
    def ask(model, kind, new=CONTEXT):
        return jkv.generate(model, [[1, 2]], max_new_tokens=new, cache=kind)

    for kind in (jkv.dense(), jkv.none(), jkv.dense(grow=True), jkv.per_layer(jkv.window(8), 1)):
        with pytest.raises(ValueError, match=r"context of 32; shorten.*jkv.window"):
            ask(model, kind)
    with pytest.raises(ValueError, match=r"context of 32; shorten.*learned"):
        ask(learned, jkv.window(8))
    out = ask(learned, jkv.window(8), CONTEXT - 2)
    assert out.lengths.tolist() == [CONTEXT - 2]
    with pytest.raises(ValueError, match=r"make 33.*learned"):
        jkv.generate(learned, [[]], max_new_tokens=1, resume=out)


def test_the_limit(model, learned):
    """The same for a kind and for the caches that are of it: what no token looks back past goes on.

    With sinks a token looks back at those too, at the distance that the rule of positions says.
    """
    local = dataclasses.replace(model.config, windows=(6, 6))
    wide = dataclasses.replace(model.config, windows=(CONTEXT + 1, 6))
    recency = jkv.scores.recency
    for config, kind, want in (
        (model.config, jkv.window(8), None),
        (model.config, jkv.window(CONTEXT), None),
        (model.config, jkv.window(CONTEXT + 1), CONTEXT),
        (model.config, jkv.window(CONTEXT - 4, sinks=4), None),
        (model.config, jkv.window(CONTEXT - 3, sinks=4), CONTEXT),
        (model.config, jkv.window(CONTEXT - 1, 4, "clamped"), None),
        (model.config, jkv.window(CONTEXT, 4, "clamped"), CONTEXT),
        (model.config, jkv.window(8, 4, "text"), CONTEXT),
        (model.config, jkv.window(8, 0, "text"), None),
        (model.config, jkv.evicting(8, recency), None),
        (model.config, jkv.evicting(CONTEXT - 15, recency), None),
        (model.config, jkv.evicting(CONTEXT - 14, recency), CONTEXT),  # chunks of 16 see as many
        (model.config, jkv.evicting(8), CONTEXT),
        (model.config, jkv.per_layer(jkv.window(8)), None),
        (model.config, jkv.per_layer([jkv.window(8), jkv.window(CONTEXT)]), None),
        (model.config, jkv.per_layer([jkv.window(8), jkv.window(CONTEXT + 1)]), CONTEXT),
        (model.config, jkv.per_layer([jkv.window(8), jkv.dense()]), CONTEXT),
        (model.config, jkv.near_far(recent=8, far=jkv.quantized(bits=8)), CONTEXT),
        (model.config, jkv.dense(), CONTEXT),
        (model.config, jkv.none(), CONTEXT),
        (learned.config, jkv.window(8), CONTEXT),
        (local, jkv.window(), None),
        (local, jkv.window(1000), None),  # no longer than the model's own
        (wide, jkv.window(), CONTEXT),
        (wide, jkv.window(CONTEXT), None),
        (dataclasses.replace(local, windows=(6, None)), jkv.window(), CONTEXT),
        (local, jkv.dense(), CONTEXT),
    ):
        cache = jkv.init_cache(config, kind, batch=1, slots=1)
        assert capacity.limit(config, kind, 16) == capacity.limit(config, cache, 16) == want, kind


def test_the_hint_is_in_the_models_own_numbers(model, tiny_config):
    """And what it recommends is taken, by all that generates."""
    lm = texts.noise(dataclasses.replace(tiny_config, context=48), layers=1)
    large = jkv.window(60, sinks=4)
    calls = (
        lambda kind: jkv.generate(lm, ["ab"], max_new_tokens=60, cache=kind, stop=()),
        lambda kind: list(jkv.stream(lm, ["ab"], max_new_tokens=60, cache=kind, stop=())),
        lambda kind: jkv.beam_search(lm, ["ab"], beams=2, max_new_tokens=60, cache=kind),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"at up to 64.*jkv\.window\(44, sinks=4\), as text"):
            call(large)
        call("window:44,sinks=4")
    with pytest.raises(ValueError, match="at most the model's, which is 48"):
        jkv.Chat(lm, cache=large, context=100)
    jkv.Chat(lm, cache="window:44,sinks=4", context=100)
    local = dataclasses.replace(model.config, windows=(6, 6))
    with pytest.raises(ValueError, match=r"goes on: jkv\.window\(\), as text window\)"):
        capacity.check_limit(local, jkv.dense(), 30, 3, 16)
    small = dataclasses.replace(model.config, context=8)
    with pytest.raises(ValueError, match=r"goes on: jkv\.window\(8\), as text window:8\)"):
        capacity.check_limit(small, jkv.dense(), 8, 1, 16)


def test_chat_goes_on(tiny_config):
    lm = texts.noise(dataclasses.replace(tiny_config, context=48), layers=1)
    chat = jkv.Chat(lm, max_new_tokens=16, cache=jkv.window(16, 4))
    for _ in range(3):
        chat.send("hello" * 3)
    assert chat.reused + chat.prefilled > 48
    assert len(chat.messages) == 6
    limited = jkv.Chat(lm, max_new_tokens=16, cache=jkv.window(16, 4), context=100)
    with pytest.raises(jkv.CacheFullError, match="context of 100"):
        limited.send("hello" * 40)
    with pytest.raises(ValueError, match="at most the model's, which is 48"):
        jkv.Chat(lm, context=100)


def test_a_string_stops_a_row_that_has_gone_on(tiny_model):
    """The ring has let go of what the row would see again: it is read once more."""
    lm = oracle.lm(tiny_model)
    kind = jkv.window(8, 2)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 3]]
    whole = jkv.generate(lm, prompts, max_new_tokens=60, stop=(), cache=kind)
    text = lm.tokenizer.decode([int(t) for t in whole.tokens[0][20:22]])
    got = jkv.generate(lm, prompts, max_new_tokens=60, stop=[[text], []], cache=kind)
    count = int(got.lengths[0])
    assert got.finish_reasons == ("stop", "length")
    assert 1 < count <= 22
    np.testing.assert_array_equal(got.tokens[0][:count], whole.tokens[0][:count])
    assert np.asarray(got.cache.lengths).tolist() == [9 + count - 1, 2 + 60 - 1]
    # What was cut off is neither in the cache nor missing from it.
    more = jkv.generate(lm, [[], []], max_new_tokens=10, stop=(), resume=got)
    np.testing.assert_array_equal(more.tokens[0], whole.tokens[0][count : count + 10])


@functools.partial(jax.jit, donate_argnums=2)
def losses(model, tokens, cache, wanted):
    logits, cache = model(tokens, cache)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], axis=-1)
    return -chosen[..., 0], cache


def test_the_built_in_model_past_what_it_was_trained_on(shared: Path):
    """Loss on held-out text, in stretches of the trained length.

    Beside it that of the same stretches each read from its own start: a cache that keeps the last
    tokens stays below, since it has some from before; one that keeps all rises above.
    """
    lm = jkv.load("shakespeare")
    text = (shared / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    ids = lm.encode([text[len(text) * 9 // 10 :][:12_000]])[0]
    size, chunk = lm.config.context, 256
    stretches = 4
    total = size * stretches
    line = np.asarray(ids[: total + 1], np.int32)[None]

    def mean(tokens, kind):
        cache = jkv.init_cache(lm.config, kind, batch=1, slots=total)
        found = []
        for at in range(0, tokens.shape[1] - 1, chunk):
            now, then = tokens[:, at : at + chunk], tokens[:, at + 1 : at + chunk + 1]
            loss, cache = losses(lm.model, now, cache, then)
            found.append(np.asarray(loss))
        return np.concatenate(found, axis=1).reshape(-1, size).mean(axis=1)

    starts = range(0, total, size)
    fresh = np.concatenate([mean(line[:, at : at + size + 1], jkv.dense()) for at in starts])
    dense = mean(line, jkv.dense())
    np.testing.assert_allclose(dense[0], fresh[0], atol=1e-3)
    assert dense[-1] > fresh[-1] + 0.2
    for positions in ("cache", "clamped"):
        kept = mean(line, jkv.window(252, 4, positions))
        assert (kept < fresh + 0.03).all(), (positions, kept, fresh)
        assert kept[-1] < dense[-1] - 0.2
