"""The benchmark of attention runs through, on sizes of no use, and its sums are right."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from bench import attention
from bench.contenders import (
    FORMS,
    MOST,
    POOL,
    TINY,
    Grid,
    Mine,
    Point,
    contenders,
    drawn,
    measure,
    summary,
)
from jkv import ops
from jkv._pytree import nbytes


@pytest.mark.slow
def test_runs_through(tmp_path, capsys):
    target, drawing = tmp_path / "out.json", tmp_path / "out.png"
    options = attention.parse(["--tiny", "--json", str(target), "--plot", str(drawing)])
    results = attention.run(options, Console(stderr=True))
    attention.plot(results, options.plot)
    attention.show(results, Console(width=140))
    assert json.loads(target.read_text()) == results
    assert results["bench"] == "attention"
    found = results["sections"]
    assert drawing.stat().st_size > 1000
    points = {(p["form"], p["page"], p["contender"]): p for p in found["points"]}
    for form in TINY.forms:
        for page in TINY.pages:
            point = points[form, page, "jkv"]
            assert point["attention"] == "xla"
            assert point["off by"] < 1e-2
            rate = point["bytes"] / (point["microseconds"] * 1e-6)
            assert point["bytes per second"] == pytest.approx(rate)
            assert point["share"] == pytest.approx(rate / found["copy bandwidth"])
    assert points["bfloat16", None, "jax.nn, cudnn"]["why not"] == "no GPU"
    assert "microseconds" in points["bfloat16", None, "jax.nn, xla"]
    prefills = found["prefill"]
    assert [(e["past"], e["contender"]) for e in prefills] == [
        (past, name) for past in (0, 32) for name in ("jkv, xla", "jkv")
    ]
    for entry in prefills:
        pairs = 2 * 4 * 8 * 4 * (32 * entry["past"] + 32 * 33 / 2)
        work = entry["flops per second"] * entry["microseconds"] * 1e-6
        assert work == pytest.approx(pairs)
        assert entry.get("off by", 0) < 1e-5
    text = capsys.readouterr().out
    assert "int8" in text
    assert "prefill of 32 after 32" in text


def test_nothing_begins_when_the_time_is_up(capsys):
    options = attention.parse(["--tiny", "--seconds", "0"])
    results = attention.run(options, Console())
    found = results["sections"]
    assert found["points"] == found["prefill"] == []
    assert len(found["left out"]) > 4


def test_the_grid():
    points = list(Grid().points())
    assert (points[0].rows, points[0].slots, points[0].form) == (8, 32768, "bfloat16")
    assert len(set(points)) == len(points)
    sizes = {p: 4 * p.rows * p.slots * p.shape[1] * p.shape[2] for p in points}
    assert max(sizes.values()) <= MOST
    for form in FORMS:  # keys by channel have a step for 64 tokens
        small = set() if form == "int4" else {16}
        assert {p.page for p in points if p.form == form} == {None, 64} | small
    assert {p.rows for p in points} == {1, 8, 64}
    assert {p.slots for p in points} == {1024, 8192, 32768, 131072}
    assert POOL > 60e6  # the largest cache memory of a chip


def test_who_takes_part():
    """Nobody is left out in silence: who cannot says why."""
    plain = Point("llama-3-8b", 1, 128, "bfloat16", None, shape=(4, 2, 64))
    found = contenders(plain)
    names = ["jkv", "jax.nn, xla", "jax.nn, cudnn", "pallas triton"]
    assert list(found) == [*names, "torch sdpa", "torch flash", "flash_attn"]
    assert found["flash_attn"].refusal() == "flash_attn is not installed"
    for name in ("torch sdpa", "torch flash"):
        assert found[name].refusal() in ("torch is not installed", "torch sees no GPU")
    assert list(contenders(dataclasses.replace(plain, page=64))) == ["jkv"]


@pytest.mark.parametrize("name", ["torch sdpa", "torch flash"])
def test_torch_computes_the_same(name):
    """Where torch is there, on the CPU."""
    torch = pytest.importorskip("torch")
    point = Point("llama-3-8b", 1, 128, "bfloat16", None, shape=(4, 2, 64))
    contender: Any = contenders(point)[name]
    made = np.random.default_rng(0)
    q, k, v = (
        made.standard_normal((1, n, s, 64), np.float32) for n, s in [(4, 1)] + 2 * [(2, 128)]
    )
    got = contender.step(*(torch.from_numpy(x) for x in (q, k, v)))[:, :, 0].numpy()
    at = jnp.full((1, 1), 127)
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    want = ops.attention(jnp.swapaxes(q, 1, 2), k, v, positions=at).out[:, 0]
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(("form", "most"), [("int8", 0.53), ("fp8", 0.53), ("int4", 0.29)])
def test_bytes_of_a_cache(form, most):
    def size(form):
        point = Point("llama-3-8b", 2, 4096, form, None, shape=(32, 8, 128))
        return nbytes(jax.eval_shape(lambda: drawn(point, 0)))

    assert size("bfloat16") == 2 * 2 * 4096 * 8 * 128 * 2
    assert size(form) <= most * size("bfloat16")


def test_who_is_wrong_is_not_timed():
    class Wrong(Mine):
        def __call__(self, q, cache, lengths):
            return super().__call__(q, cache, lengths) * (1.1 if self.implementation is None else 1)

    point = next(iter(TINY.points()))
    found = measure(point, Wrong(point), 1e9, TINY)
    assert found["wrong"]
    assert "microseconds" not in found


def test_the_summary_names_the_worst():
    def entry(contender="jkv", form="bfloat16", page=None, slots=32768, us=100.0, share=0.9):
        names = {"model": "m", "rows": 8, "slots": slots, "form": form, "page": page}
        return names | {"contender": contender, "microseconds": us, "share": share}

    lines = summary(
        [
            entry(),
            entry(slots=131072, share=0.8),
            entry(form="int8", us=50.0),
            entry(page=16, us=104.0),
            entry("torch sdpa", us=150.0),
        ]
    )
    assert lines == [
        "bfloat16, 256k tokens and more: 80% of the copy (85 %)",
        "int8 at 32k and more: 2.00 times as fast (1.8)",
        "pages of 16: at most 4% slower (5 %)",
        "beside the others: 1.50 times as fast or more (1.0)",
    ]
