"""What is measured. Every comparison alternates its contestants in one run: A B C A B C ..."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jkv
from bench import machine
from bench.runners import (
    Jkv,
    Runner,
    Shape,
    Trace,
    Transformers,
    have_transformers,
    open_transformers,
)

Say = Callable[[str], None]
DENSE, NONE = "jkv, dense cache", "jkv, no cache"
HF, HF_STATIC, HF_NONE = (
    "transformers, default cache",
    "transformers, static cache",
    "transformers, no cache",
)
# 1000 tokens of GPT-2 124M on a T4, as an article has it that is often quoted.
ARTICLE = {"with a cache": 11.885, "without a cache": 56.197}


class Bench:
    """The contestants, loaded once, and how thorough to be."""

    def __init__(self, directory: Path, shape: Shape, *, quick: bool, say: Say):
        self.directory, self.shape, self.quick, self.say = directory, shape, quick, say
        self.lm = jkv.load(directory)
        self.random = np.random.default_rng(1)
        self.cached: list[Runner] = [Jkv(DENSE, self.lm, jkv.dense())]
        self.uncached: list[Runner] = [Jkv(NONE, self.lm, jkv.none())]
        if have_transformers():
            model = open_transformers(directory)
            self.cached.append(Transformers(HF, model, use_cache=True))
            self.cached.append(Transformers(HF_STATIC, model, cache_implementation="static"))
            self.uncached.append(Transformers(HF_NONE, model, use_cache=False))

    def prompts(self, rows: int, tokens: int) -> np.ndarray:
        """Random ids."""
        return self.random.integers(0, self.shape.vocab - 1, (rows, tokens)).astype(np.int32)

    def alternate(
        self,
        runners: Sequence[Runner],
        prompts: np.ndarray,
        new: int,
        rounds: int,
        slots: int | None = None,
    ) -> dict[str, list[Trace]]:
        """Each runner's traces, after one run of each that is not counted and compiles."""
        traces: dict[str, list[Trace]] = {runner.name: [] for runner in runners}
        for runner in runners:
            # The same buffers, hence the same programs, with fewer tokens where slots are given.
            self.say(f"  warming up: {runner.name}")
            runner(prompts, min(new, 34) if slots or not isinstance(runner, Jkv) else new, slots)
        for i in range(rounds):
            for runner in runners:
                traces[runner.name].append(runner(prompts, new, slots))
                took = traces[runner.name][-1].total
                self.say(f"  round {i + 1} of {rounds}: {runner.name}: {took:.2f} s")
        return traces


