"""Eviction in the loops that people run: through a model, compiled, resumed, in conversation."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compile_check
import jkv
from bench.loops import Case
from jkv import _compat, scores
from jkv.cache import Step
from jkv.ops import AttentionSpec
from tests.decoding import texts

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6], [2, 7, 1, 8], [1]]


def generated(model, prompts, kind, new=24, **options):
    out = jkv.generate(model, prompts, max_new_tokens=new, stop=(), cache=kind, **options)
    return [row.tolist() for row in out.tokens], out


def alternating(seen):
    """A user's score: even positions first."""
    return 1.0 - (seen.positions % 2).astype(jnp.float32)


def test_exact_until_something_is_evicted(tiny_model):
    """One token more than the budget, and the difference shows."""
    dense, _ = generated(tiny_model, PROMPTS, jkv.dense())
    same, out = generated(tiny_model, PROMPTS, jkv.evicting(44))
    assert same == dense
    assert out.cache.to_legacy()[0][0].shape[2] == 44
    other, out = generated(tiny_model, PROMPTS, jkv.evicting(8, alternating, recent=1))
    assert other != dense
    held = np.asarray(out.cache.layers[1].positions)
    assert (held[0, 0] % 2 == 0).sum() >= 7


def test_rows_and_chunks(tiny_model):
    """Each row of a batch as if alone; a prompt in chunks, since a chunk evicts after it looked."""
    kind = jkv.evicting(8, sinks=1)
    rows, out = generated(tiny_model, PROMPTS, kind, prefill_chunk=16)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert generated(tiny_model, [prompt] * 3, kind, prefill_chunk=16)[0] == [row] * 3
    assert np.asarray(out.cache.lengths).tolist() == [len(p) + 23 for p in PROMPTS]
    for layer in out.cache.layers:
        held = np.asarray(layer.positions)
        assert held.shape[2] == 8
        assert (held >= 0).all()
        assert (held == 0).any(axis=2).all(), "the sink"
        newest = np.asarray(out.cache.lengths)[:, None, None] - 1
        assert ((held > newest - 2).sum(axis=2) == 2).all(), "the recent ones"


def test_resume_and_programs(tiny_model, compiles):
    """Turns go on from what was kept; the same description again compiles nothing."""
    kind = lambda: jkv.evicting(12, scores.snapkv(4))  # noqa: E731
    first, out = generated(tiny_model, PROMPTS, kind())
    generated(tiny_model, PROMPTS, None, resume=out)
    with compiles:
        again, _ = generated(tiny_model, PROMPTS, kind())
        _, more = generated(tiny_model, PROMPTS, None, resume=out)
        assert compiles.count == 0
    assert again == first
    assert np.asarray(more.cache.lengths).tolist() == [2 * len(p) + 47 for p in PROMPTS]


def test_strings_and_chat(tiny_config):
    """What a stop takes back may have pushed other tokens out: then the row is read once more."""
    lm = texts.noise(tiny_config, layers=1)
    kind = jkv.evicting(12)
    chat = jkv.Chat(lm, max_new_tokens=8, cache=kind, stop=())
    for _ in range(2):
        chat.send("hello")
    assert len(chat.messages) == 4
    prompt = chat._past.result.history
    whole = jkv.generate(lm, prompt, max_new_tokens=8, stop=(), cache=kind)
    text = lm.decode(whole.tokens[0][3:5])
    got = jkv.generate(lm, prompt, max_new_tokens=8, stop=[text], cache=kind)
    assert got.finish_reasons == ("stop",)
    assert int(got.cache.lengths[0]) == len(got.history[0]) - 1
    assert (np.asarray(got.cache.layers[0].positions) < int(got.cache.lengths[0])).all()


def steps(count, rows, dim=4):
    """Queries, keys and values of so many decode steps: [steps, B, 1, heads, H]."""
    rng = np.random.default_rng(3)
    shape = (count, rows, 1, 2, dim)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3)]


def decode(layer, new, start):
    """A scan of steps of one token; the outputs and the layer after."""

    def body(carry, token):
        layer, start = carry
        step = Step.after(start, jnp.ones_like(start), 1)
        out, layer = layer.attend(*token, step, AttentionSpec(1.0))
        return (layer, step.stop), out

    (layer, _), out = jax.lax.scan(body, (layer, start), new)
    return layer, out


