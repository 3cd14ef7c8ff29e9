"""Limits of chat templates: programs that would take all memory, or run for ever."""

from __future__ import annotations

import tracemalloc

import pytest

from jkv.errors import UnsupportedError
from jkv.models.template import render

TALK = [{"role": "user", "content": "the cat"}]
STEPS, MEMORY = 3000, 1 << 20  # small ones, so that a test takes milliseconds
START = "{% set ns = namespace(x='aaaaaaaa', l=[1], m=[1], t=(1,)) %}"


def loop(body: str, count: int = 100_000) -> str:
    return "{% for i in range(" + str(count) + ") %}" + body + "{% endfor %}"


NESTED = "{% set ns.l = [ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}"
DEEP = START + loop("{% set ns.t = (ns.t,) %}", 200)
LONG = "{% set x = 'y' * 200000 %}"

# What makes much in one step.
LARGE = {
    "ljust": "{{ 'a'.ljust(2 * 10 ** 9) }}",
    "rjust": "{{ 'a'.rjust(2000000000) }}",
    "center": "{{ 'a'.center(2000000000) }}",
    "zfill": "{{ '1'.zfill(2000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(2000000000) }}",
    "text * number": "{{ 'a' * 10 ** 9 }}",
    "number * text": "{{ 10 ** 9 * 'a' }}",
    "text of integers": "{% set x = 2 ** 4000 %}{{ [x] * 2000 }}",
    "JSON's separators": "{{ ([1] * 2000) | tojson(separators=('x' * 10000, ':')) }}",
    "list * number": "{{ ([0] * 10 ** 9) | length }}",
    "tuple * number": "{{ ((0,) * 10 ** 9) | length }}",
    "% width": "{{ '%2000000000d' % 1 }}",
    "% star": "{{ '%*d' % (2000000000, 1) }}",
    "% precision": "{{ '%.2000000000f' % 1.0 }}",
    "% name": "{{ '%(a)2000000000d' % {'a': 1} }}",
    "% repeated": "{{ ('%(a)s' * 1000) % {'a': 'x' * 10000} }}",
    "% padded": "{{ ('%(a)9999d' * 1000) % {'a': 1} }}",
    "% as a filter": "{{ '%2000000000d' | format(1) }}",
    "% as a test": "{{ '%2000000000d' is odd }}",
    "% as another test": "{{ '%2000000000d' is divisibleby(1) }}",
    "% as a test of items": "{{ ['%2000000000d'] | select('even') | list }}",
    "format width": "{{ '{:2000000000}'.format(1) }}",
    "format precision": "{{ '{:.2000000000f}'.format(1.0) }}",
    "format width given": "{{ '{:{w}}'.format(1, w=2000000000) }}",
    "format_map": "{{ '{a:2000000000}'.format_map({'a': 1}) }}",
    "format repeated": "{{ ('{0}' * 1000).format('x' * 10000) }}",
    "format of texts": "{{ ('{0!r}' * 1000).format('x' * 10000) }}",
    "range": "{{ range(10 ** 9) | list }}",
    "center filter": "{{ 'a' | center(2000000000) }}",
    "indent filter": "{{ 'a\nb' | indent(width=2000000000, first=true) }}",
    "indent by text": "{{ ('a\n' * 1000) | indent('x' * 10000) }}",
    "wordwrap filter": "{{ ('a' * 10000) | wordwrap(10, true, 'x' * 10000) }}",
    "batch filter": "{{ [1] | batch(2000000000, 'x') | list }}",
    "slice filter": "{{ [1] | slice(2000000000) | list }}",
    "replace filter": "{{ ('a' * 1000) | replace('a', 'b' * 10000) }}",
    "replace": "{{ ('a' * 1000).replace('a', 'b' * 10000) }}",
    "replace nothing": "{{ ('a' * 1000).replace('', 'b' * 10000) }}",
    "join filter": "{{ range(1000) | join('x' * 10000) }}",
    "join": "{{ ('x' * 10000).join(['a'] * 1000) }}",
    "tojson indent": "{{ [[1]] | tojson(indent=2000000000) }}",
    "tojson separators": "{{ ([1] * 1000) | tojson(separators=('x' * 10000, ':')) }}",
    "tojson": LONG + "{{ [x, x, x, x, x, x] | tojson }}",
    "round down": "{{ 5 | round(-2000000000) }}",
    "round up": "{{ 5 | round(2000000000, 'ceil') }}",
    "int": "{{ ('f' * 100000) | int(0, 16) }}",
    "power": "{{ 2 ** 2000000000 }}",
    "squares": START + "{% set ns.x = 3 %}" + loop("{% set ns.x = ns.x * ns.x %}", 100),
    "doubled by *": START + loop("{% set ns.x = ns.x * 2 %}", 60),
    "doubled by +": START + loop("{% set ns.x = ns.x + ns.x %}", 60),
    "doubled by ~": START + loop("{% set ns.x = ns.x ~ ns.x %}", 60),
    "doubled lists": START + loop("{% set ns.l = ns.l + ns.l %}", 60),
    "doubled by set": START
    + loop("{% set q %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = q %}", 60),
    "filtered set": START + loop("{% set q | center(90000) %}x{% endset %}{% set ns.x = q %}"),
    "many ~": LONG + "{{ (" + " ~ ".join(["x"] * 1000) + ") | length }}",
    "many written": LONG + loop("{{ x }}"),
    "many written by a macro": LONG
    + "{% macro m() %}"
    + loop("{{ x }}")
    + "{% endmacro %}{{ m() | length }}",
    "text of the template": "{% set q %}" + loop("y" * 1000) + "{% endset %}",
    "arguments spread out": LONG + "{% macro m() %}{{ varargs | length }}{% endmacro %}{{ m(*x) }}",
    "arguments of a filter": LONG + "{{ 'a' | default(*x) }}",
    "split": LONG + loop("{% set q = x.split('y') %}"),
    "split at spaces": "{{ ('a ' * 100000).split() | length }}",
    "linked lists": START + loop("{% set ns.l = [ns.l, i] %}"),
    "kept lists": START + loop("{% set ns.l = [ns.l, ('ab ' * 1000).split(' ')] %}"),
    "escaped": "{{ ('<' * 200000) | escape | length }}",
    "upper": LONG + loop("{% set q = x | upper %}"),
    "at compile time": "{% if 'a' | center(2000000000) %}{% endif %}",
    "in a block that escapes": "{% autoescape 'a' | center(2000000000) %}{% endautoescape %}",
    "a name": "{{ messages['x' * 100000000].y }}",
    "an error": "{{ raise_exception('x' * 100000000) }}",
    "the time": "{{ strftime_now('%Y' * 10000) }}",
}

