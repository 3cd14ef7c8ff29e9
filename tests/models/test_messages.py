"""Messages as people give them: what a chat template sees of them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import numpy as np
import pytest

import jkv
from jkv.errors import UnsupportedError
from jkv.models.template import render
from jkv.models.tools import schema
from tests.models.test_template import CHATML, TALK, load

USER = {"role": "user", "content": "the cat"}


def weather(city: str, unit: Literal["c", "f"] = "c", days: int | None = None) -> str:
    """Get the weather of a city.

    Args:
        city: its name,
            in any language.
        unit (str): of temperatures (choices: ["c", "f"])
        days: from now.

    Returns:
        What it will be.
    """
    return f"{city} {unit} {days}"


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its name, in any language."},
                "unit": {"type": "string", "enum": ["c", "f"], "description": "of temperatures"},
                "days": {"type": "integer", "nullable": True, "description": "from now."},
            },
            "required": ["city"],
        },
        "return": {"type": "string", "description": "What it will be."},
    },
}


@pytest.mark.parametrize(
    "source",
    [
        # As Llama 3.1, Mistral and DeepSeek-R1 ask.
        "{{ 'tool_calls' in messages[0] }}",
        "{{ messages[0].tool_calls is defined }}",
        "{{ messages[0].content is defined and messages[0].content is none }}",
    ],
)
def test_fields_that_are_none_are_left_out(source):
    message = {"role": "assistant", "content": None, "tool_calls": None, "refusal": None}
    assert render(source, [message]) == "False"
    assert message["content"] is None


def test_none_within_a_field_stays():
    call = {"function": {"name": "f", "arguments": {"days": None}}}
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert render(source, [{"role": "assistant", "tool_calls": [call]}]) == '{"days": null}'


def test_a_message_without_a_content_is_refused():
    with pytest.raises(ValueError, match=r"'contnt': 'x'.*}, without a content; expected \{'role'"):
        render("x", [USER, {"role": "user", "contnt": "x"}])


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_names_of_reasoning(name):
    source = "{{ messages[0].reasoning_content }},{{ messages[0].thinking }}"
    message = {"role": "assistant", "content": "x", name: "why"}
    assert render(source, [message]) == "why,why"
    assert render("{{ messages[0].thinking is defined }}", [USER]) == "False"


def test_reasoning_under_several_names():
    message = {"role": "assistant", "reasoning": "c", "thinking": "b"}
    source = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    assert render(source, [message]) == "bb"
    assert render(source, [message | {"reasoning_content": "a"}]) == "ab"
    assert render(source, [message | {"thinking": None}]) == "cc"


@dataclasses.dataclass
class Message:
    role: str
    content: Any
    tool_calls: Any = None


class Model:
    """As pydantic's, which openai's client returns."""

    def model_dump(self) -> dict[str, Any]:
        return {"role": "user", "content": [Part("a"), Part("b")], "audio": None}


@dataclasses.dataclass
class Part:
    text: str


def test_messages_that_are_objects():
    source = (
        "{% for m in messages %}{{ m.role }}{{ m.content | length }}{{ m | length }};{% endfor %}"
    )
    assert render(source, (Message("user", "xyz"), Model())) == "user32;user22;"
    assert render("{{ messages[0].content[1].text }}", [Model()]) == "b"


def test_numbers_of_numpy():
    message = USER | {"n": np.int64(3), "f": np.float32(0.5), "no": np.bool_(False)}
    source = "{{ messages[0].n + 1 }}{{ messages[0].f }}{{ messages[0].no }}"
    assert render(source, [message]) == "40.5False"


def test_tuples_stay_tuples():
    assert render("{{ messages[0].n }}", [USER | {"n": (1, [2], (3,))}]) == "(1, [2], (3,))"


def test_messages_nested_too_deeply():
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        render("x", [USER | {"content": deep}])
    deep.append(deep)
    with pytest.raises(ValueError, match="nested too deeply"):
        render("x", [USER | {"content": deep}])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tools": "weather"}, "tools got str; expected a list"),
        ({"tools": [3]}, "tools hold 3; expected a JSON schema, or a function"),
        ({"tools": [str]}, "tools hold .*; expected a JSON schema"),
        ({"documents": {"title": "a"}}, "documents got dict; expected a list"),
        ({"documents": ["a"]}, "documents hold 'a'; expected"),
        ({"enable_thinking": object()}, "holds object; expected what JSON can hold"),
    ],
)
def test_values_of_another_form(values, message):
    with pytest.raises(ValueError, match=message):
        render("x", [USER], **values)


# Tools ------------------------------------------------------------------------------------------


def test_a_function_becomes_its_schema(checkpoint):
    tokenizer = jkv.load(load(checkpoint, chat_template="{{ tools | tojson }}").path).tokenizer
    assert json.loads(tokenizer.chat(TALK, tools=[weather])) == [WEATHER]
    assert json.loads(tokenizer.chat(TALK, tools=(WEATHER, weather))) == [WEATHER, WEATHER]


class Tools:
    def find(self, word: str, near: list[float], options: dict[str, int]):
        """Find a word.

        Args:
            word: what to find.
            near: where.
            options: how.
        """


def test_a_method_becomes_its_schema():
    function = schema(Tools().find)["function"]
    assert function["parameters"]["properties"] == {
        "word": {"type": "string", "description": "what to find."},
        "near": {"type": "array", "items": {"type": "number"}, "description": "where."},
        "options": {
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "description": "how.",
        },
    }
    assert "return" not in function


def _no_docstring(x: int): ...


def _no_annotation(x):
    """Do.

    Args:
        x: it.
    """


def _no_description(x: int):
    """Do."""


def _no_json(x: np.ndarray):
    """Do.

    Args:
        x: it.
    """


def _no_choices(x: int):
    """Do.

    Args:
        x: it (choices: a, b)
    """


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_no_docstring, "_no_docstring has no docstring"),
        (_no_annotation, "_no_annotation has no annotation for x"),
        (_no_description, "_no_description does not describe x"),
        (_no_json, r"parameter x of the tool _no_json is annotated with <class 'numpy.ndarray'>"),
        (_no_choices, "parameter x of the tool _no_choices has choices that are no JSON: a, b"),
    ],
)
def test_functions_without_a_schema(function, message):
    with pytest.raises(ValueError, match=message):
        render("x", [USER], tools=[function])


def test_the_template_for_tools(checkpoint):
    named = [{"name": "default", "template": "usual"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = jkv.load(load(checkpoint, chat_template=named).path).tokenizer
    assert tokenizer.chat(TALK, tools=[weather]) == "tools"
    assert tokenizer.chat(TALK, tools=[weather], template="default") == "usual"
    assert tokenizer.chat(TALK, tools=None) == "usual"


# Going on with the last message -----------------------------------------------------------------


def test_the_last_message_is_continued(checkpoint):
    tokenizer = jkv.load(load(checkpoint, chat_template=CHATML).path).tokenizer
    text = "<|user|>the cat</s><|assistant|>sat"
    assert tokenizer.chat(TALK, continue_final_message=True) == text
    assert TALK[-1]["content"] == "sat"
    ids = tokenizer.chat_ids(TALK, continue_final_message=True)
    assert ids == tokenizer.encode(text, special=False)
    with pytest.raises(ValueError, match="got add_generation_prompt and continue_final_message"):
        tokenizer.chat(TALK, continue_final_message=True, add_generation_prompt=True)


SAID = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"


@pytest.mark.parametrize(
    ("source", "content", "wanted"),
    [
        (SAID, "sat ", "sat "),
        (SAID.replace("content", "content | trim"), "sat ", "sat"),
        ("{{ messages[0].content[-1].text }}</s>", [{"text": "a"}, {"text": "b"}], "b"),
        ("{{ messages[0]['content'][0].text }}</s>", [{"text": "a"}, {"type": "image"}], "a"),
        (SAID, "", ""),
    ],
)
def test_texts_that_are_continued(source, content, wanted):
    messages = [{"role": "assistant", "content": content}]
    assert render(source, messages, continue_final_message=True) == wanted


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_reasoning_is_continued(name, read):
    message = {"role": "assistant", "content": "x", name: "why"}
    source = "<think>{{ messages[0]." + read + " }}</think>{{ messages[0].content }}"
    assert render(source, [message], continue_final_message=name) == "<think>why"


def test_of_two_reasonings_the_named_one_is_continued():
    message = {"role": "assistant", "reasoning_content": "a", "thinking": "b"}
    source = "{{ messages[0].reasoning_content }},{{ messages[0].thinking }}</s>"
    assert render(source, [message], continue_final_message="thinking") == "a,b"


@pytest.mark.parametrize(
    ("source", "message", "error", "match"),
    [
        (
            "{{ content }}",
            {"role": "user", "content": None},
            ValueError,
            "has no 'content' to continue",
        ),
        ("{{ content }}", USER | {"content": []}, ValueError, "holds no text"),
        ("{{ content }}", USER | {"content": 3}, ValueError, "'content' is int"),
        ("x", USER, ValueError, "does not read 'content'"),
        ("{# content #}x", USER, UnsupportedError, "leaves out the last message"),
        ("{{ messages[0].content | upper }}", USER, UnsupportedError, "or changes it"),
        ("{{ messages[0].content[::-1] }}", USER, UnsupportedError, "or changes it"),
    ],
)
def test_messages_that_cannot_be_continued(source, message, error, match):
    with pytest.raises(error, match=match):
        render(source, [message], continue_final_message=True)
