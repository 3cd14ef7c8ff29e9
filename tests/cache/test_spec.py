"""Kinds of cache as text."""

from __future__ import annotations

import re

import pytest

import jkv
from jkv.cache import spec
from tests.conftest import ROOT

WRITTEN = [
    ("dense", jkv.dense()),
    (" dense ", jkv.dense()),
    ("dense:grow", jkv.dense(grow=True)),
    ("none", jkv.none()),
    ("window", jkv.window()),
    ("window:256", jkv.window(256)),
    ("window:size=256", jkv.window(256)),
    ("window:252,sinks=4", jkv.window(252, sinks=4)),
    ("window: 252 , sinks = 4", jkv.window(252, sinks=4)),
    ("window:sinks=4,size=252", jkv.window(252, sinks=4)),
    ("window:252,sinks=4,positions=text", jkv.window(252, sinks=4, positions="text")),
    ("int8", jkv.quantized(8)),
    ("int4", jkv.quantized(4)),
    ("int2", jkv.quantized(2)),
    ("int4:residual=64,group=32", jkv.quantized(4, residual=64, group=32)),
    ("int4:key_axis=token", jkv.quantized(4, key_axis="token")),
    ("kv:k8v4", jkv.quantized(key_bits=8, value_bits=4)),
    ("kv:k4v2,residual=16", jkv.quantized(key_bits=4, value_bits=2, residual=16)),
    ("fp8", jkv.fp8()),
    ("fp8:residual=16", jkv.fp8(residual=16)),
    ("near_far:recent=128,far=int4", jkv.near_far(recent=128, far=jkv.quantized(4))),
    ("near_far:far=sparse:0.5", jkv.near_far(far=jkv.sparse(0.5))),
    (
        "near_far:recent=8,far=(int4:group=32,key_axis=token)",
        jkv.near_far(recent=8, far=jkv.quantized(4, group=32, key_axis="token")),
    ),
    ("sparse", jkv.sparse()),
    ("sparse:.25", jkv.sparse(0.25)),
    ("sparse:0.25,int8", jkv.sparse(0.25, bits=8)),
    ("sparse:0.5,int4,residual=32", jkv.sparse(0.5, bits=4, residual=32)),
    ("sparse:bits=int4", jkv.sparse(bits=4)),
    ("paged", jkv.paged()),
    ("paged:16", jkv.paged(16)),
    ("paged:page=16,int8", jkv.paged(16, bits=8)),
    ("paged:8,int4", jkv.paged(8, bits=4)),
    ("paged:codec=fp8,pages=512", jkv.paged(codec=jkv.fp8(), pages=512)),
    ("evict:256", jkv.evicting(256)),
    ("evict:256,score=h2o", jkv.evicting(256, score=jkv.scores.h2o)),
    ("evict:64,score=snapkv,recent=8", jkv.evicting(64, score=jkv.scores.snapkv(), recent=8)),
    ("evict:64,score=tova,sinks=4", jkv.evicting(64, score=jkv.scores.tova, sinks=4)),
    ("pyramid:64,ratio=2.5", jkv.pyramid(64, ratio=2.5)),
    ("pyramid:64,score=key_norm", jkv.pyramid(64, score=jkv.scores.key_norm)),
    ("per_layer:int4,first=1,last=1", jkv.per_layer(jkv.quantized(4), first=1, last=1)),
    (
        "per_layer:evict:64,first=1,exact=int8",
        jkv.per_layer(jkv.evicting(64), first=1, exact=jkv.quantized(8)),
    ),
    ("per_layer:window:64,first=1", jkv.per_layer(jkv.window(64), first=1)),
    (
        "per_layer:(window:60,sinks=4),first=1,last=2,exact=dense:grow",
        jkv.per_layer(jkv.window(60, sinks=4), first=1, last=2, exact=jkv.dense(grow=True)),
    ),
    (
        "per_layer:(per_layer:(window:60,sinks=4),last=1),first=1",
        jkv.per_layer(jkv.per_layer(jkv.window(60, sinks=4), last=1), first=1),
    ),
]


@pytest.mark.parametrize(("text", "kind"), WRITTEN, ids=[text for text, _ in WRITTEN])
def test_what_is_written_is_meant(text, kind):
    assert spec.parse(text) == kind


