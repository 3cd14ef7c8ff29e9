"""A text begun in transformers goes on in jkv, and one begun in jkv goes on in transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from tests.models.cases import CASES

pytestmark = pytest.mark.compare
NEW, SLOTS = 10, 40
LENGTHS = [16, 9, 4]  # the window of 5 has let go of tokens in two rows, and is not full in one
# Positions in the keys and beside them, all tokens kept, a window, and both in one model.
NAMES = ["llama3", "gpt2", "mistral-window", "gemma2-gqa"]
ADDED = np.array([[3, 1, 4, 1, 5, 9]] * 3)


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    """A random model in jkv and in transformers."""
    from tests.compare import reference

    case, path = CASES[request.param], tmp_path_factory.mktemp(request.param)
    reference.save(reference.random_model(case, 7), path, case)
    return jkv.load(path).model, reference.load(path)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 19, length).tolist() for length in LENGTHS]


def left(rows):
    """Tokens and mask, padded at the beginning, as transformers has rows of different lengths."""
    width = max(map(len, rows))
    tokens = np.array([[0] * (width - len(row)) + row for row in rows])
    return tokens, np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def run(model, tokens, mask, past=None):
    """Logits of new tokens, and the cache; `mask` is of these and all before."""
    import torch

    mask, new = torch.as_tensor(mask), torch.as_tensor(tokens)
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
    with torch.no_grad():
        out = model(
            new, attention_mask=mask, position_ids=places, past_key_values=past, use_cache=True
        )
    return out.logits.numpy(), out.past_key_values


def greedy(model, logits, mask, past):
    """The likeliest tokens, one after the other; [B, NEW]."""
    tokens = []
    for _ in range(NEW):
        tokens.append(logits.argmax(-1))
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
        logits, past = run(model, tokens[-1][:, None], mask, past)
        logits = logits[:, -1]
    return np.stack(tokens, axis=1)


@jax.jit
def rollout(model, logits, cache):
    return jkv.rollout(model, logits, cache, steps=NEW)


def kind_of(model):
    return jkv.window() if any(model.config.windows) else jkv.dense()


def test_begun_there_goes_on_here(pair, rows):
    ours, theirs = pair
    tokens, mask = left(rows)
    logits, past = run(theirs, tokens, mask)
    cache = jkv.from_transformers(past, mask, slots=SLOTS)
    assert cache.lengths.tolist() == LENGTHS
    expected = jax.eval_shape(
        lambda: jkv.init_cache(ours.config, kind_of(ours), batch=3, slots=SLOTS)
    )
    assert jax.tree.structure(cache) == jax.tree.structure(expected)
    # Several tokens at once, whose queries look at a ring before it is written to.
    added, _ = jkv.prefill(ours, jnp.asarray(ADDED), cache)
    out = rollout(ours, jnp.asarray(logits[:, -1]), cache).check()
    assert out.tokens.tolist() == greedy(theirs, logits[:, -1], mask, past).tolist()
    mask = np.concatenate([mask, np.ones_like(ADDED)], axis=1)
    _, past = run(theirs, *left(rows))
    want = run(theirs, ADDED, mask, past)[0][:, -1]
    np.testing.assert_allclose(added, want, atol=1e-4 * want.std())


def test_begun_here_goes_on_there(pair, rows):
    ours, theirs = pair
    cache = jkv.init_cache(ours.config, kind_of(ours), batch=3, slots=SLOTS)
    padded = np.array([row + [0] * (16 - len(row)) for row in rows])
    logits, cache = jkv.prefill(ours, padded, cache, np.array(LENGTHS))
    past, mask = jkv.to_transformers(cache)
    assert mask.tolist() == left(rows)[1].tolist()
    want = rollout(ours, logits, cache).check().tokens
    assert greedy(theirs, np.asarray(logits), mask.numpy(), past).tolist() == want.tolist()


def test_there_and_back_to_the_bit(pair, rows):
    import torch

    _, theirs = pair
    tokens, mask = left(rows)
    past = run(theirs, tokens, mask)[1]
    for layer in past.layers:
        layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
    cache = jkv.from_transformers(past, mask)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype("bfloat16")}
    again, shown = jkv.to_transformers(cache)
    assert shown.tolist() == mask.tolist()
    assert again.get_seq_length() == past.get_seq_length()
    for layer, old in zip(again.layers, past.layers, strict=True):
        assert type(layer) is type(old)
        real = torch.as_tensor(mask).bool()[:, -old.keys.shape[2] :]
        for got, want in ((layer.keys, old.keys), (layer.values, old.values)):
            assert got.dtype == torch.bfloat16
            assert torch.equal(got.swapaxes(1, 2)[real], want.swapaxes(1, 2)[real])


def test_padding_at_the_end(pair, rows):
    """Where a window has let go of tokens for padding, it is refused."""
    ours, theirs = pair
    tokens = np.array([row + [0] * (16 - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (16 - len(row)) for row in rows])
    logits, past = run(theirs, tokens, mask)
    if any(ours.config.windows):
        with pytest.raises(jkv.UnsupportedError, match=r"rows \[1, 2\] would see"):
            jkv.from_transformers(past, mask)
        return
    last = logits[np.arange(3), np.array(LENGTHS) - 1]
    out = rollout(ours, jnp.asarray(last), jkv.from_transformers(past, mask, slots=SLOTS))
    logits, past = run(theirs, *left(rows))
    want = greedy(theirs, logits[:, -1], left(rows)[1], past)
    assert out.check().tokens.tolist() == want.tolist()


def test_what_a_window_has_lost_is_not_made_up(pair, rows):
    """A prompt as long as the window: its first token is gone, and nothing stands for it."""
    ours, theirs = pair
    windows = [window for window in ours.config.windows if window]
    if not windows:
        pytest.skip("no window in this model")
    logits, past = run(theirs, np.array([rows[0][: windows[0]]]), np.ones((1, windows[0])))
    cache = jkv.from_transformers(past, slots=SLOTS)
    keys = np.asarray(cache.layers[0].to_legacy(cache.lengths)[0])
    assert np.isnan(keys[0, :, 0]).all()
    assert np.isfinite(keys[0, :, 1:]).all()
    assert np.isfinite(rollout(ours, jnp.asarray(logits[:, -1]), cache).check().logprobs).all()


def test_what_cannot_be_said_is_refused():
    import torch
    import transformers
    from transformers.cache_utils import DynamicIndexedLayer

    past = transformers.DynamicCache()
    with pytest.raises(ValueError, match="got an empty cache"):
        jkv.from_transformers(past)
    with pytest.raises(TypeError, match=r"expected a transformers\.DynamicCache"):
        jkv.from_transformers(((1, 2),))
    past.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    for mask in (np.ones((2, 4)), np.array([[1, 0, 1], [1, 1, 1]]), np.zeros((2, 3))):
        with pytest.raises(ValueError, match="from_transformers got a mask"):
            jkv.from_transformers(past, mask)
    past.layers[0] = DynamicIndexedLayer()
    with pytest.raises(jkv.UnsupportedError, match="got a DynamicIndexedLayer as layer 0"):
        jkv.from_transformers(past)
    empty = jkv.attention_cache(batch=1, slots=4, layers=1, kv_heads=1, head_dim=4)
    with pytest.raises(ValueError, match="to_transformers got an empty cache"):
        jkv.to_transformers(empty)
    sinks = jkv.attention_cache(
        "window:4,sinks=1,positions=text", batch=1, slots=4, layers=1, kv_heads=1, head_dim=4
    )
    step = sinks.begin(jnp.zeros((1, 1), jnp.int32))
    zeros = jnp.zeros((1, 1, 1, 4))
    sinks = step.next_cache([layer.append(zeros, zeros, step.step) for layer in step.layers])
    with pytest.raises(jkv.UnsupportedError, match="a window with sinks"):
        jkv.to_transformers(sinks)