def equal(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_vmap_donation_and_forks():
    """A stack of caches in place, and two forks of one row: each as if it were alone."""
    kind, start = jkv.evicting(5, recent=1), jnp.zeros(4, jnp.int32)
    new = steps(9, 4)
    layer = kind.init(4, 9, 2, 4, jnp.float32)
    plain, out = jax.jit(decode)(layer, new, start)
    assert (np.asarray(plain.positions) < 4).any(), "nothing was evicted out of turn"
    stacked = jax.tree.map(lambda leaf: jnp.copy(leaf.reshape(2, 2, *leaf.shape[1:])), layer)
    split = [x.reshape(9, 2, 2, *x.shape[2:]).swapaxes(0, 1) for x in new]
    held = jax.tree.leaves(stacked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Some donated buffers were not usable"
        after, outs = jax.jit(jax.vmap(decode), donate_argnums=0)(
            stacked, split, start.reshape(2, 2)
        )
    assert all(leaf.is_deleted() for leaf in held)
    equal(jax.tree.map(lambda leaf: leaf.reshape(4, *leaf.shape[2:]), after), plain)
    np.testing.assert_allclose(outs.swapaxes(0, 1).reshape(out.shape), out, atol=1e-6)

    one = jkv.Cache((plain.take(jnp.asarray([2])),), jnp.asarray([9]), jnp.zeros(1, bool))
    more = steps(4, 4)
    forked, _ = jax.jit(decode)(one.fork(4).layers[0], more, start + 9)
    alone, _ = jax.jit(decode)(one.layers[0], [x[:, 3:] for x in more], start[:1] + 9)
    equal(forked.take(jnp.asarray([3])), alone)
    assert (np.asarray(forked.keys[0]) != np.asarray(forked.keys[1])).any()


def test_the_newest_are_a_window():
    """Token by token `recency` is `window`."""
    new, start = steps(9, 2), jnp.zeros(2, jnp.int32)
    kinds = jkv.window(5), jkv.evicting(5, scores.recency)
    window, mine = (jax.jit(decode)(k.init(2, 9, 2, 4, jnp.float32), new, start) for k in kinds)
    np.testing.assert_allclose(mine[1], window[1], atol=1e-6)
    assert (np.sort(mine[0].positions) == np.arange(4, 9)).all()


@pytest.mark.parametrize(
    ("score", "batch", "groups"),
    [(scores.key_norm, 1, 1), (scores.tova, 8, 4)],
    ids=["key_norm", "tova"],
)
def test_no_second_cache(score, batch, groups):
    """Nothing is copied in the decode loop, whatever the score reads."""
    if _compat.JAX < (0, 10) and score is scores.key_norm:
        pytest.skip("XLA of jaxlib 0.7.2 has a copy of half the keys in this program")
    report = compile_check.measure(Case(jkv.evicting(4096, score), batch, groups, slots=4096))
    assert report.copies == 0, report
    assert report.share < 0.1, report


@functools.partial(jax.jit, static_argnums=2)
def loss(model, ids, kind):
    """Mean loss of each next token [T], teacher-forced one token at a time."""
    cache = jkv.init_cache(model.config, kind, batch=1, slots=len(ids))

    def body(cache, pair):
        token, wanted = pair
        logits, cache = model(token[None, None], cache)
        return cache, -jax.nn.log_softmax(logits[0, 0])[wanted]

    return jnp.mean(jax.lax.scan(body, cache, (ids[:-1], ids[1:]))[1])


def test_what_it_costs_on_a_trained_model(shared: Path):
    """A third of the tokens for next to nothing, and not so if it is the wrong third."""
    lm = jkv.load("shakespeare")
    text = (shared / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    ids = jnp.asarray(lm.encode([text[len(text) * 9 // 10 :][:3000]])[0][:241], jnp.int32)
    dense = float(loss(lm.model, ids, jkv.dense()))
    assert float(loss(lm.model, ids, jkv.evicting(80))) < dense + 0.03
    worst = jkv.evicting(80, lambda seen: -scores.recency(seen), recent=1)
    assert float(loss(lm.model, ids, worst)) > dense + 0.3
