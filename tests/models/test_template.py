"""Chat templates: what they write, and what they may not do."""

from __future__ import annotations

import datetime
import enum

import pytest

import jkv
from jkv.errors import UnsupportedError
from jkv.models.template import render
from tests.models.test_tokenizer import words

TALK = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
CHATML = """{%- for m in messages %}
    {{- '<|' + m.role + '|>' + m['content'] + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}"""


def load(checkpoint, **config):
    copy = checkpoint()
    words(copy.path, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"} | config)
    return copy


def test_written(checkpoint):
    tokenizer = jkv.load(load(checkpoint, chat_template=CHATML).path).tokenizer
    text = "<|user|>the cat</s><|assistant|>sat</s>"
    assert tokenizer.chat(TALK) == text + "<|assistant|>"
    assert tokenizer.chat(TALK, add_generation_prompt=False) == text


def test_ids_have_only_the_templates_special_tokens(checkpoint):
    source = "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer = jkv.load(load(checkpoint, chat_template=source).path).tokenizer
    assert tokenizer.chat_ids(TALK) == [0, 2, 3, 4]


def test_named_templates(checkpoint):
    named = [{"name": "default", "template": "usual"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = jkv.load(load(checkpoint, chat_template=named).path).tokenizer
    assert tokenizer.chat(TALK) == "usual"
    assert tokenizer.chat(TALK, template="tool_use") == "tools"
    with pytest.raises(UnsupportedError, match=r"'rag' .it has default, tool_use"):
        tokenizer.chat(TALK, template="rag")


def test_a_file_of_its_own_counts_more(checkpoint):
    copy = load(checkpoint, chat_template="old")
    (copy.path / "chat_template.jinja").write_text("new")
    assert jkv.load(copy.path).tokenizer.chat(TALK) == "new"


def test_no_template(checkpoint):
    tokenizer = jkv.load(load(checkpoint).path).tokenizer
    with pytest.raises(UnsupportedError, match=r"no chat template 'default' .it has none"):
        tokenizer.chat(TALK)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{% if true %}\n  x\n{% endif %}\n", "  x\n"),  # blocks leave no blank lines
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "the cat"}'),
        ("{{ '<é>' | tojson }}", '"<é>"'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}", None),
        ("{{ strftime_now('%Y') }}", str(datetime.datetime.now().year)),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% generation %}{% set x = 1 %}{% endgeneration %}{{ x is defined }}", "False"),
        ("{{ dict.fromkeys(['a'], 1) | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{% for m in messages %}{% break %}{% endfor %}y", "y"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 2 %}{{ ns.n }}", "2"),
        ("{{ dict(a=1).a }}", "1"),
        ("{{ nothing is defined }}{{ messages is none }}", "FalseFalse"),
        ("{{ '-' * 3 }}{{ 2 ** 3 }}", "---8"),
        ("{{ messages[0].content.upper().split(' ')[1] }}", "CAT"),
    ],
)
def test_as_transformers_has_them(source, wanted):
    if wanted is None:
        wanted = '{\n "a": [\n  2\n ],\n "b": 1\n}'
    assert render(source, TALK) == wanted


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ",
        "{% nothing %}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ 'x' | nofilter }}",
        "{% include 'other' %}",
        "{{ 1 | tojson(indent={}) }}",
    ],
)
def test_templates_that_refuse_or_fail(source):
    with pytest.raises(UnsupportedError, match="chat template cannot write"):
        render(source, TALK)


def test_its_own_words_are_passed_on():
    with pytest.raises(UnsupportedError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", TALK)


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages.__class__.__base__ }}",
    "{{ dict.__class__ }}{{ dict.__globals__ }}{{ dict.mro() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{% set f = ''.format %}{{ f.__self__ }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages[0].clear() }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace(_x=1) %}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ range(10 ** 9) | list }}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ 10 ** 99999 }}",
    "{% import 'os' as os %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile(source):
    """Nothing of Python comes out: an error, or jinja2's empty undefined."""
    talk = [dict(message) for message in TALK]
    try:
        text = render(source, talk)
    except UnsupportedError:
        text = ""
    assert text.strip() == ""
    assert talk == TALK


def test_objects_become_plain():
    class Role(str, enum.Enum):  # noqa: UP042  a StrEnum would write itself as its value
        USER = "user"

    class Text(str):
        def leak(self):
            return "secret"

    talk = [{"role": Role.USER, "content": Text("hello")}]
    assert render("{{ messages[0].role }}{{ messages[0].content }}", talk) == "userhello"
    assert render("{{ messages[0].content.leak is defined }}", talk) == "False"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hello",
        {"role": "user", "content": "x"},
        ["hello"],
        [{"content": "x"}],
        [{"role": 3}],
        [{"role": "user", "content": object()}],
    ],
)
def test_messages_of_another_form(messages):
    with pytest.raises(ValueError, match="message"):
        render("x", messages)
