"""Operations of a plan beside those that XLA counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jkv
from jkv.models import Config, Decoder, Rope
from tests.planning.models import TINY, WINDOWED

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX


def xla(
    config: Config, kind: Any, batch: int, slots: int, new: int
) -> tuple[dict[str, float], int]:
    """What XLA says of a pass of T tokens, compiled: its costs, and bytes of temporaries."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: jkv.init_cache(config, kind, batch=batch, slots=slots))
    tokens = jax.ShapeDtypeStruct((batch, new), jnp.int32)
    program = jax.jit(jkv.prefill, donate_argnums=2).lower(model, tokens, cache).compile()
    return program.cost_analysis(), program.memory_analysis().temp_size_in_bytes


# Of at most 128 slots, which attention takes at once: XLA counts the body of a loop once.
LENGTH = 128


@pytest.fixture(scope="module")
def counted() -> Any:
    """XLA's costs of a step with a cache, of one without, and of a prompt; each compiled once."""
    known: dict[Any, Any] = {}

    def count(config: Config) -> dict[str, Any]:
        if config not in known:
            known[config] = {
                "step": xla(config, jkv.dense(), 2, LENGTH, 1)[0],
                "step_without": xla(config, jkv.none(), 2, LENGTH, 1)[0],
                "prompt": xla(config, jkv.dense(), 2, LENGTH, LENGTH)[0],
            }
        return known[config]

    return count


ONE = dataclasses.replace(TINY, layers=1)
PLAIN = dataclasses.replace(ONE, gated=False, activation="relu", kv_heads=8, tied=True)


@pytest.mark.parametrize("config", [ONE, PLAIN], ids=["gated", "plain"])
@pytest.mark.parametrize("which", ["step", "step_without", "prompt"])
def test_operations_are_those_that_xla_counts(config, which, counted):
    """XLA counts norms, softmax, rotations and activations besides: 2 to 7 % at this width."""
    planned = getattr(jkv.plan(config, batch=2, seq_len=LENGTH), which)
    assert 1 < counted(config)[which]["flops"] / planned.flops < 1.08


