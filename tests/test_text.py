"""What users give is shown in one short line, and counts agree with their nouns."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv._text import brief, plural

LONG = 400  # characters of a message; those about a text list what it may be


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3, "3"),
        ("int5", "'int5'"),
        ([1, 2], "[1, 2]"),
        (np.zeros((1000, 1000)), "ndarray float64[1000, 1000]"),
        ([np.zeros((2, 3), np.int32)], "[ndarray int32[2, 3]]"),
        (list(range(10**6)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        ("x" * 10**6, f"'{'x' * 80}'... (1000000 characters)"),
        (bytes(10**6), f"{bytes(20)!r}... (1000000 bytes)"),
        ("a\nb", r"'a\nb'"),
        ("/a/long/path" * 12, repr("/a/long/path" * 12)),
    ],
)
def test_values_are_short(value, shown):
    assert brief(value) == shown


@pytest.mark.parametrize(
    "value",
    [
        10**500,
        dict.fromkeys(range(1000), "x" * 1000),
        [[["x" * 10**5] * 100] * 100] * 100,
        {str(i) * 1000 for i in range(100)},
    ],
    ids=["digits", "dict", "nested", "set"],
)
def test_whatever_they_hold(value):
    text = brief(value)
    assert len(text) <= 250
    assert "\n" not in text


def test_counts_and_their_nouns():
    assert [plural(n, "token") for n in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
    assert plural(1, "entry", "entries") == "1 entry"
    assert plural(2000, "entry", "entries", commas=True) == "2,000 entries"


@pytest.fixture(scope="module")
def huge(tiny_config):
    """What must not stand in a message as it is."""
    return {
        "array": jnp.ones((300, 300)),
        "cache": jkv.init_cache(tiny_config, batch=2, slots=8),
        "list": [0.5] * 10_000,
        "text": "no such kind " * 10_000,
    }


CALLS = {
    "cache": lambda model, x: jkv.generate(model, [[1]], max_new_tokens=1, cache=x),
    "max_new_tokens": lambda model, x: jkv.generate(model, [[1]], max_new_tokens=x),
    "sampler": lambda model, x: jkv.generate(model, [[1]], max_new_tokens=1, sampler=x),
    "draft": lambda model, x: jkv.generate(model, [[1]], max_new_tokens=1, draft=x),
    "key": lambda model, x: jkv.generate(
        model, [[1]], max_new_tokens=1, sampler=jkv.sampling.temperature(1.0), key=x
    ),
    "progress": lambda model, x: jkv.generate(model, [[1]], max_new_tokens=1, progress=x),
    "resume": lambda model, x: jkv.generate(model, [[1]], max_new_tokens=1, resume=x),
    "prefill_chunk": lambda model, x: jkv.generate(model, [[1]], max_new_tokens=1, prefill_chunk=x),
    "return_logprobs": lambda model, x: jkv.generate(
        model, [[1]], max_new_tokens=1, return_logprobs=x
    ),
    "beams": lambda model, x: jkv.beam_search(model, [[1]], max_new_tokens=1, beams=x),
    "engine": lambda model, x: jkv.Engine(model, pages=x),
    "engine's cache": lambda model, x: jkv.Engine(model, pages=4, cache=x),
    "kind": lambda model, x: jkv.init_cache(model.config, x, batch=1, slots=1),
    "slots": lambda model, x: jkv.init_cache(model.config, batch=1, slots=x),
    "config": lambda model, x: jkv.init_cache(x, batch=1, slots=1),
    "window": lambda model, x: jkv.window(x),
    "bits": lambda model, x: jkv.quantized(x),
    "near_far": lambda model, x: jkv.near_far(far=x),
    "per_layer": lambda model, x: jkv.per_layer(x),
    "paged": lambda model, x: jkv.paged(x),
    "evicting": lambda model, x: jkv.evicting(x),
    "crop": lambda model, x: jkv.init_cache(model.config, batch=1, slots=2).crop(x),
    "convert": lambda model, x: jkv.init_cache(model.config, batch=1, slots=2).convert(x),
    "plan": lambda model, x: jkv.plan(x),
    "device_memory": lambda model, x: jkv.plan("gpt2", device_memory=x),
    "temperature": lambda model, x: jkv.sampling.temperature(x),
    "top_k": lambda model, x: jkv.sampling.top_k(x),
}


@pytest.mark.parametrize("name", CALLS)
def test_messages_hold_no_whole_value(name, huge, tiny_model):
    for what, value in huge.items():
        with pytest.raises((TypeError, ValueError, OSError)) as caught:
            CALLS[name](tiny_model, value)
        assert len(str(caught.value)) < (1200 if what == "text" else LONG), what


def test_a_name_that_is_no_path():
    with pytest.raises(jkv.CheckpointError, match="neither a directory nor a hub id") as caught:
        jkv.load("no such model " * 1000)
    assert len(str(caught.value)) < LONG
