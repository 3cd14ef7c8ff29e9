"""What people get wrong, and what they are told: what was got, what is expected, what to do.

Each case is followed by a call that works: nothing is lost or spoilt by a mistake.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv import sampling
from jkv.errors import CacheFullError, CheckpointError, UnsupportedError
from jkv.models import Config, Decoder, Rope
from tests.decoding import oracle

PROMPTS = [[1, 2, 3], [4, 5]]


@dataclasses.dataclass
class NoTree:
    """A transform that JAX cannot look into."""

    value: float

    def init(self, tokens, vocab):
        return ()

    def update(self, logits, state, token):
        return logits, state


class Mutable:
    """A draft that can be neither hashed nor looked into."""

    __hash__ = None

    def __call__(self, history, lengths):
        return history[:, :2]


def floats(history, lengths):
    return jnp.ones((history.shape[0], 3))


def flat(history, lengths):
    return history[:, 0]


class World:
    """What the calls below have at hand."""

    def __init__(self, model, other):
        self.model, self.lm, self.other = model, oracle.lm(model), other
        self.config = model.config
        self.good = jkv.generate(model, PROMPTS, max_new_tokens=4)
        self.want = oracle.said(self.good)
        self.cache = self.good.cache
        self.plain = jkv.generate(model, PROMPTS, max_new_tokens=2, cache=jkv.none())
        self.logits = jnp.zeros((2, 11))

    def generate(self, prompts=PROMPTS, **kwargs):
        return jkv.generate(self.model, prompts, **{"max_new_tokens": 4, **kwargs})

    def text(self, **kwargs):
        return jkv.generate(self.lm, PROMPTS, **{"max_new_tokens": 4, **kwargs})

    def tree(self):
        """A dense layer's arrays, as other libraries have them."""
        return [(jnp.zeros((2, 2, 5, 8)), jnp.zeros((2, 2, 5, 8)))] * 2


