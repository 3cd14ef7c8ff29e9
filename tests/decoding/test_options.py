"""Keywords that are declared once: what `help` shows of them, and what becomes of misspelt ones."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import jkv
from jkv.decoding.options import GenerateOptions, Options, SearchOptions

PROMPTS = [[1, 2, 3]]


def test_declarations_agree():
    """A type checker compares them too, in ``Options(**options)``."""
    names = {field.name for field in dataclasses.fields(Options)}
    assert set(GenerateOptions.__annotations__) == names - {"block"}


@pytest.mark.parametrize(
    ("function", "names", "own"),
    [
        (jkv.generate, GenerateOptions, []),
        (jkv.stream, GenerateOptions, ["block"]),
        (jkv.beam_search, SearchOptions, ["beams", "length_penalty", "early_stopping"]),
    ],
)
def test_help_shows_each_keyword_with_its_default(function, names, own):
    shown = inspect.signature(function).parameters
    assert list(shown)[:3] == ["model", "prompts", "max_new_tokens"]
    assert set(shown) == {"model", "prompts", *own, *names.__annotations__}
    for name in names.__annotations__:
        assert shown[name].kind is shown[name].KEYWORD_ONLY
        assert shown[name].annotation == Options.__annotations__[name]
        if name != "max_new_tokens":
            assert shown[name].default is getattr(Options, name)


@pytest.mark.parametrize("function", [jkv.generate, jkv.stream, jkv.beam_search])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_token": 4}, r"argument 'max_new_token'; did you mean max_new_tokens=\?"),
        ({"max_new_tokens": 4, "prefil_chunk": 16}, r"did you mean prefill_chunk=\?"),
        ({"max_new_tokens": 4, "zzz": 1}, "argument 'zzz'; expected one of model, prompts, "),
        ({}, "needs the keyword max_new_tokens="),
    ],
)
def test_misspelt_and_missing_keywords_are_named(tiny_model, function, wrong, message):
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) .*{message}"):
        function(tiny_model, PROMPTS, **wrong)
