"""A decoder of another library, with its own idea of a cache, decodes with jkv's instead.

penzai's Llama keeps keys and values as state within the model. Its attention layers, replaced by
one of ten lines, leave the model a pure function of tokens and a cache.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv

pytestmark = pytest.mark.compare
pz = pytest.importorskip("penzai.pz")

Q = ("batch", "seq", "head_groups", "query_heads", "projection")
K = ("batch", "seq", "head_groups", "projection")
SLOTS, NEW = 24, 8
SPEC = jkv.ops.AttentionSpec(1.0)  # their queries come scaled
SIZES = {"slots": SLOTS, "layers": 2, "kv_heads": 2, "head_dim": 8}


@pz.pytree_dataclass
class Cached(pz.nn.Layer):
    """An attention of penzai's over the next layer of a pass."""

    theirs: Any

    def __call__(self, x: Any, *, run: jkv.cache.Run, after: list[Any], **side: Any) -> Any:
        q = self.theirs.input_to_query(x, **side).unwrap(*Q)
        k = self.theirs.input_to_key(x, **side).unwrap(*K)
        v = self.theirs.input_to_value(x, **side).unwrap(*K)
        heads = q.reshape(*q.shape[:2], -1, q.shape[-1])  # [B, T, N, H]
        out, layer = run.layers[len(after)].attend(
            heads, k, v, run.step, jkv.ops.AttentionSpec(1.0)
        )
        after.append(layer)
        return self.theirs.attn_value_to_output.sublayers[-1](pz.nx.wrap(out.reshape(q.shape), *Q))


def cached(model: Any, tokens: Any, cache: jkv.Cache, counts: Any = None) -> Any:
    run, after = cache.begin(tokens, counts), []
    words, places = (pz.nx.wrap(x, "batch", "seq") for x in (run.tokens, run.step.positions))
    logits = model(words, token_positions=places, run=run, after=after)
    return run.end(logits.unwrap("batch", "seq", "vocabulary"), after)


@pytest.fixture(scope="module")
def llama() -> Any:
    from penzai.models.transformer.variants import llamalike_common as variants

    config = variants.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=16,
        projection_dim=8,
        mlp_hidden_dim=24,
        num_decoder_blocks=2,
        vocab_size=11,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
    )
    return pz.freeze_params(
        variants.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))
    )


def alone(model: Any, prompt: list[int]) -> list[int]:
    """The greedy tokens of a row by their own model, which reads the whole text for each."""

    @jax.jit
    def forward(model: Any, tokens: Any) -> Any:
        return model(pz.nx.wrap(tokens, "batch", "seq")).unwrap("batch", "seq", "vocabulary")

    text = list(prompt)
    for _ in range(NEW):
        padded = np.zeros((1, SLOTS), np.int32)
        padded[0, : len(text)] = text
        text.append(int(forward(model, padded)[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


@functools.partial(jax.jit, static_argnames="kind")
def write(model: Any, tokens: Any, counts: Any, kind: Any) -> jkv.Rollout:
    cache = jkv.attention_cache(kind, batch=len(tokens), **SIZES)
    decoder = jax.tree_util.Partial(cached, model)
    logits, cache = jkv.prefill(decoder, tokens, cache, counts)
    return jkv.rollout(decoder, logits, cache, steps=NEW)


PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3]]


@pytest.mark.parametrize("kind", ["none", "dense", "paged:4", "window:24", "evict:24"])
def test_tokens_are_those_of_their_own_model(llama, kind):
    ours = llama.select().at_instances_of(pz.nn.Attention).apply(Cached)
    tokens = jnp.asarray([PROMPTS[0], [*PROMPTS[1], 0, 0, 0, 0]])
    out = write(ours, tokens, jnp.asarray([7, 3]), jkv.parse(kind)).check()
    want = [alone(llama, prompt) for prompt in PROMPTS]
    assert out.tokens.tolist() == want
    assert len({token for row in want for token in row}) > 2  # no model that says one thing


def test_what_is_rounded_is_near(llama):
    ours = llama.select().at_instances_of(pz.nn.Attention).apply(Cached)
    decoder = jax.tree_util.Partial(cached, ours)

    def logits(kind: str) -> np.ndarray:
        cache = jkv.attention_cache(jkv.parse(kind), batch=1, **SIZES)
        _, cache = jkv.prefill(decoder, jnp.asarray(PROMPTS[:1]), cache)
        return np.asarray(jkv.decode_step(decoder, jnp.asarray([7]), cache)[0])

    exact, rounded = logits("dense"), logits("int8")
    assert 0 < np.abs(exact - rounded).max() < 0.05 * exact.std()