def one_row(bench: Bench) -> dict[str, Any]:
    """976 tokens after 24, one row: with a cache in full, without one at a few lengths."""
    prompt, new = 24, 128 if bench.quick else 976
    prompts = bench.prompts(1, prompt)
    slots = -(-(prompt + new) // 128) * 128
    traces = bench.alternate(bench.cached, prompts, new, 2 if bench.quick else 3, slots)
    contestants = {name: _summary(found, prompt) for name, found in traces.items()}
    for name, found in traces.items():
        contestants[name]["same tokens"] = _agreement(traces[DENSE][0], found[0])
    lengths = (32, 128) if bench.quick else (32, 128, 256, 512, 768, 992)
    return {
        "prompt": prompt,
        "new": new,
        "contestants": contestants,
        "speedup": _ratios(traces, lambda trace: trace.total),
        "without a cache": _without(bench, lengths, prompt, new),
        "article, T4": ARTICLE,
    }


def _without(bench: Bench, lengths: Sequence[int], prompt: int, new: int) -> dict[str, Any]:
    """Seconds per step of recomputing everything, at some lengths, and their integral.

    All 976 steps would take minutes per run, so the total is the area under the line through the
    lengths that were run, and it is labelled so.
    """
    points: dict[str, list[float]] = {runner.name: [] for runner in bench.uncached}
    for length in lengths:
        bench.say(f" without a cache, at {length} tokens")
        traces = bench.alternate(
            bench.uncached, bench.prompts(1, length), 5, 2 if bench.quick else 3, length + 8
        )
        for name, found in traces.items():
            points[name].append(statistics.median(trace.step for trace in found))
    at = np.arange(prompt, prompt + new)
    return {
        name: {
            "lengths": list(lengths),
            "seconds per step": steps,
            "total, integrated from these lengths": float(np.interp(at, lengths, steps).sum()),
        }
        for name, steps in points.items()
    }


def eight_rows(bench: Bench) -> dict[str, Any]:
    """8 rows of 512 prompt tokens each: the steps after the prefill."""
    rows, prompt, new = 8, 64 if bench.quick else 512, 33 if bench.quick else 65
    prompts = bench.prompts(rows, prompt)
    traces = bench.alternate(bench.cached, prompts, new, 2 if bench.quick else 5)
    return {
        "rows": rows,
        "prompt": prompt,
        "new": new,
        "contestants": {name: _summary(found, prompt) for name, found in traces.items()},
        "speedup": _ratios(traces, lambda trace: trace.step),
    }


def buffers(bench: Bench) -> dict[str, Any]:
    """Decoding around position 512 in a buffer of 1024 slots and in one of 8192."""
    prompt, new, rounds = 480, 65, 2 if bench.quick else 7
    prompts, runner = bench.prompts(1, prompt), bench.cached[0]
    steps: dict[int, list[float]] = {1024: [], 8192: []}
    for slots in steps:
        runner(prompts, new, slots)
    for _ in range(rounds):
        for slots, found in steps.items():
            found.append(runner(prompts, new, slots).step)
    small, large = (statistics.median(found) for found in steps.values())
    return {
        "prompt": prompt,
        "new": new,
        "seconds per step": {str(slots): found for slots, found in steps.items()},
        "median": {"1024": small, "8192": large},
        "ratio": statistics.median(b / a for a, b in zip(*steps.values(), strict=True)),
    }


def bandwidth(bench: Bench) -> dict[str, Any]:
    """The share of the machine's read bandwidth that a decode step reaches at some lengths.

    Bytes per step are the weights and the filled part of the cache, each read once.
    """
    runner, shape = bench.cached[0], bench.shape
    reads = [machine.read_bandwidth()]
    shares = {}
    for prompt in (64,) if bench.quick else (64, 448, 896):
        new = 65
        prompts = bench.prompts(1, prompt)
        runner(prompts, new, 1024)
        step = statistics.median(
            runner(prompts, new, 1024).step for _ in range(2 if bench.quick else 5)
        )
        reads.append(machine.read_bandwidth())
        rate = (shape.weights_read + shape.cache_read(prompt + new / 2)) / step
        shares[str(prompt + new // 2)] = {"seconds per step": step, "bytes per second": rate}
    machine_rate = statistics.median(reads)
    for found in shares.values():
        found["share"] = found["bytes per second"] / machine_rate
    return {"read bandwidth": machine_rate, "measured": reads, "at position": shares}


def first_token(bench: Bench) -> dict[str, Any]:
    """From the call to the first token in a fresh process, and in one that finds its programs.

    The second reads JAX's persistent compilation cache, which the first has filled.
    """
    runs: dict[str, list[dict[str, float]]] = {"first process": [], "second process": []}
    for _ in range(1 if bench.quick else 2):
        with tempfile.TemporaryDirectory() as cache:
            for name, found in runs.items():
                found.append(_child(bench.directory, cache))
                bench.say(f"  {name}: {found[-1]['first token']:.2f} s to the first token")
    medians = {
        name: {what: statistics.median(run[what] for run in found) for what in found[0]}
        for name, found in runs.items()
    }
    return {"medians": medians, "runs": runs}


def _child(directory: Path, cache: str) -> dict[str, float]:
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    script = Path(__file__).with_name("first_token.py")
    done = subprocess.run(
        [sys.executable, str(script), str(directory)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "one-row": one_row,
    "eight-rows": eight_rows,
    "buffers": buffers,
    "bandwidth": bandwidth,
    "first-token": first_token,
}


def _summary(traces: list[Trace], prompt: int) -> dict[str, Any]:
    middle = statistics.median(trace.total for trace in traces)
    return {
        "seconds": middle,
        "all seconds": [trace.total for trace in traces],
        "seconds to the first token": statistics.median(trace.first for trace in traces),
        "seconds per step": statistics.median(trace.step for trace in traces),
        "all seconds per step": [trace.step for trace in traces],
        "curve": _curve(traces, prompt),
    }


def _curve(traces: list[Trace], prompt: int, bin_size: int = 32) -> list[tuple[float, float]]:
    """(position, seconds per token) over stretches of about `bin_size` tokens."""
    grid = np.arange(traces[0].said[0], traces[0].said[-1] + 1, bin_size, dtype=float)
    if len(grid) < 2:
        return []
    times = np.median([np.interp(grid, t.said, t.seconds) for t in traces], axis=0)
    steps = np.diff(times) / np.diff(grid)
    middles = prompt + (grid[:-1] + grid[1:]) / 2
    return [(float(a), float(b)) for a, b in zip(middles, steps, strict=True)]


def _ratios(traces: dict[str, list[Trace]], value: Callable[[Trace], float]) -> dict[str, float]:
    """By how much jkv is faster than each other: the median over the rounds of their ratio."""
    ours = [value(trace) for trace in traces[DENSE]]
    return {
        name: statistics.median(value(b) / a for a, b in zip(ours, found, strict=True))
        for name, found in traces.items()
        if name != DENSE
    }


def _agreement(a: Trace, b: Trace) -> str:
    differ = np.flatnonzero((a.tokens != b.tokens).any(axis=0))
    count = a.tokens.shape[1]
    return f"all {count}" if not len(differ) else f"the first {differ[0]} of {count}"
