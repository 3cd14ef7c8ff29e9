"""Rotary positions in `config.json`."""

from __future__ import annotations

import math
import re

import pytest

import jkv
from jkv.errors import CheckpointError
from jkv.models import families

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

REFUSED = {
    "rule": ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'"),
    "longrope": ({"type": "longrope", "short_factor": [1.0]}, "rope_type is 'longrope'"),
    "two rules": ({"type": "linear", "rope_type": "yarn", "factor": 2.0}, "type is 'linear' and"),
    "no factor": ({"type": "linear"}, "factor is missing"),
    "zero factor": ({"type": "linear", "factor": 0}, "factor is 0"),
    "key of another rule": (
        {"type": "linear", "factor": 2.0, "beta_fast": 3},
        "unknown key beta_fast",
    ),
    "per layer type": (
        {"full_attention": {"rope_type": "default"}, "sliding_attention": {}},
        "unknown key full_attention",
    ),
    "llama3 without ends": (_LLAMA3 | {"low_freq_factor": None}, "low_freq_factor is None"),
    "llama3 the wrong way": (_LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor is 1.0"),
    "yarn the wrong way": (_YARN | {"beta_fast": 0.5}, "beta_fast is 0.5"),
    "yarn's scale": (_YARN | {"mscale": "1"}, "mscale is '1'"),
    "yarn's scale NaN": (_YARN | {"mscale": math.nan, "mscale_all_dim": 1.0}, "mscale is nan"),
    "yarn's scale beyond floats": (
        _YARN | {"mscale": 10**400, "mscale_all_dim": 1.0},
        "mscale is 1000",
    ),
    "yarn's scale below 0": (_YARN | {"mscale": 1.0, "mscale_all_dim": -1}, "mscale_all_dim is -1"),
    "no object": ("linear", "rope_scaling is 'linear'"),
    "theta": ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what, checkpoint):
    scaling, message = REFUSED[what]
    copy = checkpoint("llama-mqa")
    copy.config(rope_parameters=..., rope_theta=500.0, rope_scaling=scaling)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        jkv.load(copy.path)


@pytest.mark.parametrize(
    ("scaling", "fields"),
    [
        (None, {"rule": "default"}),
        ({"rope_type": "default"}, {"rule": "default"}),
        ({"type": "linear", "factor": 2}, {"rule": "linear", "factor": 2.0}),
        (_LLAMA3, {"rule": "llama3", "factor": 8.0, "original_context": 16}),
        (_YARN, {"rule": "yarn", "beta_fast": 32.0, "magnitude": pytest.approx(1.13863, abs=1e-5)}),
        (_YARN | {"attention_factor": 1.5, "truncate": False}, {"magnitude": 1.5}),
        (_YARN | {"mscale": 2.0, "mscale_all_dim": 2.0}, {"magnitude": 1.0}),
        (_YARN | {"type": "yarn", "finetuned": True, "beta_slow": None}, {"beta_slow": 1.0}),
        (
            {"type": "yarn", "factor": 4.0},
            {"original_context": 64},  # where it is not said, the context counts as the original
        ),
    ],
)
def test_read(scaling, fields, checkpoint):
    copy = checkpoint("llama-mqa")
    copy.config(rope_parameters=..., rope_theta=500.0, rope_scaling=scaling)
    rope = jkv.load(copy.path).config.rope
    assert rope.theta == 500.0
    assert {name: getattr(rope, name) for name in fields} == fields


def test_both_names(checkpoint):
    """The same under both names is fine; two opinions are not."""
    copy = checkpoint("llama3")
    values = _LLAMA3 | {"rope_theta": 500.0}
    copy.config(rope_parameters=values, rope_scaling=values)
    assert jkv.load(copy.path).config.rope.factor == 8.0
    copy.config(rope_scaling=values | {"factor": 2.0})
    with pytest.raises(CheckpointError, match="rope_scaling and rope_parameters differ"):
        jkv.load(copy.path)


def test_partial_rotation_has_two_places(checkpoint):
    copy = checkpoint("glm-gqa")
    copy.config(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert jkv.load(copy.path).config.rope.dims == 4  # GLM's default is half
    copy.config(partial_rotary_factor=0.25)
    assert jkv.load(copy.path).config.rope.dims == 2
    copy.config(rope_parameters={"partial_rotary_factor": 1.0})
    assert jkv.load(copy.path).config.rope.dims == 8
    copy.config(rope_parameters={"partial_rotary_factor": 0.4})
    with pytest.raises(CheckpointError, match="3 of each head's 8 dimensions"):
        jkv.load(copy.path)


# As the Qwen2.5 card turns YaRN on: `max_position_embeddings` stays as the model was trained.
_CARD = {
    "model_type": "qwen2",
    "vocab_size": 9,
    "hidden_size": 3584,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
}
_LLAMA31 = _CARD | {
    "model_type": "llama",
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": _LLAMA3 | {"original_max_position_embeddings": 8192},
}
_PLACES = [0, 15, 25, 30, 35, 63]
# Changes, the context, and from transformers 5.24: inverse frequencies at `_PLACES` and the factor
# of cosines and sines.
SCALED = {
    "card": (
        _CARD,
        {},
        131072,
        [1.0, 0.0392418988, 0.0041317381, 0.00106436096, 0.000246258394, 3.10234441e-07],
        1.138629436111989,
    ),
    "yarn under an outer original context": (
        _CARD,
        {"original_max_position_embeddings": 16384},
        65536,
        [1.0, 0.0392418988, 0.00353196962, 0.000860547181, 0.000176998234, 3.10234441e-07],
        1.138629436111989,
    ),
    "yarn without a factor": (
        _CARD,
        {
            "max_position_embeddings": 65536,
            "rope_scaling": _CARD["rope_scaling"] | {"factor": None},
        },
        65536,
        [1.0, 0.0392418988, 0.00426501967, 0.00122288277, 0.000338605285, 6.20468882e-07],
        1.0693147180559945,
    ),
    "llama3": (
        _LLAMA31,
        {},
        131072,
        [1.0, 0.0461640507, 0.00594073068, 0.00137189368, 9.55621217e-05, 3.06892588e-07],
        1.0,
    ),
    "llama3 under an outer original context": (
        _LLAMA31,
        {"original_max_position_embeddings": 4096},
        131072,
        [1.0, 0.0461640507, 0.00572024984, 0.000508353522, 9.55621217e-05, 3.06892588e-07],
        1.0,
    ),
}


def _read(values):
    problems: list[str] = []
    family = families.find(values, problems)
    assert family is not None
    return families.read_config(values, family, problems), problems


@pytest.mark.parametrize("what", SCALED)
def test_numbers_of_transformers(what):
    base, changes, context, frequencies, magnitude = SCALED[what]
    config, problems = _read(base | changes)
    assert problems == []
    assert config is not None
    assert config.rope is not None
    assert config.context == context
    assert config.rope.magnitude == pytest.approx(magnitude, rel=1e-12)
    assert config.rope.frequencies()[_PLACES] == pytest.approx(frequencies, rel=1e-6)


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, {"type": "default"}])
def test_original_context_where_no_rule_asks_for_it(scaling):
    values = _CARD | {"rope_scaling": scaling}
    plain, _ = _read(values)
    again, problems = _read(values | {"original_max_position_embeddings": 4096})
    assert problems == []
    assert again == plain


def test_yarn_where_the_context_is_the_longer_one():
    """Most configurations give the context that YaRN makes."""
    config, _ = _read(_CARD | {"max_position_embeddings": 163840})
    assert config is not None
    assert config.context == 163840


@pytest.mark.parametrize("key", ["factor", "attention_factor", "mscale", "wobble"])
def test_keys_of_scaling_that_scale_nothing(key):
    for value, count in ((None, 0), (1, key == "wobble"), (2.0, 1)):
        _, problems = _read(_CARD | {"rope_scaling": {"rope_type": "default", key: value}})
        assert len(problems) == count


def test_a_yarn_for_more_tokens_than_can_be():
    scaling = {"type": "yarn", "factor": 1e200}
    _, problems = _read(_CARD | {"rope_scaling": scaling})
    assert len(problems) == 1
    assert "factor is 1e+200" in problems[0]
