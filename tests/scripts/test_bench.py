"""The benchmark runs through, on a model of no use, and what it says hangs together."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

import jkv
from bench import decode, decode_tables, llama
from bench.__main__ import BENCHES
from bench.runners import TINY, Jkv, Shape, Trace, write_checkpoint
from bench.sections import SECTIONS, _agreement, _curve, _ratios
from jkv._pytree import nbytes
from tests.conftest import ROOT


def trace(step: float, tokens: int = 65) -> Trace:
    said = np.arange(1, tokens + 1)
    return Trace(np.zeros((1, tokens), int), said, 1.0 + step * (said - 1))


def test_step_and_curve_of_a_steady_run():
    found = trace(0.25)
    assert found.first == 1.0
    assert found.step == pytest.approx(0.25)
    curve = _curve([found, trace(0.25)], prompt=24)
    assert [seconds for _, seconds in curve] == pytest.approx([0.25, 0.25])
    assert curve[0][0] == 24 + 17


def test_speedups_are_medians_of_each_rounds_ratio():
    traces = {
        "jkv, dense cache": [trace(0.1), trace(0.2), trace(0.1)],
        "other": [trace(0.3), trace(0.2), trace(0.2)],
    }
    assert _ratios(traces, lambda t: t.step) == {"other": pytest.approx(2.0)}


def test_agreement_counts_the_equal_tokens():
    a, b = trace(0.1), trace(0.1)
    assert _agreement(a, b) == "all 65"
    b.tokens[0, 7] = 1
    assert _agreement(a, b) == "the first 7 of 65"


def test_bytes_of_a_step():
    shape = Shape()
    # GPT-2's 124 439 808 parameters less the table of positions.
    assert shape.weights_read == 4 * (124_439_808 - 1024 * 768)
    assert shape.cache_read(512, rows=2) == 2 * 12 * 768 * 512 * 2 * 4


def test_checkpoint_loads_and_cached_equals_uncached(tmp_path):
    write_checkpoint(tmp_path, TINY)
    lm = jkv.load(tmp_path)
    prompts = np.arange(24, dtype=np.int32).reshape(2, 12)
    cached = Jkv("a", lm, jkv.dense())(prompts, 40, 64)
    plain = Jkv("b", lm, jkv.none())(prompts, 40)
    assert cached.tokens.shape == (2, 40)
    assert list(cached.said) == [1, 33, 40]
    np.testing.assert_array_equal(cached.tokens, plain.tokens)


def bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench", "decode", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT / "scripts",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_runs_through(tmp_path):
    only = [name for name in SECTIONS if name != "bandwidth"]  # that one takes a gigabyte
    target, drawing = tmp_path / "out.json", tmp_path / "out.png"
    done = bench(
        "--tiny", "--quick", "--json", str(target), "--plot", str(drawing), "--only", *only
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(target.read_text())
    assert list(results["sections"]) == only
    assert results["machine"]["versions"]["jax"]
    assert drawing.stat().st_size > 1000
    for text in ("jkv, dense cache", "jkv, no cache", "8192 slots cost", "first process"):
        assert text in done.stdout


def test_a_plot_needs_its_section(tmp_path):
    done = bench("--only", "buffers", "--plot", str(tmp_path / "x.png"))
    assert done.returncode == 2
    assert "--plot" in done.stderr


@pytest.mark.slow
def test_llama_steps(tmp_path, capsys, monkeypatch):
    """On a CPU, at sizes of no use: every cache is timed, and torch's absence is said."""
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    target = tmp_path / "out.json"
    options = ["--gpu", "--only", "llama", "--shape", "tiny", "--json", str(target)]
    results = decode.measure(decode.parse(options), Console(stderr=True))
    decode_tables.show(results, Console(width=110))
    assert json.loads(target.read_text()) == results
    found = results["sections"]["llama"]
    points = {(p["cache"], p["rows"]): p for p in found["points"]}
    assert len(points) == 2 * len(llama.KINDS) + 2
    for cache in llama.KINDS:
        for rows in (1, 8):
            point = points[cache, rows]
            assert point["tokens per second"] == pytest.approx(rows / point["seconds per step"])
            assert point["share"] > 0
            assert point["attention"] == "xla"
    assert points[llama.THEIRS, 8]["why not"] == "torch is not installed"
    assert "tokens/s" in capsys.readouterr().out


def test_no_llama_begins_when_the_time_is_up():
    found = llama.measure(("tiny",), 0.0, lambda section, news: None)
    assert found["points"] == []
    assert len(found["left out"]) == 2 * len(llama.KINDS) + 2


def test_bytes_of_a_llama_step():
    """Llama 2 7B: 6.6e9 weights that are read; half a megabyte for each token."""
    point = llama.Point("7b", "bfloat16", 8, 8192)
    weights, cache = llama.bytes_of(point)
    assert weights == 2 * (6_738_415_616 - 32000 * 4096)
    assert cache == pytest.approx(8 * 8192 * 2**19, rel=0.01)
    tied, _ = llama.bytes_of(llama.Point("1b", "bfloat16", 1, 8192))
    assert tied == 2 * 1_235_814_400
    eight, small = llama.bytes_of(llama.Point("8b", "int4", 1, 8192))
    assert eight == 2 * (8_030_261_248 - 128256 * 4096)
    assert small < 0.35 * 8192 * 2**17


def test_llamas_weights_are_what_a_step_needs():
    config = llama.SHAPES["tiny"]
    made, wanted = llama.model(config), llama.outline(config)
    assert nbytes(made) == nbytes(wanted)
    spread = [float(leaf.std()) for leaf in jax.tree.leaves(made) if leaf.ndim == 2]
    np.testing.assert_allclose(spread, 0.02, rtol=0.1)


def test_an_unknown_benchmark_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "decoding"],
        capture_output=True,
        text=True,
        cwd=ROOT / "scripts",
    )
    assert done.returncode == 2
    assert "bench got decoding" in done.stderr


def test_every_benchmark_has_a_main():
    for name in BENCHES:
        assert callable(importlib.import_module(f"bench.{name}").main)
