"""What people get wrong in samplers, keys, samples, drafts, beams and stops."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

import jkv
from jkv import sampling
from jkv.errors import CacheFullError, UnsupportedError
from tests.decoding.mistakes.table import PROMPTS, keywords, refuse, table


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


HOT, COLD = sampling.temperature(0.8), sampling.temperature(0)
KEY = jax.random.key(0)
LOOKUP = jkv.prompt_lookup()

GENERATE = [
    # Samplers and keys
    ("no key", {"sampler": HOT}, ValueError, r"needs key=jax.random.key\(seed\)"),
    ("a seed", {"sampler": HOT, "key": 0}, TypeError, "key=0; expected jax.random.key"),
    (
        "an old key",
        {"sampler": HOT, "key": jax.random.PRNGKey(0)},
        TypeError,
        "expected jax.random.key",
    ),
    (
        "bits as a key",
        {"sampler": HOT, "key": np.zeros(2, np.uint32)},
        TypeError,
        "expected jax.random.key",
    ),
    (
        "too many keys",
        {"sampler": HOT, "key": jax.random.split(jax.random.key(0), 3)},
        ValueError,
        r"shape \(3,\).*one key, or 2",
    ),
    ("a bad key unused", {"key": "seed"}, TypeError, "expected jax.random.key"),
    ("a number as sampler", {"sampler": 0.8}, TypeError, "0.8 as a sampler"),
    ("a name as sampler", {"sampler": "greedy"}, TypeError, "'greedy' as a sampler"),
    ("a factory as sampler", {"sampler": sampling.greedy}, TypeError, "as a sampler.*temperature"),
    ("a class as sampler", {"sampler": sampling.Greedy}, TypeError, "as a sampler"),
    ("a list as sampler", {"sampler": [HOT]}, TypeError, "as a sampler"),
    (
        "no tree",
        {"sampler": NoTree(1.0), "key": jax.random.key(0)},
        TypeError,
        "sampler that holds .*register_dataclass",
    ),
    # Samples
    ("samples all the same", {"samples": 2}, ValueError, "samples=2 of a sampler.*key"),
    ("cold samples", {"samples": 2, "sampler": COLD, "key": KEY}, ValueError, "be the same"),
    (
        "a key per prompt only",
        {"samples": 2, "sampler": HOT, "key": jax.random.split(KEY, 2)},
        ValueError,
        r"shape \(2,\).*one key, or 4",
    ),
    (
        "stops of each sample",
        {"samples": 2, "sampler": HOT, "key": KEY, "stop": [[1]] * 4},
        ValueError,
        "4 entries.*or 2 lists",
    ),
    *(
        (
            f"samples={value!r}",
            {"samples": value, "sampler": HOT, "key": KEY},
            ValueError,
            "samples got .*integer of at least 1",
        )
        for value in (0, -1, 2.0, True, None, "2")
    ),
    # Drafts
    ("a number as draft", {"draft": 8}, TypeError, "draft got 8; expected jkv.prompt"),
    ("a name as draft", {"draft": "lookup"}, TypeError, "draft got 'lookup'"),
    ("a class as draft", {"draft": type(LOOKUP)}, TypeError, "draft got <class"),
    ("a draft of floats", {"draft": floats}, TypeError, r"proposed float32\[2, 3\]"),
    ("a draft of one", {"draft": flat}, TypeError, r"proposed int32\[2\].*\[2, k\]"),
    ("a draft of none", {"draft": lambda h, n: None}, TypeError, "proposed NoneType"),
    ("an unhashable draft", {"draft": Mutable()}, TypeError, "neither hashable"),
    (
        "a draft of no tokens",
        {"draft": lambda history, lengths: history[:, :0]},
        TypeError,
        r"proposed int32\[2, 0\]",
    ),
    (
        "a draft with a memory",
        {"draft": LOOKUP, "sampler": sampling.repetition_penalty(2.0), "key": KEY},
        ValueError,
        "remembers.*penalties",
    ),
    (
        "a draft in a window",
        {"draft": LOOKUP, "cache": jkv.window(4)},
        UnsupportedError,
        "draft proposes.*inside the decode loop.*jkv.dense",
    ),
    # Stops
    ("a stop too high", {"stop": 11}, ValueError, "stop got token 11.*0 to 10"),
    ("a negative stop", {"stop": [-1]}, ValueError, "stop got token -1"),
    ("half a stop", {"stop": 1.5}, TypeError, "stop got 1.5"),
    ("half a stop in a list", {"stop": [1.5]}, TypeError, "stop got 1.5.*id or a string"),
    ("a stop of None", {"stop": [None]}, TypeError, "stop got None"),
    ("a stop of True", {"stop": True}, TypeError, "stop got True"),
    ("stops in a set", {"stop": {1, 2}}, TypeError, "stop got {1, 2}.*one list"),
    ("stop bytes", {"stop": b"\x01"}, TypeError, r"stop got b'\\x01'"),
    ("stop bytes in a list", {"stop": [b"\x01"]}, TypeError, r"stop got b'\\x01'"),
    ("stops for other rows", {"stop": [[1]] * 3}, ValueError, "3 entries.*or 2 lists"),
    ("stops for some rows", {"stop": [[1], 2]}, ValueError, "2 entries, 1 of them lists"),
    ("stops too deep", {"stop": [[[1]], []]}, TypeError, r"stop got \[1\]"),
    ("stops for one row", {"prompts": [[1]], "stop": [[1], [2]]}, ValueError, "or 1 list, one per"),
    ("stop text alone", {"stop": "a"}, ValueError, "stop strings need.*pass lm"),
    ("a float array of stops", {"stop": np.ones(2)}, TypeError, "stop got 1.0"),
]

BEAMS = [
    ("too many beams", {"beams": 12}, ValueError, "beams got 12.*at most 11"),
    ("never", {"early_stopping": "never"}, TypeError, "early_stopping got 'never'"),
    ("beams of no tokens", {"max_new_tokens": 0}, ValueError, "max_new_tokens got 0"),
    ("beams without prompts", {"prompts": []}, ValueError, "no prompts"),
    ("beams in a list", {"prompts": [1, 2, 3]}, TypeError, r"prompt 0 is 1.*\[\[1, 2, 3\]\]"),
    ("beams in no cache", {"cache": "window:x"}, ValueError, "cache got 'window:x'"),
    ("beams without room", {"slots": 3}, CacheFullError, "slots=3"),
    ("beams over the context", {"prompts": [[1] * 255]}, ValueError, "context of 256"),
    *(
        (f"beams={value}", {"beams": value}, ValueError, "beams got .*integer of at least 1")
        for value in (0, -1, 2.0, True, None)
    ),
    *(
        (f"length_penalty={value!r}", {"length_penalty": value}, ValueError, "finite number")
        for value in (math.nan, math.inf, "1", None, True)
    ),
]

CALLS = [
    ("a chain of numbers", lambda w: sampling.chain(0.8), TypeError, "0.8 as a sampler"),
    ("a chain of a list", lambda w: sampling.chain([HOT, HOT]), TypeError, "as a sampler"),
    ("looking up nothing", lambda w: jkv.prompt_lookup(tokens=0), ValueError, "tokens got 0"),
    (
        "beams of no model",
        lambda w: jkv.beam_search(None, PROMPTS, max_new_tokens=2),
        TypeError,
        "as a model",
    ),
    (
        "beams to a string",
        lambda w: jkv.beam_search(w.lm, PROMPTS, stop=["ab"], max_new_tokens=2),
        ValueError,
        "stop got the string 'ab'.*token ids only",
    ),
    ("no text", lambda w: w.text(stop=["a", ""]), ValueError, "empty string"),
    (
        "no Unicode",
        lambda w: w.text(stop=["a", "\ud800"]),
        ValueError,
        "stop got.*not valid Unicode",
    ),
    *(
        (f"{value}-grams", lambda w, n=value: jkv.prompt_lookup(ngram=n), ValueError, "ngram got")
        for value in (0, 1.5, True, None)
    ),
]

# A factory, what it expects, and values that it refuses beside those that all of them do.
FACTORIES = [
    (sampling.temperature, "at least 0", []),
    (sampling.top_p, "above 0 and at most 1", [0, 0.0, -0.0, 1.0000001, 2]),
    (sampling.min_p, "above 0 and at most 1", [0, 0.0, -0.0, 1.0000001, 2]),
    (sampling.repetition_penalty, "above 0", [0, 0.0, -0.0]),
    (sampling.top_k, "integer of at least 1", [0, -1, 2.0]),
]
PARAMETERS = [
    (
        f"{factory.__name__} {value!r}",
        lambda w, factory=factory, value=value: factory(value),
        ValueError,
        f"{factory.__name__} got .*{least}",
    )
    for factory, least, values in FACTORIES
    for value in [math.nan, math.inf, -math.inf, -0.5, None, "1", True, 1j, [0.5], *values]
]


@table(GENERATE)
def test_generate(world, how, error, message):
    refuse(lambda: world.generate(**keywords(world, how)), error, message)


@table(BEAMS)
def test_beams(world, how, error, message):
    refuse(lambda: world.beam_search(**how), error, message)


@table(CALLS + PARAMETERS)
def test_calls(world, how, error, message):
    refuse(lambda: how(world), error, message)


def test_all_is_as_before(world):
    world.check_unchanged()


def test_good_calls_beside_the_bad_ones(world):
    """The positive twins of what is refused above only for a detail."""
    world.generate(stop=np.asarray([0, 10]))
    world.generate(stop=[[1], []])
    world.text(stop=["a", "b"])
    world.generate(key=jax.random.split(jax.random.key(0), 2), sampler=HOT)
    world.generate(sampler=HOT, key=jax.random.split(KEY, 4), samples=2, stop=[[1], []])
    world.generate(draft=lambda history, lengths: history[:, :2])
    jkv.beam_search(world.lm, PROMPTS, stop=3, beams=11, max_new_tokens=2)
