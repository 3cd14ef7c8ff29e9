"""Shapes of a model without its weights."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from flax import nnx

import jkv
from jkv.models.slots import outline_model
from tests.models.conftest import GOLDEN


@pytest.mark.parametrize("name", ["gpt2-old", "qwen2-mqa", "gemma2-gqa", "glm4-mqa"])
def test_an_outline_is_the_model_without_its_weights(name):
    """Blocks that are copies of one, with windows of their own."""
    config = jkv.models.read_config(GOLDEN / name)
    got, wanted = (
        outline_model(config),
        nnx.eval_shape(lambda: jkv.Decoder(config, rngs=nnx.Rngs(0))),
    )
    assert nnx.graphdef(got) == nnx.graphdef(wanted)
    leaves = [jax.tree.flatten(nnx.state(model)) for model in (got, wanted)]
    assert leaves[0] == leaves[1]


def test_blocks_share_no_variables():
    model = jkv.load(GOLDEN / "llama-mqa").model
    variables = [id(v) for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)]
    assert len(variables) == len(set(variables)) == len(jax.tree.leaves(nnx.state(model)))


def test_a_thousand_layers_are_traced_once(tiny_config, monkeypatch):
    """A configuration claims them in a few bytes."""
    traced = []
    linear = jkv.models.decoder.Linear.__init__
    monkeypatch.setattr(
        jkv.models.decoder.Linear,
        "__init__",
        lambda self, *args, **kwargs: (traced.append(1), linear(self, *args, **kwargs))[1],
    )
    model = outline_model(dataclasses.replace(tiny_config, layers=1000))
    assert len(model.blocks) == 1000
    assert len(traced) == 8
