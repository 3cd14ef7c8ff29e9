"""What a decode step costs with each kind of cache, and with a window at ever later positions.

    python -m bench kinds --json kinds.json
    python -m bench kinds --cache dense --cache int8 --cache int4 --position 4096

A random decoder with a Llama's parts runs steps from a position on, its cache taken to be full up
to there (what a step costs does not depend on what the numbers are). Kinds take turns; shown are
medians of the time of a step, and of its part that is the cache's: all beyond a step at position 0.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from rich.console import Console
from rich.table import Table

import jkv
from bench import report
from jkv._pytree import replace
from jkv.cache.spec import parse as parse_kind

KINDS = ("dense", "int8", "int4", "int2", "fp8", "kv:k8v4", "sparse:0.25", "sparse:0.25,int8")
WINDOW = 256
STEPS = 8


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = report.parser("kinds", __doc__)
    add = parser.add_argument
    add("--cache", action="append", metavar="SPEC", help="a kind (see `jkv caches`); repeatable")
    add("--position", type=int, default=4096, help="tokens in the cache")
    add("--batch", type=int, default=1, help="rows")
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=12)
    add("--kv-heads", type=int, default=12)
    add("--head-dim", type=int, default=64)
    add("--rounds", type=int, default=9)
    return parser.parse_args(arguments)


@functools.partial(jax.jit, donate_argnums=2)
def steps(model: Any, token: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    """STEPS decode steps."""

    def step(carry: Any, _: None) -> tuple[Any, None]:
        token, cache = carry
        logits, cache = jkv.decode_step(model, token, cache)
        return (jnp.argmax(logits, -1).astype(jnp.int32), cache), None

    return lax.scan(step, (token, cache), None, length=STEPS)[0]


class Runner:
    """Steps with one kind at one position, over and over."""

    def __init__(self, model: Any, text: str, position: int, slots: int, batch: int):
        self.model, self.position = model, position
        self.cache = jkv.init_cache(model.config, parse_kind(text), batch=batch, slots=slots)
        self.token = jnp.zeros((batch,), jnp.int32)
        self.times: list[float] = []
        self.run()

    def run(self) -> float:
        """Seconds of a step."""
        lengths = jnp.full((len(self.token),), self.position, jnp.int32)
        cache = replace(self.cache, lengths=lengths)
        jax.block_until_ready(cache)
        start = time.perf_counter()
        self.token, self.cache = steps(self.model, self.token, cache)
        jax.block_until_ready(self.cache)
        return (time.perf_counter() - start) / STEPS


def take_turns(runners: dict[Any, Runner], rounds: int) -> dict[Any, float]:
    """Median seconds of a step."""
    for _ in range(rounds):
        for runner in runners.values():
            runner.times.append(runner.run())
    return {name: statistics.median(runner.times) for name, runner in runners.items()}


def main(arguments: list[str]) -> int:
    """Measure, write, show."""
    options = parse(arguments)
    config = jkv.Config(
        vocab=512,
        layers=options.layers,
        width=options.heads * options.head_dim,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        feed_forward=4 * options.heads * options.head_dim,
        context=options.position + 64,
        rope=jkv.Rope(dims=options.head_dim),
    )
    model = jax.jit(lambda: jkv.Decoder(config, rngs=nnx.Rngs(0)))()
    slots, batch = options.position + STEPS, options.batch
    specs = options.cache or list(KINDS)
    runners: dict[Any, Runner] = {"start": Runner(model, "dense", 0, slots, batch)}
    runners |= {spec: Runner(model, spec, options.position, slots, batch) for spec in specs}
    found = take_turns(runners, options.rounds)
    start = found.pop("start")
    dense = found.get("dense", next(iter(found.values())))
    sizes = {spec: runners[spec].cache.nbytes for spec in specs}

    positions = [WINDOW * n for n in (1, 4, 16)]
    windows = {n: Runner(model, f"window:{WINDOW},sinks=4", n, n + STEPS, batch) for n in positions}
    flat = take_turns(windows, options.rounds)

    made = report.Report("kinds", options)
    made.add("step at position 0", start)
    made.add(
        "steps",
        {
            spec: {
                "seconds": found[spec],
                "of the cache": found[spec] - start,
                "bytes": sizes[spec],
            }
            for spec in specs
        },
    )
    made.add("window", {str(n): seconds for n, seconds in flat.items()})
    table = Table(
        title=f"A step after {options.position} tokens: {options.layers} layers, "
        f"{options.heads} heads over {options.kv_heads}, {batch} rows",
        title_justify="left",
    )
    for name in ("cache", "MiB", "ms per step", "of the cache", "dense / this"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for spec in specs:
        own = found[spec] - start
        table.add_row(
            spec,
            f"{sizes[spec] / 2**20:.1f}",
            f"{1e3 * found[spec]:.2f}",
            f"{1e3 * own:.2f}",
            f"{(dense - start) / own:.2f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    report.show_machine(made.results, console)
    console.print(table)
    told = ", ".join(f"{1e3 * seconds:.2f} ms at {n}" for n, seconds in flat.items())
    console.print(f"A window of {WINDOW} and 4 sinks: {told}")
    return 0