# What takes long.
ENDLESS = {
    "loops": loop(loop(loop("x"))),
    "empty loops": loop(loop(loop(""))),
    "loops that drop all": loop("{% for j in range(100000) if false %}{% endfor %}"),
    "searches in a range": loop("{% if 'a' in range(100000) %}{% endif %}"),
    "searches in a text": LONG + loop("{% if 'b' in x %}{% endif %}"),
    "comparisons": LONG + "{% set z = x ~ '' %}" + loop("{% if x < z %}{% endif %}"),
    "counts": LONG + loop("{% set q = x.count('b') %}"),
    "sums": loop("{% set q = range(1000) | sum %}"),
    "sums of lists": "{{ ([[1] * 10] * 1000) | sum(start=[]) }}",
    "sorts": loop("{% set q = range(100) | list | sort %}"),
    "slices": "{% set x = range(1000) | list %}" + loop("{% set q = x[::-1] %}"),
    "wordwrap": "{{ ('a' * 60000) | wordwrap(1) }}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "a macro without an end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a block without an end": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "callers": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 15
    + "{% endcall %}" * 15,
    "recursive loops": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a recursive loop that drops all": "{% set ns = namespace(on=true) %}"
    "{% for x in range(1000) if ns.on recursive %}{% set ns.on = false %}"
    "{{ loop(range(100000)) }}{% endfor %}",
    "a billion laughs": START + loop(NESTED, 60) + "{{ ns.l }}",
    "laughs of mappings": START
    + loop("{% set ns.l = {'a': ns.l, 'b': ns.l} %}", 60)
    + "{{ ns.l }}",
    "laughs as JSON": START + loop(NESTED, 60) + "{{ ns.l | tojson }}",
    "laughs marked as safe": START + loop(NESTED, 60) + "{{ ns.l | safe | length }}",
    "laughs as a subscript": START + loop(NESTED, 60) + "{{ {}[ns.l].x }}",
    "laughs joined": START + loop(NESTED, 60) + "{{ ns.l ~ '' }}",
    "laughs compared": START + loop(NESTED, 60) + "{{ ns.l == ns.m }}",
    "laughs tested": START + loop(NESTED, 60) + "{{ ns.l is eq(ns.m) }}",
    "laughs looked for": START + loop(NESTED, 60) + "{{ [ns.l].index(ns.m) }}",
    "laughs in a list": START + loop(NESTED, 60) + "{{ ns.m in [ns.l] }}",
    "laughs of namespaces": START + "{% set ns.l = [ns, ns] %}{{ ns }}",
    "laughs that change": START
    + loop(NESTED, 60)
    + "{% for x in [1, 2] %}{{ loop.changed(ns.l if loop.first else ns.m) }}{% endfor %}",
}

