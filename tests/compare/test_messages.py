"""Conversations written by chat templates: as transformers writes them."""

from __future__ import annotations

import pytest

from jkv.models.template import render
from jkv.models.tools import schema
from tests.models import test_messages as cases

pytestmark = pytest.mark.compare

SOURCE = """{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- set ns = namespace(last='') %}
{%- for m in messages[::-1] if m.role == 'user' %}
    {%- set ns.last = ns.last ~ loop.index %}
{%- endfor %}
{%- for m in messages %}
    {%- generation %}{{ '<|' + m.role + '|>' }}{% endgeneration %}
    {%- if m.reasoning_content is defined %}
        {{- '<think>' + m.reasoning_content + m.thinking + '</think>' }}
    {%- endif %}
    {%- if m.content is defined %}{{ m.content | trim }}{{ eos_token }}{% endif %}
    {%- if 'tool_calls' in m %}{{ m.tool_calls | tojson }}{% endif %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
{%- endfor %}
{{- ns.last }}{{ '%s é' % ('<a>' | tojson) }}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
CALL = {"function": {"name": "weather", "arguments": {"city": "Zürich", "days": None}}}
USER = {"role": "user", "content": " the cat "}
SAT = {"role": "assistant", "content": "sat ", "tool_calls": None, "reasoning": "why"}


@pytest.mark.parametrize(
    ("messages", "values"),
    [
        ([USER], {}),
        ([USER, SAT, USER], {"tools": [cases.weather]}),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], {}),
        ([USER, SAT], {"continue_final_message": True, "add_generation_prompt": False}),
        ([USER, SAT], {"continue_final_message": "thinking", "add_generation_prompt": False}),
        ([USER, SAT, USER, SAT, USER, SAT], {}),
        ([cases.Message("user", "x"), cases.Model()], {"add_generation_prompt": False}),
    ],
)
def test_conversations(messages, values):
    from transformers.utils import chat_template_utils as theirs

    values = {"add_generation_prompt": True, "eos_token": "</s>", "tools": None} | values
    plain = theirs._normalize_chat_messages(messages)
    source = SOURCE if not isinstance(messages[0], cases.Message) else "{{ messages | length }}"
    wanted = theirs.render_jinja_template([plain], chat_template=source, **values)[0][0]
    assert render(source, messages, **values) == wanted


@pytest.mark.parametrize("function", [cases.weather, cases.Tools().find])
def test_schemas(function):
    from transformers.utils import get_json_schema

    assert schema(function) == get_json_schema(function)
