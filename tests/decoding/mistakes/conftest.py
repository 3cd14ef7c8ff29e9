"""What the calls in the tables have at hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

import jkv
from jkv.models import Decoder
from tests.decoding import oracle
from tests.decoding.mistakes.table import PROMPTS


class World:
    """A model, others that do not fit to its caches, and a good result."""

    def __init__(self, model: Decoder, other: Decoder, heads: Decoder):
        self.model, self.other, self.heads = model, other, heads
        self.lm, self.config = oracle.lm(model), model.config
        self.good = jkv.generate(model, PROMPTS, max_new_tokens=4)
        self.want = oracle.generated(self.good)
        self.cache = self.good.cache
        self.plain = jkv.generate(model, PROMPTS, max_new_tokens=2, cache=jkv.none())
        self.logits = jnp.zeros((2, 11))

    def generate(self, prompts: Any = PROMPTS, **asked: Any) -> jkv.Result:
        return jkv.generate(self.model, prompts, **{"max_new_tokens": 4, **asked})

    def text(self, **asked: Any) -> jkv.Result:
        return jkv.generate(self.lm, PROMPTS, **{"max_new_tokens": 4, **asked})

    def beam_search(self, prompts: Any = PROMPTS, **asked: Any) -> Any:
        return jkv.beam_search(self.model, prompts, **{"max_new_tokens": 2, **asked})

    def rollout(self, **asked: Any) -> Any:
        logits, cache = asked.pop("logits", self.logits), asked.pop("cache", self.cache)
        return jkv.rollout(self.model, logits, cache, **{"steps": 2, **asked})

    def tree(self) -> list[Any]:
        """A dense layer's arrays, as other libraries have them."""
        return [(jnp.zeros((2, 2, 5, 8)), jnp.zeros((2, 2, 5, 8)))] * 2

    def check_unchanged(self) -> None:
        """After all mistakes, and whenever this runs: the same tokens, the same cache."""
        assert oracle.generated(self.generate()) == self.want
        oracle.check_cache(self.model, self.good)
        more = self.generate([[5], []], resume=self.good)
        for row, new in enumerate(([5], [])):
            before = [*PROMPTS[row], *self.want[row], *new]
            assert more.tokens[row].tolist() == oracle.greedy(self.model, before, 4)


@pytest.fixture(scope="package")
def world(tiny_model: Decoder, tiny_config: jkv.Config) -> World:
    layers = dataclasses.replace(tiny_config, kv_heads=4, layers=3)
    heads = dataclasses.replace(tiny_config, kv_heads=4)
    return World(tiny_model, Decoder(layers, rngs=nnx.Rngs(0)), Decoder(heads, rngs=nnx.Rngs(0)))
