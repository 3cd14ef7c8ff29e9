"""A kind of cache may be given as its text wherever one is taken."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import jkv
from jkv import testing
from tests.decoding import texts

PROMPTS = [[3, 1, 4, 1, 5], [2]]


def chat(lm: jkv.LM, cache: Any) -> str:
    return jkv.Chat(lm, max_new_tokens=4, cache=cache).send("he who")


@pytest.fixture(scope="module")
def lm(tiny_config):
    return texts.noise(tiny_config, layers=1)


# Name: what is done with a kind, a text, the same kind, and what is compared.
TAKES = {
    "generate": (
        lambda model, cache: jkv.generate(model, PROMPTS, max_new_tokens=4, cache=cache).cache,
        "int8",
        jkv.quantized(8),
    ),
    "stream": (
        lambda model, cache: _streamed(model, cache),
        "dense:grow",
        jkv.dense(grow=True),
    ),
    "beam_search": (
        lambda model, cache: (
            jkv.beam_search(model, PROMPTS, max_new_tokens=3, beams=2, cache=cache).tokens
        ),
        "dense",
        jkv.dense(),
    ),
    "init_cache": (
        lambda model, cache: jkv.init_cache(model.config, cache, batch=1, slots=8),
        "window:4,sinks=1",
        jkv.window(4, sinks=1),
    ),
    "convert": (
        lambda model, cache: jkv.init_cache(model.config, batch=1, slots=8).convert(cache),
        "int4",
        jkv.quantized(4),
    ),
    "requantise": (
        lambda model, cache: jkv.init_cache(model.config, "int8", batch=1, slots=8).requantise(
            cache
        ),
        "fp8",
        jkv.fp8(),
    ),
    "plan": (
        lambda model, cache: jkv.plan(model, cache=[cache])[0].cache_bytes,
        "int4",
        jkv.quantized(4),
    ),
    "per_layer": (lambda _, cache: jkv.per_layer([cache] * 2), "int4", jkv.quantized(4)),
    "per_layer's ends": (
        lambda _, cache: jkv.per_layer("window:4", first=1, exact=cache),
        "fp8",
        jkv.fp8(),
    ),
    "near_far": (lambda _, cache: jkv.near_far(recent=8, far=cache), "int4", jkv.quantized(4)),
    "paged": (lambda _, cache: jkv.paged(8, codec=cache), "fp8", jkv.fp8()),
}


def _streamed(model: Any, cache: Any) -> Any:
    blocks = jkv.stream(model, PROMPTS, max_new_tokens=3, cache=cache)
    list(blocks)
    return blocks.result.cache


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return repr(a) == repr(b) and type(a) is type(b)


@pytest.mark.parametrize("name", TAKES)
def test_a_text_is_its_kind(name, tiny_model):
    take, text, kind = TAKES[name]
    assert same(take(tiny_model, text), take(tiny_model, kind))


@pytest.mark.parametrize("name", TAKES)
def test_a_text_that_names_no_kind(name, tiny_model):
    with pytest.raises(ValueError, match=r"cache got 'int5', did you mean 'int\d'; expected dense"):
        TAKES[name][0](tiny_model, "int5")


def test_a_conversation(lm):
    assert chat(lm, "window:64") == chat(lm, jkv.window(64))
    with pytest.raises(ValueError, match="cache got 'windw', did you mean 'window'"):
        chat(lm, "windw")


def test_pages_of_an_engine(tiny_model):
    assert jkv.Engine(tiny_model, pages=8, cache="paged:4,int8").stats()["pages"]["pages"] == 8
    with pytest.raises(TypeError, match=r"cache got DenseKind.*; expected a kind of pages"):
        jkv.Engine(tiny_model, pages=8, cache="dense")
    with pytest.raises(ValueError, match="cache got 'pagd', did you mean 'paged'"):
        jkv.Engine(tiny_model, pages=8, cache="pagd")


@pytest.mark.parametrize("value", [None, 4, b"int4", jkv.dense()], ids=repr)
def test_parse_reads_texts_only(value):
    shown = re.escape(repr(value))
    with pytest.raises(TypeError, match=f"parse got {shown}; expected a text such as 'int4'"):
        jkv.parse(value)


def test_parse():
    assert jkv.parse("int4") == jkv.quantized(bits=4)
    assert jkv.parse is jkv.cache.spec.parse


def test_a_kind_to_be_checked(monkeypatch):
    def probed(probe: Any) -> None:
        raise AssertionError(repr(probe.kind))

    monkeypatch.setattr(testing._Probe, "is_a_value", probed)
    with pytest.raises(AssertionError, match=re.escape(repr(jkv.window(8)))):
        testing.check_kind("window:8")