# To hash a tuple of many levels ends the process.
HASHED = (
    "{{ {}[ns.t] }}",
    "{% set d = {ns.t: 1} %}",
    "{{ ns.t in {} }}",
    "{{ ns.t in {}.items() }}",
    "{{ {}.get(ns.t) }}",
    "{{ {}.fromkeys([ns.t]) }}",
    "{{ {}.keys() - [ns.t] }}",
    "{{ dict([(ns.t, 1)]) }}",
    "{{ namespace({ns.t: 1}) }}",
    "{{ [ns.t] | unique | list }}",
    "{{ [{}] | map(attribute=ns.t) | list }}",
    "{{ [{}] | groupby(ns.t) }}",
    "{{ {} | attr(ns.t) }}",
    "{{ ns.t is filter }}",
    "{{ ns.t == (1,) }}",
    "{{ ns.t }}",
)

# What nests so deeply that Python or jinja2 would give up in ways of their own.
SOURCES = {
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "sums": "{{ " + "+".join(["1"] * 5000) + " }}",
    "negations": "{{ " + "not " * 5000 + "1 }}",
    "filters": "{{ 1" + "|string" * 5000 + " }}",
    "conditions": "{% if 1 %}" * 1000 + "{% endif %}" * 1000,
    "loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "an infinity": "{{ 1e999 }}",
    "an integer": "{{ " + "9" * 5000 + " }}",
    "a source": "x" * 1_000_000,
}


