"""Every path under JAX's settings: wide types, strict promotion, checks of NaN, keys and transfers.

Wide types are tested together with all that refuses: where nothing is refused, the programs are
those of wide types alone.

The tokens are the same under each of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv.cache import spec
from jkv.models import Decoder
from jkv.store import Memory, Store
from tests.decoding import oracle
from tests.engine.engines import make_engine
from tests.test_every_kind import ALIKE, GO_ON

ROWS = [[1, 2, 3], [4, 5, 6, 7, 8]]
NEW = 5
HOW = {"max_new_tokens": NEW, "stop": (), "slots": 64}
HOT = jkv.sampling.chain(
    jkv.sampling.temperature(1.5), jkv.sampling.top_k(8), jkv.sampling.top_p(0.9)
)
LOOKS_BACK = jkv.sampling.chain(jkv.sampling.repetition_penalty(1.2), HOT, jkv.sampling.min_p(0.01))
KEY = jax.random.key(3)  # made here: under a guard, JAX refuses to make one of a number
DRAFT = jkv.prompt_lookup(tokens=2)


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """All that refuses, together: each is independent of the others."""
    with contextlib.ExitStack() as stack:
        for setting in (
            jax.numpy_dtype_promotion("strict"),
            jax.numpy_rank_promotion("raise"),
            jax.debug_nans(True),
            jax.debug_key_reuse(True),
            jax.transfer_guard("disallow"),
        ):
            stack.enter_context(setting)
        yield


@contextlib.contextmanager
def strict_x64() -> Iterator[None]:
    with strict(), jax.enable_x64(True):
        yield


SETTINGS: dict[str, Callable[[], Any]] = {"strict": strict, "strict, x64": strict_x64}


@pytest.fixture(scope="module")
def model(tiny_config: Any) -> Decoder:
    from flax import nnx

    config = dataclasses.replace(tiny_config, layers=1)
    model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    model.embedding[...] = model.embedding[...] * 50
    return model


@pytest.fixture(scope="module")
def plain(model: Decoder) -> dict[str, list[list[int]]]:
    """What rows say without any setting: greedy, drawn at random, and looking back."""
    return {
        "greedy": generated(model),
        "drawn": generated(model, sampler=HOT, key=KEY),
        "looking back": generated(model, sampler=LOOKS_BACK, key=KEY),
    }


def generated(model: Decoder, **how: Any) -> list[list[int]]:
    return oracle.generated(jkv.generate(model, ROWS, **(HOW | how)))


def streamed(model: Decoder) -> list[list[int]]:
    blocks = [block.tokens for block in jkv.stream(model, ROWS, block=4, **HOW)]
    return np.concatenate(blocks, axis=1).tolist()


def resumed(model: Decoder) -> list[list[int]]:
    first = jkv.generate(model, ROWS, **(HOW | {"max_new_tokens": 2}))
    more = jkv.generate(model, [[], []], resume=first, max_new_tokens=NEW - 2, stop=())
    return [a + b for a, b in zip(oracle.generated(first), oracle.generated(more), strict=True)]


def stored(model: Decoder) -> list[list[int]]:
    with Store(tiers=[Memory(1 << 20)]) as store:
        how = HOW | {"store": store, "sequence_ids": ["a", "b"]}
        jkv.generate(model, ROWS, **how)
        out = jkv.generate(model, ROWS, **how)
        assert out.reused.tolist() == [2, 4]
        return oracle.generated(out)


def served(model: Decoder) -> list[list[int]]:
    engine = make_engine(model, max_batch=2, prefill_rows=1)
    requests = [engine.submit(row, max_new_tokens=NEW, stop=()) for row in ROWS]
    engine.run()
    return [request.result() for request in requests]


@jax.jit
def rolled(model: Decoder, tokens: Any, counts: Any) -> jkv.Rollout:
    cache = jkv.init_cache(model.config, batch=2, slots=64)
    logits, cache = jkv.prefill(model, tokens, cache, counts)
    return jkv.rollout(model, logits, cache, steps=NEW)


def pure(model: Decoder) -> list[list[int]]:
    tokens = jax.device_put(np.asarray([[*ROWS[0], 0, 0], ROWS[1]], np.int32))
    counts = jax.device_put(np.asarray([3, 5], np.int32))
    return rolled(model, tokens, counts).check().tokens.tolist()


def beams(model: Decoder) -> list[list[int]]:
    """One beam is greedy decoding; of several the program is another."""
    found = jkv.beam_search(model, ROWS, max_new_tokens=NEW, beams=2, stop=())
    assert found.tokens.dtype == np.int32
    assert found.scores.dtype == np.float32
    return jkv.beam_search(model, ROWS, max_new_tokens=NEW, beams=1, stop=()).tokens[:, 0].tolist()


def drawn(model: Decoder, **how: Any) -> list[list[int]]:
    return generated(model, sampler=HOT, key=KEY, return_logprobs=True, **how)


PATHS: dict[str, tuple[str, Callable[[Decoder], list[list[int]]]]] = {
    "generate": ("greedy", generated),
    "drawn": ("drawn", drawn),
    "looking back": (
        "looking back",
        lambda model: generated(model, sampler=LOOKS_BACK, key=KEY),
    ),
    "samples": ("drawn", lambda model: drawn(model, samples=2)[:1]),  # the first has row 0's key
    "draft": ("drawn", lambda model: drawn(model, draft=DRAFT)),
    "stream": ("greedy", streamed),
    "resume": ("greedy", resumed),
    "store": ("greedy", stored),
    "engine": ("greedy", served),
    "pure": ("greedy", pure),
    "beams": ("greedy", beams),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_tokens(model, plain, setting, path):
    which, call = PATHS[path]
    with SETTINGS[setting]():
        got = call(model)
    assert got == plain[which][: len(got)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("text", [*ALIKE, *GO_ON])
def test_passes_of_every_kind_are_traced(model, setting, text):
    """What JAX refuses in a program is refused while tracing, and nothing has to be compiled."""

    def life(model: Decoder, tokens: Any) -> Any:
        cache = jkv.init_cache(model.config, spec.parse(text), batch=2, slots=64)
        logits, cache = jkv.prefill(model, tokens, cache)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits, cache = jkv.decode_step(model, token, cache)
        cache = cache.take(jnp.arange(1, -1, -1, dtype=jnp.int32))
        with contextlib.suppress(jkv.errors.UnsupportedError):
            cache = cache.crop(2)
        return logits, cache

    with SETTINGS[setting]():
        out = jax.eval_shape(life, model, jax.ShapeDtypeStruct((2, 5), jnp.int32))
    assert {leaf.dtype for leaf in jax.tree.leaves(out)}.isdisjoint({jnp.int64, jnp.float64})


def test_conversion_to_a_kind_that_evicts_is_traced(model):
    """Its scores are float32, and stand beside positions."""
    cache = jkv.init_cache(model.config, jkv.dense(), batch=2, slots=64)
    kind = spec.parse("evict:16,score=key_norm")
    with strict_x64():
        out = jax.eval_shape(lambda cache: cache.convert(kind), cache)
    assert out.layers[0].scores.dtype == jnp.float32


def test_load_under_a_transfer_guard():
    with jax.transfer_guard("disallow"):
        lm = jkv.load("shakespeare")
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(lm.model))


WITHOUT_JIT = """
import jax, jkv
from flax import nnx
from jkv.models import Config, Decoder, Rope

