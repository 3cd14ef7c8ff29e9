"""What people get wrong in prompts, numbers, models and caches, and what they are told."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

import jkv
from jkv.errors import CacheFullError
from jkv.models import Decoder
from tests.decoding.mistakes.table import PROMPTS, keywords, refuse, table

GENERATE = [
    # Prompts
    ("no rows", {"prompts": []}, ValueError, "no prompts.*at least one row"),
    ("no rows in an array", {"prompts": np.zeros((0, 3), int)}, ValueError, "no prompts"),
    ("an empty row", {"prompts": [[1], []]}, ValueError, "prompt 1 is empty.*at least one"),
    ("rows of no width", {"prompts": np.zeros((2, 0), int)}, ValueError, "prompt 0 is empty"),
    ("an id too high", {"prompts": [[1], [11]]}, ValueError, "prompt 1 has token 11.*0 to 10"),
    ("a negative id", {"prompts": [[1, -1]]}, ValueError, "prompt 0 has token -1.*0 to 10"),
    ("padding as a token", {"prompts": np.asarray([[1, 2], [3, -1]])}, ValueError, "token -1"),
    ("an id past int32", {"prompts": [[2**32 + 1]]}, ValueError, "token 4294967297"),
    ("an id past int64", {"prompts": [[2**70]]}, TypeError, "dtype object"),
    ("fractions", {"prompts": [[1.0, 2.0]]}, TypeError, "dtype float64.*integers"),
    ("a float array", {"prompts": jnp.ones((2, 3))}, TypeError, "dtype float32.*integers"),
    ("bools", {"prompts": [[True, False]]}, TypeError, "dtype bool.*integers"),
    ("None among ids", {"prompts": [[1, None]]}, TypeError, "dtype object.*integers"),
    ("texts among ids", {"prompts": [[1, "a"]]}, TypeError, "integers"),
    ("a flat list", {"prompts": [1, 2, 3]}, TypeError, r"prompt 0 is 1.*\[\[1, 2, 3\]\]"),
    ("a flat array", {"prompts": np.arange(3)}, TypeError, r"shape \(3,\).*\[B, T\]"),
    ("three axes", {"prompts": np.ones((1, 1, 3), int)}, TypeError, r"shape \(1, 1, 3\)"),
    ("rows in rows", {"prompts": [[[1, 2]]]}, TypeError, r"prompt 0 is .*shape \(1, 2\)"),
    ("ragged in rows", {"prompts": [[[1, 2], [3]]]}, TypeError, "prompt 0 holds lists of diff"),
    ("None", {"prompts": None}, TypeError, "prompts of None.*list of rows"),
    ("None as a row", {"prompts": [[1], None]}, TypeError, "prompt 1 is None"),
    ("a number", {"prompts": 5}, TypeError, "prompts of 5"),
    ("a dictionary", {"prompts": {"a": [1]}}, TypeError, "prompts of .*list of rows"),
    ("a generator", {"prompts": (row for row in PROMPTS)}, TypeError, "list of rows"),
    ("a text alone", {"prompts": "abc"}, TypeError, "prompt 0 is a text.*pass lm instead"),
    ("bytes", {"prompts": b"abc"}, TypeError, "b'abc' as prompts"),
    ("bytes as a row", {"prompts": [b"abc"]}, TypeError, "prompt 0 is b'abc'"),
    ("no tokenizer", {"prompts": ["abc"]}, TypeError, "prompt 0 is a text.*pass lm instead"),
    # How many
    (
        "over the context",
        {"max_new_tokens": 254},
        ValueError,
        "prompt of 3 tokens and max_new_tokens=254 make 257.*context of 256; shorten",
    ),
    (
        "a prompt over the context",
        {"prompts": [[1] * 300]},
        ValueError,
        "prompt of 300 tokens.*context of 256",
    ),
    ("slots too small", {"slots": 5}, CacheFullError, "slots=5 cannot.*at least 6"),
    ("no slots", {"slots": 0}, ValueError, "slots got 0.*at least 1"),
    ("half a slot", {"slots": 8.5}, ValueError, "slots got 8.5"),
    ("chunks of nothing", {"prefill_chunk": 0}, ValueError, "prefill_chunk got 0"),
    ("no chunk", {"prefill_chunk": None}, ValueError, "prefill_chunk got None"),
    ("progress", {"progress": 3}, TypeError, "progress got 3.*function"),
    ("logprobs", {"return_logprobs": "yes"}, TypeError, "return_logprobs got 'yes'"),
    *(
        (f"max_new_tokens={value}", {"max_new_tokens": value}, ValueError, "integer of at least 1")
        for value in (0, -3, 4.0, True, None, "4", math.nan)
    ),
    # Caches
    ("no kind's text", {"cache": "window:x"}, ValueError, "cache got 'window:x'"),
    ("a function as cache", {"cache": jkv.dense}, TypeError, "cache got <function dense"),
    ("a class as cache", {"cache": type(jkv.dense())}, TypeError, "cache got <class"),
    ("a used cache", lambda w: {"cache": w.cache}, TypeError, "already holds tokens.*resume="),
    ("a number as cache", {"cache": 0}, TypeError, "cache got 0"),
    # Resuming
    ("resume a cache", lambda w: {"resume": w.cache}, TypeError, "resume got Cache.*jkv.generate"),
    ("resume tokens", lambda w: {"resume": w.good.tokens}, TypeError, "resume got ndarray"),
    ("resume True", {"resume": True}, TypeError, "resume got bool"),
    (
        "resume and cache",
        lambda w: {"resume": w.good, "cache": jkv.dense()},
        ValueError,
        "leave cache= out",
    ),
    (
        "resume other rows",
        lambda w: {"prompts": [[1]] * 3, "resume": w.good},
        ValueError,
        r"3 prompts for 2 rows.*\[\] where there is nothing",
    ),
    ("resume with nothing", lambda w: {"prompts": [], "resume": w.good}, ValueError, "no prompts"),
    (
        "resume an id too high",
        lambda w: {"prompts": [[], [99]], "resume": w.good},
        ValueError,
        "prompt 1 has token 99",
    ),
    (
        "resume over the context",
        lambda w: {"prompts": [[1] * 250, []], "resume": w.good, "max_new_tokens": 9},
        ValueError,
        "context of 256",
    ),
    (
        "resume with too few slots",
        lambda w: {"resume": w.good, "slots": 7},
        CacheFullError,
        "slots=7 cannot.*at least",
    ),
]

CALLS = [
    (
        "an empty text",
        lambda w: jkv.generate(w.lm, [""], max_new_tokens=4),
        ValueError,
        "prompt 0 is empty",
    ),
    (
        "prompts under jit",
        lambda w: jax.jit(lambda t: jnp.asarray(w.generate(t).tokens))(jnp.ones((2, 3), jnp.int32)),
        TypeError,
        "traced by jit.*jkv.prefill and jkv.rollout",
    ),
    # Models
    (
        "no model",
        lambda w: jkv.generate(None, PROMPTS, max_new_tokens=1),
        TypeError,
        "got None as a model.*jkv.load",
    ),
    (
        "a name",
        lambda w: jkv.generate("gpt2", PROMPTS, max_new_tokens=1),
        TypeError,
        "got 'gpt2' as a model",
    ),
    (
        "a config",
        lambda w: jkv.generate(w.config, PROMPTS, max_new_tokens=1),
        TypeError,
        "as a model",
    ),
    (
        "a class",
        lambda w: jkv.generate(Decoder, PROMPTS, max_new_tokens=1),
        TypeError,
        "as a model",
    ),
    # Resuming
    (
        "resume on another model",
        lambda w: jkv.generate(w.other, PROMPTS, resume=w.good, max_new_tokens=2),
        ValueError,
        "another model .layers 2 rather than 3, kv_heads 2 rather than 4",
    ),
]


@table(GENERATE)
def test_generate(world, how, error, message):
    refuse(lambda: world.generate(**keywords(world, how)), error, message)


@table(CALLS)
def test_calls(world, how, error, message):
    refuse(lambda: how(world), error, message)


def test_all_is_as_before(world):
    world.check_unchanged()


def test_good_calls_beside_the_bad_ones(world):
    """The positive twins of what is refused above only for a detail."""
    world.generate(np.asarray([[1, 10], [0, 2]]), max_new_tokens=np.int64(2))
    world.cache.take(np.asarray([1, 1, 0])).crop([1, 0, 2]).resize(9)
