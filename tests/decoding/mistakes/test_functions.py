"""What people get wrong in pure functions, caches and configurations, and what they are told."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jkv
from jkv import sampling
from jkv.errors import CacheFullError, CheckpointError, UnsupportedError
from jkv.models import Config, Rope
from tests.decoding.mistakes.table import PROMPTS, refuse, table

TOKENS = jnp.ones((2, 3), jnp.int32)
new_cache = jkv.init_cache
SIZES = {
    "vocab": 11,
    "layers": 2,
    "width": 16,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "feed_forward": 24,
    "context": 256,
}
K = jnp.ones((2, 2, 5, 8))
Q = jnp.ones((2, 1, 4, 8))
AT = jnp.full((2, 1), 4)


def attend(q=Q, k=K, v=K, positions=AT, **kwargs):
    spec = jkv.ops.AttentionSpec(0.3, kwargs.pop("window", None))
    return jkv.ops.attention(q, jkv.ops.ContiguousKV(k, v), positions, spec, **kwargs)


CALLS = [
    # The pure functions
    (
        "prefill a list",
        lambda w: jkv.prefill(w.model, PROMPTS, w.cache),
        TypeError,
        "tokens of type list",
    ),
    (
        "prefill floats",
        lambda w: jkv.prefill(w.model, jnp.ones((2, 3)), w.cache),
        TypeError,
        "tokens of dtype float32; expected integers",
    ),
    (
        "prefill one row",
        lambda w: jkv.prefill(w.model, TOKENS[0], w.cache),
        ValueError,
        r"tokens of shape \[3\]; expected integers \[2, any\]",
    ),
    (
        "prefill other rows",
        lambda w: jkv.prefill(w.model, TOKENS.T, w.cache),
        ValueError,
        r"tokens of shape \[3, 2\].*as many rows as the cache",
    ),
    (
        "prefill nothing",
        lambda w: jkv.prefill(w.model, TOKENS[:, :0], w.cache),
        ValueError,
        r"tokens of shape \[2, 0\]",
    ),
    (
        "prefill without a cache",
        lambda w: jkv.prefill(w.model, TOKENS, None),
        TypeError,
        "prefill got NoneType as a cache.*jkv.init_cache",
    ),
    (
        "prefill a kind",
        lambda w: jkv.prefill(w.model, TOKENS, jkv.dense()),
        TypeError,
        "prefill got DenseKind as a cache",
    ),
    (
        "prefill an lm",
        lambda w: jkv.prefill(w.lm, TOKENS, w.cache),
        TypeError,
        "expected a decoder, as lm.model is",
    ),
    (
        "prefill with one count",
        lambda w: jkv.prefill(w.model, TOKENS, w.cache, 3),
        TypeError,
        "counts of type int",
    ),
    (
        "prefill with other counts",
        lambda w: jkv.prefill(w.model, TOKENS, w.cache, jnp.ones(3, jnp.int32)),
        ValueError,
        r"counts of shape \[3\]; expected integers \[2\]",
    ),
    (
        "a step of two tokens",
        lambda w: jkv.decode_step(w.model, TOKENS, w.cache),
        ValueError,
        r"decode_step got token of shape \[2, 3\]",
    ),
    (
        "a step of floats",
        lambda w: jkv.decode_step(w.model, jnp.ones(2), w.cache),
        TypeError,
        "decode_step got token of dtype float32",
    ),
    (
        "a step with integers for flags",
        lambda w: jkv.decode_step(w.model, TOKENS[:, 0], w.cache, TOKENS[:, 0]),
        TypeError,
        "active of dtype int32; expected bools",
    ),
    # Models and caches
    (
        "a cache of other heads",
        lambda w: jkv.prefill(w.heads, TOKENS, w.cache),
        ValueError,
        "holds 2 heads of 8 dimensions, and the model makes 4 of 8: keys ",
    ),
    (
        "a cache of other layers",
        lambda w: jkv.prefill(w.other, TOKENS, w.cache),
        ValueError,
        "the cache has 2 layers and the model 3",
    ),
    (
        "no cache of other layers",
        lambda w: jkv.prefill(w.other, TOKENS, w.plain.cache),
        ValueError,
        "the cache has 2 layers and the model 3",
    ),
    (
        "a model and other rows",
        lambda w: w.model(TOKENS.T, w.cache),
        ValueError,
        "the cache has 2 rows and the tokens 3.*batch=",
    ),
    ("half a batch", lambda w: new_cache(w.config, batch=1.5, slots=8), ValueError, "batch=1.5"),
    ("true slots", lambda w: new_cache(w.config, batch=2, slots=True), ValueError, "slots=True"),
    (
        "init_cache a model",
        lambda w: new_cache(w.model, batch=2, slots=8),
        TypeError,
        "pass its .config",
    ),
    ("init_cache nothing", lambda w: new_cache(None, batch=2, slots=8), TypeError, "a NoneType"),
    (
        "init_cache a text",
        lambda w: new_cache(w.config, "window:x", batch=2, slots=8),
        ValueError,
        "got 'window:x'",
    ),
    (
        "init_cache a factory",
        lambda w: new_cache(w.config, jkv.dense, batch=2, slots=8),
        TypeError,
        "kind=<function",
    ),
    (
        "init_cache of integers",
        lambda w: new_cache(w.config, batch=2, slots=8, dtype="int32"),
        ValueError,
        "dtype=int32; expected a floating",
    ),
    (
        "init_cache of what",
        lambda w: new_cache(w.config, batch=2, slots=8, dtype="float7"),
        TypeError,
        "dtype='float7'",
    ),
    *(
        (
            f"init_cache {name}={value}",
            lambda w, how={"batch": 2, "slots": 8, name: value}: new_cache(w.config, **how),
            ValueError,
            f"init_cache got {name}={value}; expected an integer of at least 1",
        )
        for name, value in {"batch": 0, "slots": -1}.items()
    ),
    # The algebra of caches
    ("crop to less than nothing", lambda w: w.cache.crop(-1), ValueError, "crop got a negative"),
    ("crop to half", lambda w: w.cache.crop(1.5), ValueError, "crop got lengths of .*float"),
    (
        "crop other rows",
        lambda w: w.cache.crop([1, 2, 3]),
        ValueError,
        r"shape \(3,\).*each of 2 rows",
    ),
    ("crop to None", lambda w: w.cache.crop(None), ValueError, "crop got"),
    (
        "take what is not there",
        lambda w: w.cache.take([2]),
        ValueError,
        r"rows \[2\]; expected numbers 0 to 1",
    ),
    ("take from the end", lambda w: w.cache.take([-1]), ValueError, r"rows \[-1\]"),
    ("take nothing", lambda w: w.cache.take([]), ValueError, "take got rows of shape"),
    ("take one", lambda w: w.cache.take(0), ValueError, r"take got rows of shape \(\)"),
    ("take by flags", lambda w: w.cache.take([True, False]), ValueError, "dtype bool"),
    ("too small", lambda w: w.cache.resize(3), CacheFullError, "resize got 3 slots.*crop them"),
    ("resize to nothing", lambda w: w.cache.resize(0), ValueError, "slots=0"),
    ("resize to half", lambda w: w.cache.resize(9.5), ValueError, "slots=9.5"),
    ("concat nothing", lambda w: jkv.concat([]), ValueError, "concat got no caches"),
    ("concat one", lambda w: jkv.concat(w.cache), TypeError, "expected a list of caches"),
    ("concat others", lambda w: jkv.concat([w.cache, 1]), TypeError, "expected a list of caches"),
    (
        "concat kinds",
        lambda w: jkv.concat([w.cache, w.plain.cache]),
        ValueError,
        "different kinds or shapes",
    ),
    ("none has no keys", lambda w: w.plain.cache.to_legacy(), UnsupportedError, "keeps no keys"),
    ("from nothing", lambda w: jkv.from_legacy([]), ValueError, "from_legacy got no layers"),
    (
        "from keys only",
        lambda w: jkv.from_legacy([(jnp.zeros((2, 2, 5, 8)), jnp.zeros((2, 2, 5)))]),
        ValueError,
        r"layer 0 with keys \(2, 2, 5, 8\) and values \(2, 2, 5\)",
    ),
    (
        "from other rows",
        lambda w: jkv.from_legacy([*w.tree(), (jnp.zeros((1, 2, 5, 8)), jnp.zeros((1, 2, 5, 8)))]),
        ValueError,
        r"different \(B, S\)",
    ),
    (
        "from too long rows",
        lambda w: jkv.from_legacy(w.tree(), [6, 1]),
        ValueError,
        r"lengths \[6, 1\]; expected 2 integers from 0 to 5",
    ),
    (
        "from rows without lengths",
        lambda w: jkv.from_legacy(w.tree(), [1]),
        ValueError,
        "expected 2 integers",
    ),
    # Configurations
    (
        "Config groups",
        lambda w: Config(**{**SIZES, "kv_heads": 3}),
        ValueError,
        "4 heads over 3 kv_heads",
    ),
    (
        "Config windows",
        lambda w: Config(**SIZES, windows=(4,)),
        ValueError,
        "1 window for 2 layers",
    ),
    (
        "Config rope",
        lambda w: Config(**SIZES, rope=Rope(dims=16)),
        ValueError,
        "rope over 16 dim.*even",
    ),
    ("Config odd rope", lambda w: Config(**SIZES, rope=Rope(dims=7)), ValueError, "rope over 7"),
    *(
        (
            f"Config {name}={value}",
            lambda w, how={**SIZES, name: value}: Config(**how),
            ValueError,
            f"Config got {name}={value}; expected an integer of at least 1",
        )
        for name, value in (("vocab", 0), ("layers", -1), ("heads", True), ("context", -256))
    ),
    # Loading
    ("load nowhere", lambda w: jkv.load("./nowhere/at/all"), CheckpointError, "nowhere/at/all"),
    ("load nothing", lambda w: jkv.load(""), ValueError, "load got ''; expected.*hub id"),
    ("load as integers", lambda w: jkv.load("./nowhere", dtype="int8"), ValueError, "dtype='int8'"),
    # Attention
    (
        "heads",
        lambda w: attend(k=jnp.ones((2, 3, 5, 8)), v=jnp.ones((2, 3, 5, 8))),
        ValueError,
        "4 query heads over 3",
    ),
    ("no window", lambda w: attend(window=0), ValueError, "window=0; expected at least 1"),
    (
        "no implementation",
        lambda w: attend(implementation="triton"),
        UnsupportedError,
        "implementation='triton'; expected one of",
    ),
    ("merge nothing", lambda w: jkv.ops.merge(), ValueError, "merge got no partial"),
    (
        "traced steps",
        lambda w: jax.jit(lambda n: w.rollout(steps=n))(3),
        ValueError,
        "steps got .*integer",
    ),
]

ROLLOUT = [
    ("an old name", {"said": TOKENS}, TypeError, "rollout got said=, which is now history="),
    ("a rollout of tokens", {"logits": TOKENS}, TypeError, "logits of dtype int32"),
    ("other logits", {"logits": jnp.ones((3, 11))}, ValueError, r"logits of shape \[3, 11\]"),
    ("a rollout alone", {"cache": None}, TypeError, "rollout got NoneType as a cache"),
    ("ends in a list", {"ends": [[1], [2]]}, TypeError, "ends of type list"),
    ("flat ends", {"ends": jnp.ones(2, jnp.int32)}, ValueError, r"ends of shape \[2\]"),
    ("a rollout without a key", {"sampler": sampling.temperature(0.8)}, ValueError, "needs key"),
    ("history of others", {"history": TOKENS.T}, ValueError, r"history of shape \[3, 2\]"),
    *(
        (f"steps={value}", {"steps": value}, ValueError, "steps got .*integer of at least 1")
        for value in (0, -1, 2.0, True, None)
    ),
]


@table(CALLS)
def test_calls(world, how, error, message):
    refuse(lambda: how(world), error, message)


@table(ROLLOUT)
def test_rollout(world, how, error, message):
    refuse(lambda: world.rollout(**how), error, message)


def test_good_calls_beside_the_bad_ones(world):
    """The positive twins of what is refused above only for a detail."""
    world.cache.take(np.asarray([1, 1, 0])).crop([1, 0, 2]).resize(9)
    attend(window=1)
