"""The benchmark runs through, on a model of no use, and what it says hangs together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import jkv
from bench.runners import TINY, Jkv, Shape, Trace, write_checkpoint
from bench.sections import SECTIONS, _agreement, _curve, _ratios
from tests.conftest import ROOT

SCRIPT = ROOT / "scripts" / "bench_decode.py"


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
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
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