def refused(source: str, steps: int = STEPS, memory: int = MEMORY, why: str = "") -> None:
    match = f"chat template cannot write these messages: {why}"
    with pytest.raises(UnsupportedError, match=match) as error:
        render(source, TALK, (steps, memory))
    assert len(str(error.value)) < 3000


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_takes_too_long(name):
    refused(ENDLESS[name])


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_takes_too_much(name):
    """It is refused before the memory is taken."""
    tracemalloc.start()
    try:
        refused(LARGE[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * MEMORY


@pytest.mark.parametrize("use", HASHED)
def test_values_nested_too_deeply(use):
    refused(DEEP + use, steps=50_000, why="it nests values deeper than 100")


@pytest.mark.parametrize("name", SOURCES)
def test_sources_nested_too_deeply(name):
    refused(SOURCES[name])


@pytest.mark.parametrize(
    "source",
    [
        "{{ namespace(__html__=1) }}",
        "{{ namespace({'__html__': 1}) }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
    ],
)
def test_names_of_a_namespace(source):
    with pytest.raises(UnsupportedError, match="a namespace with the name '__html__'"):
        render(source, TALK)


def test_the_usual_limits_hold():
    """Those of `render` itself, with what a user would see."""
    with pytest.raises(UnsupportedError, match=r"takes more than 67\d+ bytes"):
        render("{{ 'a'.ljust(2 * 10 ** 9) }}", TALK)
    with pytest.raises(UnsupportedError, match=r"takes more than 30\d+ steps"):
        render(loop("{{ range(100000) | sum }}"), TALK)


def test_limits_grow_with_the_conversation():
    """What is taken for each message is not much: a long conversation is no attack."""
    source = (
        "{% for m in messages %}{% for n in messages %}{% if m.role == n.role %}{% endif %}"
        "{% endfor %}{{ (m.content ~ m.content) | trim | upper | length }}{% endfor %}"
    )
    long = [{"role": "user", "content": "x" * 20_000}] * 40
    assert render(source, long, (1000, 10_000)) == "40000" * 40
    refused(source.replace("messages", "range(40)").replace("m.content", "'x' * 9"), steps=1000)


def test_a_budget_is_that_of_one_rendering():
    source = loop("{{ i }}", 1000)
    for _ in range(3):
        assert len(render(source, TALK, (8000, MEMORY))) == 2890


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ 'a'.ljust(5) ~ 'b'.center(3) ~ '7'.zfill(2) }}", "a     b 07"),
        ("{{ '%s-%05.2f' % ('a', 1.5) }}{{ '%s' | format(3) }}", "a-01.503"),
        ("{{ '{} {a:>4} {!r}'.format('x', 'y', a=1) }}", None),
        ("{{ '{a}'.format_map({'a': 1}) }}", "1"),
        ("{{ ['a', 'b'] | join(', ') }}{{ ', '.join(['a'] | map('upper')) }}", "a, bA"),
        ("{{ 'a\nb' | indent(2) }}{{ 'aXb' | replace('X', '--') }}", "a\n  ba--b"),
        (
            "{{ [1, 2, 3][1:] }}{{ 'abc'[::-1] }}{{ [1] + [2] }}{{ (1, 2) }}",
            "[2, 3]cba[1, 2](1, 2)",
        ),
        ("{{ [3, 1, 2] | sort | first }}{{ [1, 2] | sum }}{{ 3.75 | round(1) }}", "133.8"),
        ("{{ 1 < 2 < 3 }}{{ 'a' in {'a': 1} }}{{ 2 not in [1] }}{{ 1 == 1.0 }}", "True" * 4),
        ("{% for x in [1, 2, 3] if x != 2 %}{{ x }}{{ loop.length }}{% endfor %}", "1232"),
        (
            "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is sequence else x }}"
            "{% endfor %}",
            "123",
        ),
        (
            "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{% endmacro %}{{ m(*[1, 5, 6]) }}",
            "15(6,)",
        ),
        (
            "{% macro m() %}<{{ caller('x') }}>{% endmacro %}{% call(a) m() %}{{ a }}{% endcall %}",
            "<x>",
        ),
        ("{% set x | upper %}a{{ 1 }}{% endset %}{{ x }}", "A1"),
        ("{% filter upper %}a{% endfilter %}{% block b %}b{% endblock %}{{ self.b() }}", "Abb"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}", "a2b1"),
        (
            "{% for g in [{'a': 1, 'b': 2}] | groupby('a') %}{{ g.grouper }}{{ g.list | length }}"
            "{% endfor %}",
            "11",
        ),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages | map(attribute='content') | join }}{{ none }}{{ missing }}", "the catNone"),
        ("{{ dict.fromkeys(['a'], 1) }}{{ 5 is odd }}{{ 6 is divisibleby(3) }}", None),
        ("{{ cycler('a', 'b').next() }}{% set j = joiner('-') %}{{ j() }}{{ j() }}", "a-"),
        ("{{ '12' | int + '0x1f' | int(0, 16) }}{{ -7 // 2 }}{{ -7 % 3 }}{{ +1 }}", "43-421"),
        (
            "{{ 'a b' | wordwrap(1) }}|{{ 'hello world' | truncate(8, true, '...', 0) }}",
            "a\nb|hello...",
        ),
        ("{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2] | slice(2) | list }}", None),
    ],
)
def test_what_templates_may_do(source, wanted):
    wanted = {
        "{{ '{} ": "x    1 'y'",
        "{{ dict": "{'a': 1}TrueTrue",
        "{{ [1, ": wanted or "[[1, 2], [3, 0]][[1], [2]]",
    }.get(source[:7], wanted)
    assert render(source, TALK, (STEPS, MEMORY)) == wanted
