"""Kinds of cache as text."""

from __future__ import annotations

import pytest

import jkv
from jkv.cache import spec


@pytest.fixture
def ring(monkeypatch):
    def ring(size, sinks=0, *, name="plain"):
        return size, sinks, name

    monkeypatch.setitem(spec._KINDS, "ring", ring)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("dense", jkv.dense()),
        (" none ", jkv.none()),
        ("dense()", jkv.dense()),
        ("ring(8)", (8, 0, "plain")),
        ("ring(8, 4)", (8, 4, "plain")),
        ("ring(8,sinks=4)", (8, 4, "plain")),
        ("ring (size=8, name='x(y)')", (8, 0, "x(y)")),
    ],
)
@pytest.mark.usefixtures("ring")
def test_what_is_written_is_meant(text, kind):
    assert spec.parse(text) == kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one of dense, none, ring"),
        ("Dense", "expected one of dense"),
        ("dense none", "expected one of dense"),
        ("dense(", "expected one of dense"),
        ("dense(1)", "too many positional arguments.*expected dense"),
        ("ring", r"missing.*'size'.*expected ring\(size, sinks=0, name='plain'\)"),
        ("ring(8, sink=4)", "unexpected keyword argument 'sink'"),
        ("ring(8, sinks=)", "expected arguments such as"),
        ("ring(8, **{})", "expected arguments such as"),
        ("ring(exit())", "expected arguments such as"),
        ("ring(8) + f(8)", "expected one of|expected arguments such as"),
        ("ring(8, 8, size=4)", "multiple values"),
    ],
)
@pytest.mark.usefixtures("ring")
def test_what_is_not_understood_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        spec.parse(text)