config = Config(vocab=11, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, feed_forward=24,
                context=64, rope=Rope(dims=8))
model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
how = {"max_new_tokens": 2, "stop": (), "slots": 64}
want = jkv.generate(model, [[1, 2, 3]], **how).tokens.tolist()
with jax.disable_jit():
    assert jkv.generate(model, [[1, 2, 3]], **how).tokens.tolist() == want
    draft = jkv.prompt_lookup(tokens=2)
    assert jkv.generate(model, [[1, 2, 3]], draft=draft, **how).tokens.tolist() == want
print("the same")
"""


def test_without_jit():
    """Op by op, which is how people debug; in a process where no hook checks what programs take."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JIT], capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "the same\n", done.stderr


# What is refused at run time depends on what the host does between two programs: these grow their
# buffers there, evict, take pages, round, or have no layers.
@pytest.mark.parametrize(
    "text", ["dense:grow", "none", "paged:4", "int4:residual=4,group=8", "evict:16,score=h2o"]
)
def test_kinds(model, text):
    kind = spec.parse(text)
    want = generated(model, cache=kind)
    with strict_x64():
        out = jkv.generate(model, ROWS, cache=kind, **HOW)
        cache = out.cache.check()
        cache.take([1, 0])
        with contextlib.suppress(jkv.errors.UnsupportedError):
            cache.crop(2)
    assert oracle.generated(out) == want