GRAMMAR = r"expected dense\[:grow\]; none; window\[:N\]\[,sinks=N\].*`jkv caches`"
WINDOW = r"expected window\[:N\]\[,sinks=N\]\[,positions=cache\|text\|clamped\]$"
REFUSED = [
    ("", GRAMMAR),
    (":", GRAMMAR),
    ("Dense", GRAMMAR),
    ("ring:7", GRAMMAR),
    ("dense none", GRAMMAR),
    ("dense()", GRAMMAR),
    ("window(256)", GRAMMAR),
    ("(dense)", GRAMMAR),
    ("dense:", r"in it ''; expected dense\[:grow\]$"),
    ("dense:1", r"in it '1'; expected dense\[:grow\]$"),
    ("dense:grow,grow", r"in it 'grow'; expected dense\[:grow\]$"),
    ("dense:shrink", r"in it 'shrink'; expected dense\[:grow\]$"),
    ("none:1", "in it '1'; expected none$"),
    ("window:1.5", WINDOW),
    ("window:-1", WINDOW),
    ("window:٣", WINDOW),
    ("window:1_0", WINDOW),
    ("window:2,3", "in it '3'; " + WINDOW),
    ("window:2,,sinks=1", "in it ''; " + WINDOW),
    ("window:2,sinks", "in it 'sinks'; " + WINDOW),
    ("window:2,sinks=", "in it 'sinks='; " + WINDOW),
    ("window:2,sink=1", "in it 'sink=1'; " + WINDOW),
    ("window:2,sinks=1,sinks=1", "in it 'sinks=1'; " + WINDOW),
    ("window:2,size=3", "in it 'size=3'; " + WINDOW),
    ("window:sinks=2,3", "in it '3'; " + WINDOW),
    ("window:2,positions=here", WINDOW),
    ("window:exit()", WINDOW),
    ("window:0", "window got size=0"),
    ("window:(2", "closing brackets"),
    ("window:2)", "closing brackets"),
    ("window:)2(", "closing brackets"),
    ("int3", GRAMMAR),
    (
        "int4:64",
        r"in it '64'; expected int4\[:residual=N\]\[,group=N\]\[,key_axis=channel\|token\]$",
    ),
    ("int4:key_axis=row", "in it 'key_axis=row'; expected int4"),
    ("kv", r"expected kv:kNvN\[,residual=N\]"),
    ("kv:k8", r"in it 'k8'; expected kv:kNvN\[,residual=N\]"),
    ("kv:k8v3", "3"),
    ("near_far:recent=8", r"expected near_far:far=SPEC\[,recent=N\]"),
    ("near_far:int4", r"in it 'int4'; expected near_far:far=SPEC\[,recent=N\]"),
    ("sparse:nan", "in it 'nan'; expected sparse"),
    ("sparse:1e9", "in it '1e9'; expected sparse"),
    ("sparse:2", "2.0"),
    ("sparse:0.25,int3", "in it 'int3'; expected sparse"),
    ("evict", "expected evict:N"),
    ("evict:256,score=best", r"in it 'score=best'; expected evict:N\[,score=h2o\|tova\|snapkv"),
    ("evict:0", "budget=0"),
    ("pyramid:64,ratio=0", "ratio=0.0"),
    ("per_layer", r"expected per_layer:SPEC\[,first=N\]"),
    ("per_layer:first=1", r"expected per_layer:SPEC\[,first=N\]"),
    ("per_layer:ring,first=1", "got 'ring'; " + GRAMMAR),
    ("per_layer:(window:2,sink=1)", "got 'window:2,sink=1', and in it 'sink=1'; " + WINDOW),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[repr(text) for text, _ in REFUSED])
def test_what_is_not_understood_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        spec.parse(text)


@pytest.mark.parametrize("text", ["near_far:far=window:8", "per_layer:none"])
def test_a_kind_where_another_is_wanted(text):
    with pytest.raises(TypeError, match=r"expected .*kind"):
        spec.parse(text)


@pytest.mark.parametrize("text", spec.examples())
def test_examples_are_kinds_and_have_a_text(text):
    kind = spec.parse(text)
    assert hasattr(kind, "init") or hasattr(kind, "init_cache")
    assert spec.text(kind) == text


def test_a_kind_that_is_not_listed_is_shown_as_it_is():
    kind = jkv.window(77)
    assert spec.text(kind) == repr(kind)


@pytest.mark.parametrize("name", spec.FORMS)
def test_usage_names_all_that_a_kind_takes(name):
    form = spec.FORMS[name]
    shown = spec.usage(name)
    assert shown.startswith(name)
    for i, key in enumerate(form.arguments):
        assert i < form.bare or f"{key}=" in shown


def test_every_file_of_kinds_is_listed():
    files = (ROOT / "jkv" / "cache").glob("*.py")
    found = {path.stem for path in files if re.search(r"^FORMS = ", path.read_text(), re.MULTILINE)}
    assert found == set(spec.FILES)