@pytest.fixture(scope="module")
def world(tiny_model, tiny_config):
    wider = dataclasses.replace(tiny_config, kv_heads=4, layers=3)
    return World(tiny_model, Decoder(wider, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def other_heads(tiny_config):
    return Decoder(dataclasses.replace(tiny_config, kv_heads=4), rngs=nnx.Rngs(0))


CASES: dict = {}


def case(name, error, message):
    """Register a call that must raise `error` with a message that matches."""

    def add(call):
        assert name not in CASES, name
        CASES[name] = (call, error, message)
        return call

    return add


def bad(name, error, message, call):
    case(name, error, message)(call)


# Prompts
G = World.generate
bad("no rows", ValueError, "no prompts.*at least one row", lambda w: G(w, []))
bad("no rows in an array", ValueError, "no prompts", lambda w: G(w, np.zeros((0, 3), int)))
bad("an empty row", ValueError, "prompt 1 is empty.*at least one", lambda w: G(w, [[1], []]))
bad("rows of no width", ValueError, "prompt 0 is empty", lambda w: G(w, np.zeros((2, 0), int)))
bad("an id too high", ValueError, "prompt 1 has token 11.*0 to 10", lambda w: G(w, [[1], [11]]))
bad("a negative id", ValueError, "prompt 0 has token -1.*0 to 10", lambda w: G(w, [[1, -1]]))
bad("padding as a token", ValueError, "token -1", lambda w: G(w, np.asarray([[1, 2], [3, -1]])))
bad("an id past int32", ValueError, "token 4294967297", lambda w: G(w, [[2**32 + 1]]))
bad("an id past int64", TypeError, "dtype object", lambda w: G(w, [[2**70]]))
bad("fractions", TypeError, "dtype float64.*integers", lambda w: G(w, [[1.0, 2.0]]))
bad("a float array", TypeError, "dtype float32.*integers", lambda w: G(w, jnp.ones((2, 3))))
bad("bools", TypeError, "dtype bool.*integers", lambda w: G(w, [[True, False]]))
bad("None among ids", TypeError, "dtype object.*integers", lambda w: G(w, [[1, None]]))
bad("texts among ids", TypeError, "integers", lambda w: G(w, [[1, "a"]]))
bad("a flat list", TypeError, r"prompt 0 is 1.*\[\[1, 2, 3\]\]", lambda w: G(w, [1, 2, 3]))
bad("a flat array", TypeError, r"shape \(3,\).*\[B, T\]", lambda w: G(w, np.arange(3)))
bad("three axes", TypeError, r"shape \(1, 1, 3\)", lambda w: G(w, np.ones((1, 1, 3), int)))
bad("rows in rows", TypeError, r"prompt 0 is .*shape \(1, 2\)", lambda w: G(w, [[[1, 2]]]))
bad("ragged in rows", TypeError, "prompt 0 holds lists of diff", lambda w: G(w, [[[1, 2], [3]]]))
bad("None", TypeError, "prompts of None.*list of rows", lambda w: G(w, None))
bad("None as a row", TypeError, "prompt 1 is None", lambda w: G(w, [[1], None]))
bad("a number", TypeError, "prompts of 5", lambda w: G(w, 5))
bad("a dictionary", TypeError, "prompts of .*list of rows", lambda w: G(w, {"a": [1]}))
bad("a generator", TypeError, "list of rows", lambda w: G(w, (row for row in PROMPTS)))
bad("a text alone", TypeError, "prompt 0 is a text.*pass lm instead", lambda w: G(w, "abc"))
bad("bytes", TypeError, "b'abc' as prompts", lambda w: G(w, b"abc"))
bad("bytes as a row", TypeError, "prompt 0 is b'abc'", lambda w: G(w, [b"abc"]))
bad("no tokenizer", TypeError, "prompt 0 is a text.*pass lm instead", lambda w: G(w, ["abc"]))


@case("prompts under jit", TypeError, "traced by jit.*jkv.prefill and jkv.rollout")
def _(w):
    jax.jit(lambda t: jnp.asarray(w.generate(t).tokens))(jnp.ones((2, 3), jnp.int32))


@case("an empty text", ValueError, "prompt 0 is empty")
def _(w):
    jkv.generate(w.lm, [""], max_new_tokens=4)


# How many
for shown, value in {
    "zero": 0,
    "negative": -3,
    "float": 4.0,
    "bool": True,
    "None": None,
    "text": "4",
    "NaN": math.nan,
}.items():
    bad(
        f"max_new_tokens {shown}",
        ValueError,
        "max_new_tokens got .*integer of at least 1",
        lambda w, value=value: G(w, max_new_tokens=value),
    )
bad(
    "over the context",
    ValueError,
    "prompt of 3 tokens and max_new_tokens=254 make 257.*context of 256; shorten",
    lambda w: G(w, max_new_tokens=254),
)
bad(
    "a prompt over the context",
    ValueError,
    "prompt of 300 tokens.*context of 256",
    lambda w: G(w, [[1] * 300]),
)
bad("slots too small", CacheFullError, "slots=5 cannot.*at least 6", lambda w: G(w, slots=5))
bad("no slots", ValueError, "slots got 0.*at least 1", lambda w: G(w, slots=0))
bad("half a slot", ValueError, "slots got 8.5", lambda w: G(w, slots=8.5))
bad("chunks of nothing", ValueError, "prefill_chunk got 0", lambda w: G(w, prefill_chunk=0))
bad("no chunk", ValueError, "prefill_chunk got None", lambda w: G(w, prefill_chunk=None))
bad("progress", TypeError, "progress got 3.*function", lambda w: G(w, progress=3))
bad("logprobs", TypeError, "return_logprobs got 'yes'", lambda w: G(w, return_logprobs="yes"))

# Models
M = jkv.generate
bad(
    "no model",
    TypeError,
    "got None as a model.*jkv.load",
    lambda w: M(None, PROMPTS, max_new_tokens=1),
)
bad("a name", TypeError, "got 'gpt2' as a model", lambda w: M("gpt2", PROMPTS, max_new_tokens=1))
bad("a config", TypeError, "as a model", lambda w: M(w.config, PROMPTS, max_new_tokens=1))
bad("a class", TypeError, "as a model", lambda w: M(Decoder, PROMPTS, max_new_tokens=1))

# Caches
bad("no kind's text", ValueError, "cache got 'window:x'", lambda w: G(w, cache="window:x"))
bad("a function as cache", TypeError, "cache got <function dense", lambda w: G(w, cache=jkv.dense))
bad("a class as cache", TypeError, "cache got <class", lambda w: G(w, cache=type(jkv.dense())))
bad("a used cache", TypeError, "already holds tokens.*resume=", lambda w: G(w, cache=w.cache))
bad("a number as cache", TypeError, "cache got 0", lambda w: G(w, cache=0))

# Resuming
R = {"max_new_tokens": 2}
bad("resume a cache", TypeError, "resume got Cache.*jkv.generate", lambda w: G(w, resume=w.cache))
bad("resume tokens", TypeError, "resume got ndarray", lambda w: G(w, resume=w.good.tokens))
bad("resume True", TypeError, "resume got bool", lambda w: G(w, resume=True))
bad(
    "resume and cache",
    ValueError,
    "leave cache= out",
    lambda w: G(w, resume=w.good, cache=jkv.dense()),
)
bad(
    "resume other rows",
    ValueError,
    r"3 prompts for 2 rows.*\[\] where there is nothing",
    lambda w: G(w, [[1]] * 3, resume=w.good),
)
bad(
    "resume with nothing",
    ValueError,
    "no prompts",
    lambda w: G(w, [], resume=w.good),
)
bad(
    "resume an id too high",
    ValueError,
    "prompt 1 has token 99",
    lambda w: G(w, [[], [99]], resume=w.good),
)
bad(
    "resume on another model",
    ValueError,
    "another model .layers 2 rather than 3, kv_heads 2 rather than 4",
    lambda w: M(w.other, PROMPTS, resume=w.good, **R),
)
bad(
    "resume over the context",
    ValueError,
    "context of 256",
    lambda w: G(w, [[1] * 250, []], resume=w.good, max_new_tokens=9),
)
bad(
    "resume with too few slots",
    CacheFullError,
    "slots=7 cannot.*at least",
    lambda w: G(w, resume=w.good, slots=7),
)

# Samplers and keys
HOT = sampling.temperature(0.8)
bad("no key", ValueError, r"needs key=jax.random.key\(seed\)", lambda w: G(w, sampler=HOT))
bad("a seed", TypeError, "key=0; expected jax.random.key", lambda w: G(w, sampler=HOT, key=0))
bad(
    "an old key",
    TypeError,
    "expected jax.random.key",
    lambda w: G(w, sampler=HOT, key=jax.random.PRNGKey(0)),
)
bad(
    "bits as a key",
    TypeError,
    "expected jax.random.key",
    lambda w: G(w, sampler=HOT, key=np.zeros(2, np.uint32)),
)
bad(
    "too many keys",
    ValueError,
    r"shape \(3,\).*one key, or 2",
    lambda w: G(w, sampler=HOT, key=jax.random.split(jax.random.key(0), 3)),
)
bad("a bad key unused", TypeError, "expected jax.random.key", lambda w: G(w, key="seed"))
bad("a number as sampler", TypeError, "0.8 as a sampler", lambda w: G(w, sampler=0.8))
bad("a name as sampler", TypeError, "'greedy' as a sampler", lambda w: G(w, sampler="greedy"))
bad(
    "a factory as sampler",
    TypeError,
    "as a sampler.*temperature",
    lambda w: G(w, sampler=sampling.greedy),
)
bad("a class as sampler", TypeError, "as a sampler", lambda w: G(w, sampler=sampling.Greedy))
bad("a list as sampler", TypeError, "as a sampler", lambda w: G(w, sampler=[HOT]))
bad(
    "no tree",
    TypeError,
    "sampler that holds .*register_dataclass",
    lambda w: G(w, sampler=NoTree(1.0), key=jax.random.key(0)),
)
bad("a chain of numbers", TypeError, "0.8 as a sampler", lambda w: sampling.chain(0.8))
bad("a chain of a list", TypeError, "as a sampler", lambda w: sampling.chain([HOT, HOT]))

for factory, least in (
    (sampling.temperature, "at least 0"),
    (sampling.top_p, "above 0 and at most 1"),
    (sampling.min_p, "above 0 and at most 1"),
    (sampling.repetition_penalty, "above 0"),
):
    values = [math.nan, math.inf, -math.inf, -0.5, None, "1", True, 1j, [0.5]]
    values += [] if factory is sampling.temperature else [0, 0.0, -0.0]
    values += [1.0000001, 2] if factory in (sampling.top_p, sampling.min_p) else []
    for value in values:
        bad(
            f"{factory.__name__} {value!r}",
            ValueError,
            f"{factory.__name__} got .*{least}",
            lambda w, factory=factory, value=value: factory(value),
        )
for value in (0, -1, 2.0, True, None, "5", math.nan):
    bad(
        f"top_k {value!r}",
        ValueError,
        "top_k got .*integer of at least 1",
        lambda w, value=value: sampling.top_k(value),
    )

# Samples
COLD = sampling.temperature(0)
KEY = jax.random.key(0)
for value in (0, -1, 2.0, True, None, "2"):
    bad(
        f"samples {value!r}",
        ValueError,
        "samples got .*integer of at least 1",
        lambda w, value=value: G(w, samples=value, sampler=HOT, key=KEY),
    )
bad("samples all the same", ValueError, "samples=2 of a sampler.*key", lambda w: G(w, samples=2))
bad("cold samples", ValueError, "be the same", lambda w: G(w, samples=2, sampler=COLD, key=KEY))
bad(
    "a key per prompt only",
    ValueError,
    r"shape \(2,\).*one key, or 4",
    lambda w: G(w, samples=2, sampler=HOT, key=jax.random.split(KEY, 2)),
)
bad(
    "stops of each sample",
    ValueError,
    "4 entries.*or 2 lists",
    lambda w: G(w, samples=2, sampler=HOT, key=KEY, stop=[[1]] * 4),
)

# Drafts
LOOKUP = jkv.prompt_lookup()
for value in (0, 1.5, True, None):
    bad(
        f"prompt_lookup of {value!r}-grams",
        ValueError,
        "prompt_lookup's ngram got .*at least 1",
        lambda w, value=value: jkv.prompt_lookup(ngram=value),
    )
bad("looking up nothing", ValueError, "tokens got 0", lambda w: jkv.prompt_lookup(tokens=0))
bad("a number as draft", TypeError, "draft got 8; expected jkv.prompt", lambda w: G(w, draft=8))
bad("a name as draft", TypeError, "draft got 'lookup'", lambda w: G(w, draft="lookup"))
bad("a class as draft", TypeError, "draft got <class", lambda w: G(w, draft=type(LOOKUP)))
bad("a draft of floats", TypeError, r"proposed float32\[2, 3\]", lambda w: G(w, draft=floats))
bad("a draft of one", TypeError, r"proposed int32\[2\].*\[2, k\]", lambda w: G(w, draft=flat))
bad("a draft of none", TypeError, "proposed NoneType", lambda w: G(w, draft=lambda h, n: None))
bad("an unhashable draft", TypeError, "neither hashable", lambda w: G(w, draft=Mutable()))
bad(
    "a draft of no tokens",
    TypeError,
    r"proposed int32\[2, 0\]",
    lambda w: G(w, draft=lambda history, lengths: history[:, :0]),
)
bad(
    "a draft with a memory",
    ValueError,
    "remembers.*penalties",
    lambda w: G(w, draft=LOOKUP, sampler=sampling.repetition_penalty(2.0), key=KEY),
)
bad(
    "a draft in a window",
    UnsupportedError,
    "draft proposes.*inside the decode loop.*jkv.dense",
    lambda w: G(w, draft=LOOKUP, cache=jkv.window(4)),
)

# Beams
B = {"max_new_tokens": 2}


def beams(w, prompts=PROMPTS, **kwargs):
    return jkv.beam_search(w.model, prompts, **{"max_new_tokens": 2, **kwargs})


for value in (0, -1, 2.0, True, None):
    bad(
        f"beams {value!r}",
        ValueError,
        "beams got .*integer of at least 1",
        lambda w, value=value: beams(w, beams=value),
    )
for value in (math.nan, math.inf, "1", None, True):
    bad(
        f"length_penalty {value!r}",
        ValueError,
        "length_penalty got .*finite number",
        lambda w, value=value: beams(w, length_penalty=value),
    )
bad("too many beams", ValueError, "beams got 12.*at most 11", lambda w: beams(w, beams=12))
bad("never", TypeError, "early_stopping got 'never'", lambda w: beams(w, early_stopping="never"))
bad("beams of no tokens", ValueError, "max_new_tokens got 0", lambda w: beams(w, max_new_tokens=0))
bad("beams without prompts", ValueError, "no prompts", lambda w: beams(w, []))
bad("beams in a list", TypeError, r"prompt 0 is 1.*\[\[1, 2, 3\]\]", lambda w: beams(w, [1, 2, 3]))
bad("beams in no cache", ValueError, "cache got 'window:x'", lambda w: beams(w, cache="window:x"))
bad("beams without room", CacheFullError, "slots=3", lambda w: beams(w, slots=3))
bad("beams over the context", ValueError, "context of 256", lambda w: beams(w, [[1] * 255]))
bad("beams of no model", TypeError, "as a model", lambda w: jkv.beam_search(None, PROMPTS, **B))
bad(
    "beams to a string",
    ValueError,
    "stop got the string 'ab'.*token ids only",
    lambda w: jkv.beam_search(w.lm, PROMPTS, stop=["ab"], **B),
)

# Stops
bad("a stop too high", ValueError, "stop got token 11.*0 to 10", lambda w: G(w, stop=11))
bad("a negative stop", ValueError, "stop got token -1", lambda w: G(w, stop=[-1]))
bad("half a stop", TypeError, "stop got 1.5", lambda w: G(w, stop=1.5))
bad("half a stop in a list", TypeError, "stop got 1.5.*id or a string", lambda w: G(w, stop=[1.5]))
bad("a stop of None", TypeError, "stop got None", lambda w: G(w, stop=[None]))
bad("a stop of True", TypeError, "stop got True", lambda w: G(w, stop=True))
bad("stops in a set", TypeError, "stop got {1, 2}.*one list", lambda w: G(w, stop={1, 2}))
bad("stop bytes", TypeError, r"stop got b'\\x01'", lambda w: G(w, stop=b"\x01"))
bad("stop bytes in a list", TypeError, r"stop got b'\\x01'", lambda w: G(w, stop=[b"\x01"]))
bad("stops for other rows", ValueError, "3 entries.*or 2 lists", lambda w: G(w, stop=[[1]] * 3))
bad("stops for some rows", ValueError, "2 entries, 1 of them lists", lambda w: G(w, stop=[[1], 2]))
bad("stops too deep", TypeError, r"stop got \[1\]", lambda w: G(w, stop=[[[1]], []]))
bad("no text", ValueError, "empty string", lambda w: w.text(stop=["a", ""]))
bad("no Unicode", ValueError, "stop got.*not valid Unicode", lambda w: w.text(stop=["a", "\ud800"]))
bad(
    "stops for one row",
    ValueError,
    "or 1 list, one per",
    lambda w: G(w, prompts=[[1]], stop=[[1], [2]]),
)
bad("stop text alone", ValueError, "stop strings need.*pass lm", lambda w: G(w, stop="a"))
bad("a float array of stops", TypeError, "stop got 1.0", lambda w: G(w, stop=np.ones(2)))

# The pure functions
TOKENS = jnp.ones((2, 3), jnp.int32)
bad(
    "prefill a list",
    TypeError,
    "tokens of type list",
    lambda w: jkv.prefill(w.model, PROMPTS, w.cache),
)
bad(
    "prefill floats",
    TypeError,
    "tokens of dtype float32; expected integers",
    lambda w: jkv.prefill(w.model, jnp.ones((2, 3)), w.cache),
)
bad(
    "prefill one row",
    ValueError,
    r"tokens of shape \[3\]; expected integers \[2, any\]",
    lambda w: jkv.prefill(w.model, TOKENS[0], w.cache),
)
bad(
    "prefill other rows",
    ValueError,
    r"tokens of shape \[3, 2\].*as many rows as the cache",
    lambda w: jkv.prefill(w.model, TOKENS.T, w.cache),
)
bad(
    "prefill nothing",
    ValueError,
    r"tokens of shape \[2, 0\]",
    lambda w: jkv.prefill(w.model, TOKENS[:, :0], w.cache),
)
bad(
    "prefill without a cache",
    TypeError,
    "prefill got NoneType as a cache.*jkv.init_cache",
    lambda w: jkv.prefill(w.model, TOKENS, None),
)
bad(
    "prefill a kind",
    TypeError,
    "prefill got DenseKind as a cache",
    lambda w: jkv.prefill(w.model, TOKENS, jkv.dense()),
)
bad(
    "prefill an lm",
    TypeError,
    "expected a decoder, as lm.model is",
    lambda w: jkv.prefill(w.lm, TOKENS, w.cache),
)
bad(
    "prefill with one count",
    TypeError,
    "counts of type int",
    lambda w: jkv.prefill(w.model, TOKENS, w.cache, 3),
)
bad(
    "prefill with other counts",
    ValueError,
    r"counts of shape \[3\]; expected integers \[2\]",
    lambda w: jkv.prefill(w.model, TOKENS, w.cache, jnp.ones(3, jnp.int32)),
)
bad(
    "a step of two tokens",
    ValueError,
    r"decode_step got token of shape \[2, 3\]",
    lambda w: jkv.decode_step(w.model, TOKENS, w.cache),
)
bad(
    "a step of floats",
    TypeError,
    "decode_step got token of dtype float32",
    lambda w: jkv.decode_step(w.model, jnp.ones(2), w.cache),
)
bad(
    "a step with integers for flags",
    TypeError,
    "active of dtype int32; expected bools",
    lambda w: jkv.decode_step(w.model, TOKENS[:, 0], w.cache, TOKENS[:, 0]),
)
for value in (0, -1, 2.0, True, None):
    bad(
        f"a rollout of {value!r} steps",
        ValueError,
        "steps got .*integer of at least 1",
        lambda w, value=value: jkv.rollout(w.model, w.logits, w.cache, steps=value),
    )


@case("a rollout of traced steps", ValueError, "steps got .*integer")
def _(w):
    jax.jit(lambda n: jkv.rollout(w.model, w.logits, w.cache, steps=n))(3)


def roll(w, **kwargs):
    logits, cache = kwargs.pop("logits", w.logits), kwargs.pop("cache", w.cache)
    return jkv.rollout(w.model, logits, cache, **{"steps": 2, **kwargs})


bad("a rollout of tokens", TypeError, "logits of dtype int32", lambda w: roll(w, logits=TOKENS))
bad(
    "other logits",
    ValueError,
    r"logits of shape \[3, 11\]",
    lambda w: roll(w, logits=jnp.ones((3, 11))),
)
bad("a rollout alone", TypeError, "rollout got NoneType as a cache", lambda w: roll(w, cache=None))
bad("ends in a list", TypeError, "ends of type list", lambda w: roll(w, ends=[[1], [2]]))
bad("flat ends", ValueError, r"ends of shape \[2\]", lambda w: roll(w, ends=jnp.ones(2, jnp.int32)))
bad("a rollout without a key", ValueError, "needs key", lambda w: roll(w, sampler=HOT))
bad("said by others", ValueError, r"said of shape \[3, 2\]", lambda w: roll(w, said=TOKENS.T))

# Models and caches
bad(
    "a cache of other heads",
    ValueError,
    "holds 2 heads of 8 dimensions, and the model makes 4 of 8",
    lambda w: jkv.prefill(w.heads, TOKENS, w.cache),
)
bad(
    "a cache of other layers",
    ValueError,
    "the cache has 2 layers and the model 3",
    lambda w: jkv.prefill(w.other, TOKENS, w.cache),
)
bad(
    "no cache of other layers",
    ValueError,
    "the cache has 2 layers and the model 3",
    lambda w: jkv.prefill(w.other, TOKENS, w.plain.cache),
)
bad(
    "a model and other rows",
    ValueError,
    "the cache has 2 rows and the tokens 3.*batch=",
    lambda w: w.model(TOKENS.T, w.cache),
)

new_cache = jkv.init_cache
for name, value in {"batch": 0, "slots": -1}.items():
    bad(
        f"init_cache {name} {value}",
        ValueError,
        f"init_cache got {name}={value}; expected an integer of at least 1",
        lambda w, kw={"batch": 2, "slots": 8, name: value}: new_cache(w.config, **kw),
    )
bad("half a batch", ValueError, "batch=1.5", lambda w: new_cache(w.config, batch=1.5, slots=8))
bad("true slots", ValueError, "slots=True", lambda w: new_cache(w.config, batch=2, slots=True))
bad(
    "init_cache a model",
    TypeError,
    "pass its .config",
    lambda w: new_cache(w.model, batch=2, slots=8),
)
bad("init_cache nothing", TypeError, "a NoneType", lambda w: new_cache(None, batch=2, slots=8))
bad(
    "init_cache a text",
    ValueError,
    "got 'window:x'",
    lambda w: new_cache(w.config, "window:x", batch=2, slots=8),
)
bad(
    "init_cache a factory",
    TypeError,
    "kind=<function",
    lambda w: new_cache(w.config, jkv.dense, batch=2, slots=8),
)
bad(
    "init_cache of integers",
    ValueError,
    "dtype=int32; expected a floating",
    lambda w: new_cache(w.config, batch=2, slots=8, dtype="int32"),
)
bad(
    "init_cache of what",
    TypeError,
    "dtype='float7'",
    lambda w: new_cache(w.config, batch=2, slots=8, dtype="float7"),
)

# The algebra of caches
bad("crop to less than nothing", ValueError, "crop got a negative", lambda w: w.cache.crop(-1))
bad("crop to half", ValueError, "crop got lengths of .*float", lambda w: w.cache.crop(1.5))
bad(
    "crop other rows",
    ValueError,
    r"shape \(3,\).*each of 2 rows",
    lambda w: w.cache.crop([1, 2, 3]),
)
bad("crop to None", ValueError, "crop got", lambda w: w.cache.crop(None))
bad(
    "take what is not there",
    ValueError,
    r"rows \[2\]; expected numbers 0 to 1",
    lambda w: w.cache.take([2]),
)
bad("take from the end", ValueError, r"rows \[-1\]", lambda w: w.cache.take([-1]))
bad("take nothing", ValueError, "take got rows of shape", lambda w: w.cache.take([]))
bad("take one", ValueError, r"take got rows of shape \(\)", lambda w: w.cache.take(0))
bad("take by flags", ValueError, "dtype bool", lambda w: w.cache.take([True, False]))
bad("too small", CacheFullError, "resize got 3 slots.*crop them", lambda w: w.cache.resize(3))
bad("resize to nothing", ValueError, "slots=0", lambda w: w.cache.resize(0))
bad("resize to half", ValueError, "slots=9.5", lambda w: w.cache.resize(9.5))
bad("concat nothing", ValueError, "concat got no caches", lambda w: jkv.concat([]))
bad("concat one", TypeError, "expected a list of caches", lambda w: jkv.concat(w.cache))
bad("concat others", TypeError, "expected a list of caches", lambda w: jkv.concat([w.cache, 1]))
bad(
    "concat kinds",
    ValueError,
    "different kinds or shapes",
    lambda w: jkv.concat([w.cache, w.plain.cache]),
)
bad("none has no keys", UnsupportedError, "keeps no keys", lambda w: w.plain.cache.to_legacy())
bad("from nothing", ValueError, "from_legacy got no layers", lambda w: jkv.from_legacy([]))
bad(
    "from keys only",
    ValueError,
    r"layer 0 with keys \(2, 2, 5, 8\) and values \(2, 2, 5\)",
    lambda w: jkv.from_legacy([(jnp.zeros((2, 2, 5, 8)), jnp.zeros((2, 2, 5)))]),
)
bad(
    "from other rows",
    ValueError,
    r"different \(B, S\)",
    lambda w: jkv.from_legacy([*w.tree(), (jnp.zeros((1, 2, 5, 8)), jnp.zeros((1, 2, 5, 8)))]),
)
bad(
    "from too long rows",
    ValueError,
    r"lengths \[6, 1\]; expected 2 integers from 0 to 5",
    lambda w: jkv.from_legacy(w.tree(), [6, 1]),
)
bad(
    "from rows without lengths",
    ValueError,
    "expected 2 integers",
    lambda w: jkv.from_legacy(w.tree(), [1]),
)

# Configurations
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
for name, value in (
    ("vocab", 0),
    ("layers", -1),
    ("heads", True),
    ("context", -256),
):
    bad(
        f"Config {name} {value}",
        ValueError,
        f"Config got {name}={value}; expected an integer of at least 1",
        lambda w, kw={**SIZES, name: value}: Config(**kw),
    )
bad(
    "Config groups",
    ValueError,
    "4 heads over 3 kv_heads",
    lambda w: Config(**{**SIZES, "kv_heads": 3}),
)
bad("Config windows", ValueError, "1 window for 2 layers", lambda w: Config(**SIZES, windows=(4,)))
bad(
    "Config rope",
    ValueError,
    "rope over 16 dim.*even",
    lambda w: Config(**SIZES, rope=Rope(dims=16)),
)
bad("Config odd rope", ValueError, "rope over 7", lambda w: Config(**SIZES, rope=Rope(dims=7)))

# Loading
bad("load nowhere", CheckpointError, "nowhere/at/all", lambda w: jkv.load("./nowhere/at/all"))
bad("load nothing", ValueError, "load got ''; expected.*hub id", lambda w: jkv.load(""))
bad("load as integers", ValueError, "dtype='int8'", lambda w: jkv.load("./nowhere", dtype="int8"))

# Attention
K = jnp.ones((2, 2, 5, 8))
Q = jnp.ones((2, 1, 4, 8))
AT = jnp.full((2, 1), 4)


def attend(q=Q, k=K, v=K, positions=AT, **kwargs):
    spec = jkv.ops.AttentionSpec(0.3, kwargs.pop("window", None))
    return jkv.ops.attention(q, jkv.ops.ContiguousKV(k, v), positions, spec, **kwargs)


bad(
    "heads",
    ValueError,
    "4 query heads over 3",
    lambda w: attend(k=jnp.ones((2, 3, 5, 8)), v=jnp.ones((2, 3, 5, 8))),
)
bad("no window", ValueError, "window=0; expected at least 1", lambda w: attend(window=0))
bad(
    "no implementation",
    UnsupportedError,
    "implementation='triton'; expected one of",
    lambda w: attend(implementation="triton"),
)
bad("merge nothing", ValueError, "merge got no partial", lambda w: jkv.ops.merge())


@pytest.mark.parametrize("name", CASES)
def test_bad_input(world, other_heads, name):
    call, error, message = CASES[name]
    world.heads = other_heads
    with pytest.raises(error, match=message) as caught:
        call(world)
    # Ours, and not a subclass by chance from somewhere deep: the last frame is jkv's.
    assert "jkv" in str(caught.traceback[-1].path), caught.traceback[-1]
    assert len(str(caught.value)) < 400


def test_there_are_enough_of_them():
    assert len(CASES) >= 60


def test_all_is_as_before(world):
    """After all the mistakes above (and whenever this runs): the same tokens, the same cache."""
    assert oracle.said(world.generate()) == world.want
    oracle.check_cache(world.model, world.good)
    more = world.generate([[5], []], resume=world.good)
    for row, new in enumerate(([5], [])):
        before = [*PROMPTS[row], *world.want[row], *new]
        assert more.tokens[row].tolist() == oracle.greedy(world.model, before, 4)


def test_good_calls_beside_the_bad_ones(world):
    """The positive twins of what is refused above only for a detail."""
    world.generate(np.asarray([[1, 10], [0, 2]]), max_new_tokens=np.int64(2))
    world.generate(stop=np.asarray([0, 10]))
    world.generate(stop=[[1], []])
    world.text(stop=["a", "b"])
    world.generate(key=jax.random.split(jax.random.key(0), 2), sampler=HOT)
    world.generate(sampler=HOT, key=jax.random.split(KEY, 4), samples=2, stop=[[1], []])
    world.generate(draft=lambda history, lengths: history[:, :2])
    jkv.beam_search(world.lm, PROMPTS, stop=3, beams=11, **B)
    world.cache.take(np.asarray([1, 1, 0])).crop([1, 0, 2]).resize(9)
    attend(window=1)