PARTS = {
    "logits": {"vocab": 1024},
    "mlp": {"feed_forward": 512},
    # Twice as many query heads: twice the projections of queries and back, scores and values.
    "heads": {"heads": 16},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("which", ["step", "step_without"])
def test_each_part_is_what_xla_counts(part, which, counted):
    """Change what only one part depends on: the difference is that part's."""
    bigger = dataclasses.replace(ONE, **PARTS[part])
    small, big = (getattr(jkv.plan(c, batch=2, seq_len=LENGTH), which) for c in (ONE, bigger))
    names = ("projections", "scores", "values") if part == "heads" else (part,)
    difference = sum(getattr(big, name) - getattr(small, name) for name in names)
    assert difference == big.flops - small.flops
    xla_difference = counted(bigger)[which]["flops"] - counted(ONE)[which]["flops"]
    # Activations and the softmax again; of logits XLA counts the products and nothing else.
    assert 1 <= xla_difference / difference < (1.0001 if part == "logits" else 1.06)


def test_scores_and_values_grow_with_the_slots(counted):
    half = xla(ONE, jkv.dense(), 2, LENGTH // 2, 1)[0]["flops"]
    small, big = (jkv.plan(ONE, batch=2, seq_len=n).step for n in (LENGTH // 2, LENGTH))
    assert big.scores == 2 * small.scores
    assert big.values == 2 * small.values
    assert (big.mlp, big.projections) == (small.mlp, small.projections)
    planned = big.flops - small.flops
    assert 1 <= (counted(ONE)["step"]["flops"] - half) / planned < 1.2


def test_what_a_cache_saves():
    """The questions that people ask, answered in numbers."""
    plan = jkv.plan("llama-2-7b", seq_len=4096)
    step, without = plan.step, plan.step_without
    # Of self-attention: the projections of all tokens but one, and all rows of scores but one.
    assert without.projections == 4096 * step.projections
    assert without.scores == 4096 * step.scores
    assert without.values == 4096 * step.values
    # The feed-forward layers do per token what they did, for one token rather than for all.
    assert without.mlp == 4096 * step.mlp
    # The logits of one token are wanted either way.
    assert without.logits == step.logits == 2 * 4096 * 32000
    # One token's stream goes from block to block, [B, 1, D] rather than [B, S, D].
    assert step.between_blocks == 4096 * 2
    assert without.between_blocks == 4096 * step.between_blocks
    # One step's operations: two per weight that is multiplied, and four per cached number of H.
    weights = plan.parameters - 32000 * 4096 - (2 * 32 + 1) * 4096
    assert step.flops == 2 * weights + 4 * 32 * 4096 * 4096
    # What it costs: the cache is read at each step.
    assert step.read - (plan.cache_bytes - 5) == plan.weight_bytes - (32000 - 1) * 4096 * 2
    assert step.written == plan.bytes_per_token


def test_xla_reads_what_is_planned(counted):
    """At one token per row it is weights and cache that are read; XLA counts every operand, also
    what one operation hands to the next, and tables that are looked up as if they were read whole.
    """
    for config in (ONE, PLAIN):
        step = jkv.plan(config, batch=2, seq_len=LENGTH).step
        assert 1 < counted(config)["step"]["bytes accessed"] / step.read < 2.5
    # Twice the feed-forward weights are read once more.
    bigger = dataclasses.replace(ONE, feed_forward=512)
    planned = [jkv.plan(c, batch=2, seq_len=LENGTH).step.read for c in (ONE, bigger)]
    seen = [counted(c)["step"]["bytes accessed"] for c in (ONE, bigger)]
    assert 1 < (seen[1] - seen[0]) / (planned[1] - planned[0]) < 1.05


def test_windows_bound_what_a_step_looks_at():
    full = dataclasses.replace(WINDOWED, windows=())
    far = {c: jkv.plan(c, seq_len=4096).step for c in (WINDOWED, full)}
    # Two layers of four look at 64 tokens.
    assert far[WINDOWED].scores == far[full].scores * (4096 + 64) // (2 * 4096)
    assert far[WINDOWED].read < far[full].read
    ring = jkv.plan(full, seq_len=4096, cache="window:60,sinks=4")
    assert ring.step.scores == far[full].scores * 64 // 4096
    cache = ring.cache_bytes - 5
    assert ring.step.read == far[full].read - (jkv.plan(full, seq_len=4096).cache_bytes - 5) + cache
    assert jkv.plan(full, seq_len=32, cache="window:60,sinks=4").step.scores == (
        jkv.plan(full, seq_len=32).step.scores
    )


def test_a_prompt_comes_in_chunks():
    one, two = (jkv.plan(TINY, seq_len=n) for n in (256, 512))
    assert one.prompt.scores == one.step_without.scores
    # The second chunk looks at both, the first at itself.
    assert two.prompt.scores == 3 * one.prompt.scores
    assert two.prompt.mlp == 2 * one.prompt.mlp == two.step_without.mlp
    assert two.prompt.logits == one.prompt.logits
    nothing = jkv.plan(TINY, seq_len=512, cache="none")
    assert nothing.step == nothing.step_without
    assert nothing.prompt.flops == nothing.step.flops


WIDE = dataclasses.replace(
    ONE, vocab=8192, width=1024, head_dim=128, feed_forward=2752, rope=Rope(dims=128)
)
LEARNED = dataclasses.replace(WIDE, rope=None, heads=16, kv_heads=16, head_dim=64, gated=False)


@pytest.mark.parametrize("config", [WIDE, LEARNED], ids=["llama", "gpt2"])
@pytest.mark.parametrize("kind", [jkv.dense(), jkv.none()], ids=["dense", "none"])
def test_activations_are_about_the_temporaries_of_the_largest_pass(config, kind):
    plan = jkv.plan(config, batch=2, seq_len=1024, cache=kind)
    _, temporaries = xla(config, kind, 2, 1024, 256)
    assert 0.55 < temporaries / plan.activation_bytes < 1.2
