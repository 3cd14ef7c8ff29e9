"""What rounding costs a trained model, on held-out text: the bounds that are promised."""

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
import quality
from jkv.models import Decoder

pytestmark = pytest.mark.slow  # a trained model with many kinds: once is enough

SETTING = quality.Setting(rows=4, batch=4, tokens=384, prompt=0)
CHUNK = 16  # tokens at a time: the newest of them see a little less that is rounded
BIAS = 100.0  # ten times as long as keys are without


@pytest.fixture(scope="module")
def rows(shared: Path) -> np.ndarray:
    text = (shared / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    return quality.rows_of(jkv.load("shakespeare"), text, 0.1, SETTING)


@functools.cache
def trained(bias: float) -> Any:
    """The built-in model with something added to one channel of every key.

    The channel is one that its rotary position turns by a fifteenth of a radian in all, so that
    each query's scores move up or down together and attention hardly sees it.
    """
    lm = jkv.load("shakespeare")
    config = dataclasses.replace(lm.config, qkv_bias=True)
    model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    nnx.update(model, nnx.state(lm.model))
    added = np.zeros((config.kv_heads, config.head_dim), np.float32)
    added[:, config.head_dim // 2 - 1] = bias
    for block in model.blocks:
        block.attention.k.bias[...] = jnp.asarray(added.reshape(-1))
    return model


@functools.partial(jax.jit, static_argnums=0)
def follow(kind: Any, model: Any, tokens: jax.Array) -> jax.Array:
    """Log-probabilities [T, B, V] after each token, a chunk at a time."""
    batch, total = tokens.shape
    cache = jkv.init_cache(model.config, kind, batch=batch, slots=total)

    def step(cache: Any, chunk: jax.Array) -> Any:
        logits, cache = model(chunk, cache)
        return cache, jax.nn.log_softmax(logits)

    chunks = jnp.swapaxes(tokens.reshape(batch, -1, CHUNK), 0, 1)
    found = jax.lax.scan(step, cache, chunks)[1]
    return jnp.moveaxis(found, 2, 1).reshape(total, batch, -1)


@functools.cache
def losses(kind: Any, bias: float, rows: Any) -> np.ndarray:
    """Mean loss of each row."""
    rows = np.asarray(rows)
    found = follow(kind, trained(bias), rows)[:-1]
    said = np.take_along_axis(np.asarray(found), rows.T[1:, :, None], axis=-1)
    return -said.astype(float).mean(axis=(0, 2))


@pytest.fixture
def above(rows: np.ndarray) -> Any:
    """Perplexity above that with a dense cache, as a share."""
    lines = tuple(map(tuple, rows.tolist()))

    def above(kind: Any, bias: float = 0.0) -> float:
        more = losses(kind, bias, lines) - losses(jkv.dense(), bias, lines)
        return float(np.expm1(more.mean()))

    return above


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        (jkv.quantized(bits=8), 0.001),
        (jkv.quantized(bits=4), 0.01),
        (jkv.quantized(bits=2), 0.05),
    ],
    ids=["int8", "int4", "int2"],
)
def test_what_rounding_costs(above, kind, most):
    assert abs(above(kind)) < most


def test_large_key_biases(above, rows):
    """As in Qwen2.5, whose keys scored 0 when each token's had one step at 4 bits."""
    lines = tuple(map(tuple, rows.tolist()))
    plain, exact, more = (losses(jkv.dense(), x, lines).mean() for x in (0.0, BIAS, 4 * BIAS))
    assert abs(exact - plain) < 0.001
    assert abs(more - plain) < 0.005
    assert abs(above(jkv.quantized(bits=4), BIAS)) < 0.01
    assert above(jkv.quantized(bits=4, key_axis="token"), BIAS) > 0.03
    # Of 8 bits there are too few as well for one channel that is forty times as large as all the
    # others together, unless it has steps of its own.
    assert abs(above(jkv.quantized(bits=8, key_axis="channel"), 4 * BIAS)) < 0.001
    assert above(jkv.quantized(bits=8), 4 * BIAS) > 0.002
