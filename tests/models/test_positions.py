"""Rotary positions in `config.json`."""

from __future__ import annotations

import re

import pytest

import jkv
from jkv.errors import CheckpointError

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
