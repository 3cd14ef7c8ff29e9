"""What a sampling transform returns is checked when it is traced, wherever one enters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from tests.decoding import oracle, texts
from tests.engine.engines import check_empty, make_engine

ROWS = [[1, 2, 3], [4, 5, 6, 7, 8]]
KEY = jax.random.key(0)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Mine:
    """A user's transform, as good or bad as its two functions."""

    begin: Any
    change: Any

    def tree_flatten(self) -> Any:
        return (), (self.begin, self.change)

    @classmethod
    def tree_unflatten(cls, aux: Any, _: Any) -> Mine:
        return cls(*aux)

    def init(self, tokens: Any, vocab: int) -> Any:
        return self.begin(tokens, vocab)

    def update(self, logits: Any, state: Any, token: Any) -> Any:
        return self.change(logits, state)


def nothing(tokens: Any, vocab: int) -> Any:
    return ()


def counted(tokens: Any, vocab: int) -> Any:
    return {"n": jnp.zeros((tokens.shape[0],), jnp.int32)}


PAIR = r"Mine returned float32\[2, 11\] from update; expected a pair"
# What it does, the error, and what it says for two rows of 11 tokens.
BAD = {
    "alone": (nothing, lambda x, s: x, TypeError, PAIR),
    "three": (nothing, lambda x, s: (x, s, s), TypeError, "returned 3 values from update"),
    "none": (nothing, lambda x, s: None, TypeError, "returned None from update"),
    "one row": (nothing, lambda x, s: (x[0], s), ValueError, r"made float32\[11\] of the logits"),
    "column": (
        nothing,
        lambda x, s: (x[:, :1], s),
        ValueError,
        r"made float32\[2, 1\] of the logits; expected float32\[2, 11\]",
    ),
    "integers": (
        nothing,
        lambda x, s: (jnp.argmax(x, axis=-1, keepdims=True) + jnp.zeros(x.shape, jnp.int32), s),
        ValueError,
        r"made int32\[2, 11\] of the logits; expected float32\[2, 11\]",
    ),
    "mask": (nothing, lambda x, s: (x > 0, s), ValueError, r"made bool\[2, 11\]"),
    "no array": (nothing, lambda x, s: ([1.0], s), ValueError, r"made \[1.0\] of the logits"),
    "structure": (counted, lambda x, s: (x, (s["n"],)), ValueError, "returned the state"),
    "forgotten": (counted, lambda x, s: (x, None), ValueError, "returned the state None"),
    "shape": (
        counted,
        lambda x, s: (x, {"n": s["n"][:1]}),
        ValueError,
        r"state \{n: int32\[1\]\} from update; expected \{n: int32\[2\]\}",
    ),
    "dtype": (
        counted,
        lambda x, s: (x, {"n": s["n"] + 0.5}),
        ValueError,
        r"state \{n: float32\[2\]\} from update; expected \{n: int32\[2\]\}",
    ),
    "text": (lambda tokens, vocab: "hello", lambda x, s: (x, s), ValueError, "'hello' from init"),
}


@pytest.mark.parametrize("name", BAD)
def test_generate_refuses_before_it_reads_a_prompt(tiny_model, name):
    begin, change, error, match = BAD[name]
    spy = oracle.Spy(tiny_model)
    for sampler in (Mine(begin, change), jkv.sampling.chain(Mine(begin, change))):
        for draft in (None, jkv.prompt_lookup()):
            with pytest.raises(error, match=match):
                jkv.generate(spy, ROWS, max_new_tokens=4, sampler=sampler, key=KEY, draft=draft)
    assert spy.passes() == []


def test_wherever_a_sampler_enters(tiny_model, tiny_config):
    bad = jkv.sampling.chain(jkv.sampling.temperature(0.5), Mine(nothing, BAD["column"][1]))
    how = {"max_new_tokens": 4, "sampler": bad, "key": KEY}

    @jax.jit
    def rolled(model):
        cache = jkv.init_cache(model.config, batch=2, slots=8)
        logits = jnp.zeros((2, 11))
        return jkv.rollout(model, logits, cache, steps=4, sampler=bad, key=KEY)

    engine = make_engine(oracle.lm(tiny_model), max_batch=2)
    lm = texts.noise(dataclasses.replace(tiny_config, layers=1))
    for call in (
        lambda: jkv.stream(tiny_model, ROWS, **how),
        lambda: jkv.generate(tiny_model, ROWS, samples=2, **how),
        lambda: rolled(tiny_model),
        lambda: engine.submit(ROWS[0], **how),
        lambda: engine.warm([bad]),
        lambda: jkv.Chat(lm, sampler=bad, key=KEY),
    ):
        with pytest.raises(ValueError, match=r"the transform Mine made float32\[\d, 1\] of the"):
            call()
    check_empty(engine)


def test_logits_in_another_float_are_converted(tiny_model):
    def half(logits: Any, state: Any) -> Any:
        return logits.astype(jnp.bfloat16), {"n": state["n"] + 1}

    greedy = jkv.sampling.chain(Mine(counted, half), jkv.sampling.greedy())
    want = jkv.generate(tiny_model, ROWS, max_new_tokens=3)
    out = jkv.generate(tiny_model, ROWS, max_new_tokens=3, sampler=greedy)
    np.testing.assert_array_equal(out.tokens, want.tokens)
