"""Every family against the numbers that transformers gave for tiny random models."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv.models import Config, Decoder
from tests.models.cases import CASES, as_version_4
from tests.models.conftest import GOLDEN


@jax.jit
def _without_cache(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)[0]


@jax.jit
def _with_cache(model: Decoder, tokens: jax.Array, cache: jkv.Cache):
    return model(tokens, cache)


# For numbers that are meant to be wrong: half the time of compiling them well.
_quickly = jax.jit(
    lambda model, tokens: model(tokens)[0], compiler_options={"xla_backend_optimization_level": 0}
)


@lru_cache
def _load(name: str) -> tuple[jkv.LM, dict[str, np.ndarray]]:
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        golden = {key: arrays[key] for key in arrays.files}
    return jkv.load(GOLDEN / name), golden


def _error(model: Decoder, golden: dict[str, np.ndarray], run=_without_cache) -> float:
    """Largest difference of a logit, in standard deviations of the logits."""
    tokens = np.concatenate([golden["prompts"], golden["tokens"][:, :-1]], axis=1)
    prompt = golden["prompts"].shape[1]
    logits = np.asarray(run(model, jnp.asarray(tokens, jnp.int32)))
    wanted = golden["logits"]
    return float(np.abs(logits[:, :prompt] - wanted).max() / wanted.std())


def test_every_case_has_its_directory():
    assert {path.name for path in GOLDEN.iterdir() if path.is_dir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    model, golden = _load(name)[0].model, _load(name)[1]
    assert _error(model, golden) <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_without_a_cache(name):
    """Each token is the likeliest after all before it: what recomputing everything would choose."""
    lm, golden = _load(name)
    tokens = np.concatenate([golden["prompts"], golden["tokens"][:, :-1]], axis=1)
    logits = np.asarray(_without_cache(lm.model, jnp.asarray(tokens, jnp.int32)))
    chosen = logits[:, golden["prompts"].shape[1] - 1 :].argmax(-1)
    np.testing.assert_array_equal(chosen, golden["tokens"])


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_through_the_dense_cache(name):
    """Token by token from the first one on, rows of a batch of two."""
    lm, golden = _load(name)
    wanted = np.concatenate([golden["prompts"], golden["tokens"]], axis=1)
    cache = jkv.init_cache(lm.config, jkv.dense(), batch=2, slots=32)
    rows, prompt = wanted[:, :0], golden["prompts"].shape[1]
    token = wanted[:, :1]
    while rows.shape[1] < wanted.shape[1]:
        rows = np.concatenate([rows, token], axis=1)
        logits, cache = _with_cache(lm.model, jnp.asarray(token, jnp.int32), cache)
        at = rows.shape[1]
        token = wanted[:, at : at + 1] if at < prompt else np.asarray(logits).argmax(-1)
    np.testing.assert_array_equal(rows, wanted)
    cache.check()


# What a family's configuration switches on must be seen in its numbers: with any of it off, the
# comparison above has to fail.
_BREAK = {
    "window": ("mistral-window", lambda c: dataclasses.replace(c, windows=())),
    "window by one": (
        "mistral-window",
        lambda c: dataclasses.replace(c, windows=tuple(w + 1 for w in c.windows)),
    ),
    "which layers slide": (
        "qwen2-windows-old",
        lambda c: dataclasses.replace(c, windows=c.windows[::-1]),
    ),
    "alternation": ("gemma2-gqa", lambda c: dataclasses.replace(c, windows=(5, 5, 5))),
    "attention softcap": ("gemma2-gqa", lambda c: dataclasses.replace(c, attention_softcap=None)),
    "logit softcap": ("gemma2-gqa", lambda c: dataclasses.replace(c, logit_softcap=None)),
    "attention scale": ("gemma2-mha", lambda c: dataclasses.replace(c, attention_scale=None)),
    "embedding scale": ("gemma2-mha", lambda c: dataclasses.replace(c, embed_scale=1.0)),
    "norm offset": ("gemma2-mha", lambda c: dataclasses.replace(c, norm_offset=0.0)),
    "llama3 rope": ("llama3", lambda c: _rope(c, rule="default")),
    "linear rope": ("llama-linear-old", lambda c: _rope(c, rule="default")),
    "yarn rope": ("llama-yarn", lambda c: _rope(c, rule="default")),
    "yarn magnitude": ("llama-yarn", lambda c: _rope(c, magnitude=1.0)),
    "theta": ("llama3-old", lambda c: _rope(c, theta=10000.0)),
    "interleaving": ("glm-gqa", lambda c: _rope(c, interleaved=False)),
    "partial rotation": ("glm4-mha-old", lambda c: _rope(c, dims=4)),
    "activation": ("gpt2-old", lambda c: dataclasses.replace(c, activation="gelu_tanh")),
    "exact gelu": ("llama-gqa-old", lambda c: dataclasses.replace(c, activation="gelu_tanh")),
    "tanh gelu": ("gpt2", lambda c: dataclasses.replace(c, activation="gelu")),
    "epsilon": ("glm-gqa", lambda c: dataclasses.replace(c, norm_eps=1e-2)),
    "unscaled scores": ("gpt2-old", lambda c: dataclasses.replace(c, attention_scale=None)),
}


def _rope(config: Config, **changes: object) -> Config:
    return dataclasses.replace(config, rope=dataclasses.replace(config.rope, **changes))


@pytest.mark.parametrize("what", _BREAK)
def test_the_comparison_sees(what):
    name, spoil = _BREAK[what]
    lm, golden = _load(name)
    other = nnx.eval_shape(lambda: Decoder(spoil(lm.config), rngs=nnx.Rngs(0)))
    nnx.update(other, nnx.state(lm.model))
    assert _error(other, golden, _quickly) > 2e-4


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("-old")])
def test_configurations_of_transformers_4_mean_the_same(name, checkpoint):
    copy = checkpoint(name)
    path = copy.path / "config.json"
    new = json.loads(path.read_text())
    if new.get("layer_types") == ["sliding_attention", "full_attention"]:
        pytest.skip("transformers 4 could not write this order")
    path.write_text(json.dumps(as_version_4(new)))
    assert path.read_text() != json.dumps(new)
    assert jkv.load(copy.path).config == _load(name)[0].config


def test_biases_that_the_configuration_has_are_in_the_model():
    """Where transformers has a bias, the decoder has one with the checkpoint's values."""
    attention = _load("llama-gqa-old")[0].model.blocks[0].attention
    for linear in (attention.q, attention.k, attention.v, attention.o):
        assert np.abs(np.asarray(linear.bias[...])).max() > 0
    assert _load("llama-mha")[0].model.blocks[0].attention.q.bias is None
    assert _load("glm-gqa")[0].model.blocks[0].attention.o.bias is None
