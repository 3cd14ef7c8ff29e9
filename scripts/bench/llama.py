"""Decode steps of Llama's shapes with random weights: tokens per second, and what memory allows.

A step reads the weights once and the filled cache once; the floor is the time in which the device
copies half as many bytes, as many read as written. Programs of one shape are compiled side by side
before any of them is timed, and each result is told as soon as it is there.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jkv
from bench.contenders import TINY as SMALL
from bench.contenders import Grid, copy_bandwidth, full
from bench.runners import Transformers
from jkv._pytree import nbytes, replace
from jkv.decoding import loop, programs
from jkv.decoding.faults import Faults
from jkv.models import Config, Decoder, Rope
from jkv.ops import dispatch

Tell = Callable[[dict[str, Any], str], None]
STEPS = 32  # of one program
ROUNDS = 3
THEIRS = "transformers, static, compiled"


def _config(
    vocab: int, layers: int, width: int, heads: int, kv_heads: int, inner: int, **more: Any
):
    dim = more.pop("head_dim", width // heads)
    return Config(
        family="llama",
        vocab=vocab,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        feed_forward=inner,
        context=131072,
        rope=Rope(dims=dim, theta=500000.0),
        dtype="bfloat16",
        **more,
    )


# Llama 2 7B, Llama 3 8B, Llama 3.2 1B.
SHAPES = {
    "7b": _config(32000, 32, 4096, 32, 32, 11008),
    "8b": _config(128256, 32, 4096, 32, 8, 14336),
    "1b": _config(128256, 16, 2048, 32, 8, 8192, tied=True),
    "tiny": _config(97, 2, 64, 4, 2, 64, head_dim=64),
}
KINDS = {
    "bfloat16": jkv.dense(),
    "int8": jkv.quantized(bits=8),
    "int4": jkv.quantized(bits=4),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """A model and a cache."""

    shape: str
    cache: str  # one of KINDS
    rows: int
    slots: int

    @property
    def config(self) -> Config:
        """Of the model."""
        return SHAPES[self.shape]

    @property
    def filled(self) -> int:
        """Tokens before the first step: the last one finds all slots full."""
        return self.slots - STEPS * (ROUNDS + 1)


def points(shapes: tuple[str, ...]) -> Iterator[list[Point]]:
    """What is measured, for one shape after another, one row before eight."""
    for shape in shapes:
        slots = 512 if shape == "tiny" else 8192
        yield [Point(shape, cache, rows, slots) for rows in (1, 8) for cache in KINDS]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)


def outline(config: Config) -> Any:
    """The model's shapes."""
    return jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def model(config: Config) -> Any:
    """Random weights, made on the device one array after another."""
    leaves, tree = jax.tree.flatten(outline(config))
    made = []
    for i, leaf in enumerate(leaves):
        # A counter's generator: ordinary keys take a second for a gigabyte.
        key = jax.random.key(i, impl="rbg")
        one = leaf.ndim < 2
        made.append(
            jnp.ones(leaf.shape, leaf.dtype) if one else _normal(key, leaf.shape, leaf.dtype)
        )
    return jax.tree.unflatten(tree, made)


def state_of(point: Point) -> loop.State:
    """A loop's state after `filled` tokens of no meaning."""
    cache = jkv.init_cache(point.config, KINDS[point.cache], batch=point.rows, slots=point.slots)
    lengths = jnp.full((point.rows,), point.filled, jnp.int32)
    keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), 1000))
    layers = jax.tree.map(lambda leaf: full(leaf, next(keys)), cache.layers)
    return loop.State(
        cache=replace(cache, layers=layers, lengths=lengths),
        token=jnp.zeros((point.rows,), jnp.int32),
        done=jnp.zeros((point.rows,), bool),
        sampling=(),
        faults=Faults.none(point.rows),
    )


def lowered(point: Point) -> tuple[Any, str]:
    """The program of some steps, not compiled yet, and which attention it has."""
    shapes = outline(point.config), jax.eval_shape(functools.partial(state_of, point))
    ends = jax.ShapeDtypeStruct((point.rows, 1), jnp.int32)
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    with dispatch.record() as names:
        program = programs.advance_jit.lower(STEPS, *shapes, None, None, ends, steps)
    return program, "+".join(names)


def bytes_of(point: Point) -> tuple[int, float]:
    """Bytes that a step reads: of the weights, and of the cache at half of the measured steps."""
    shapes, config = outline(point.config), point.config
    weights = nbytes(shapes)
    if not config.tied:  # of the embedding only the rows of the tokens are read
        weights -= config.vocab * config.width * jnp.dtype(config.dtype).itemsize
    cache = nbytes(jax.eval_shape(functools.partial(state_of, point)).cache.layers)
    middle = point.filled + STEPS * (ROUNDS + 2) / 2
    return weights, cache * middle / point.slots


def room() -> int | None:
    """Bytes of the device's memory, where it says."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None


def seconds(program: Any, weights: Any, point: Point) -> float:
    """Of a step: the median of some rounds after one that does not count."""
    state = jax.jit(state_of, static_argnums=0)(point)
    ends, steps = jnp.full((point.rows, 1), -1, jnp.int32), jnp.int32(STEPS)
    took = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        state, tokens, *_ = program(weights, state, None, None, ends, steps)
        jax.block_until_ready(tokens)
        took.append(time.perf_counter() - start)
    if int(jnp.min(state.cache.lengths)) != point.slots:
        raise RuntimeError(f"{point} ended early, with {state.cache.lengths} tokens")
    return statistics.median(took[1:]) / STEPS


def measure(shapes: tuple[str, ...], until: float, tell: Tell) -> dict[str, Any]:
    """All points until the time is up.

    Args:
        shapes: names of `SHAPES`.
        until: begin nothing after this moment of `time.monotonic`.
        tell: is given all there is, and what is new in a line, as it comes.
    """
    rate = copy_bandwidth(SMALL if shapes == ("tiny",) else Grid())
    section: dict[str, Any] = {"copy bandwidth": rate, "points": [], "left out": []}
    tell(section, f"copy: {rate / 1e9:.0f} GB/s")

    def done(entry: dict[str, Any]) -> None:
        section["points"].append(entry)
        what = entry.get("why not") or (
            f"{1e3 * entry['seconds per step']:.2f} ms, {entry['share']:.0%} of the floor"
        )
        tell(section, f"{entry['shape']}, {entry['rows']} rows, {entry['cache']}: {what}")

    for group in points(shapes):
        for entry in _ours(group, rate, until):
            done(entry) if "late" not in entry else section["left out"].append(entry)
    # Afterwards, as they share the memory with a pool that JAX gives nothing back of.
    for group in points(shapes):
        for point in group[:: len(KINDS)]:
            entry = {**dataclasses.asdict(point), "cache": THEIRS}
            if time.monotonic() > until:
                section["left out"].append(entry)
            else:
                done(entry | _theirs(point, rate))
    return section


def _ours(group: list[Point], rate: float, until: float) -> Iterator[dict[str, Any]]:
    if time.monotonic() > until:
        yield from ({**dataclasses.asdict(point), "late": True} for point in group)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs: dict[Point, tuple[Future[Any], str] | str] = {}
        for point in group:
            need, have = sum(bytes_of(point)), room()
            if have is not None and need > 0.95 * have:
                programs[point] = f"{need / 2**30:.0f} GiB, and there are {have / 2**30:.0f}"
                continue
            program, attention = lowered(point)
            programs[point] = pool.submit(program.compile), attention
    weights = model(group[0].config)
    for point, found in programs.items():
        entry = dataclasses.asdict(point)
        if isinstance(found, str):
            yield entry | {"why not": found}
        elif time.monotonic() > until:
            yield entry | {"late": True}
        else:
            step = seconds(found[0].result(), weights, point)
            yield entry | {"attention": found[1]} | _figures(point, step, rate)


def _figures(point: Point, step: float, rate: float) -> dict[str, Any]:
    floor = sum(bytes_of(point)) / rate
    return {
        "seconds per step": step,
        "tokens per second": point.rows / step,
        "floor, seconds": floor,
        "share": floor / step,
    }


def _theirs(point: Point, rate: float) -> dict[str, Any]:
    """What transformers does, on weights and prompts of its own: a static cache, compiled."""
    try:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        return {"why not": f"{error.name} is not installed"}
    if not torch.cuda.is_available():
        return {"why not": "torch sees no GPU"}
    config, new = point.config, STEPS + 1
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.width,
        intermediate_size=config.feed_forward,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=config.tied,
    )
    kept = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            made = transformers.LlamaForCausalLM(settings).eval()
        # On a GPU `generate` compiles the step whenever the cache is static.
        run = Transformers(THEIRS, made, cache_implementation="static")
        prompts = np.random.default_rng(0).integers(0, config.vocab, (point.rows, point.filled))
        steps = [run(prompts, new).step for _ in range(3)]
    except RuntimeError as error:  # no memory, mostly
        return {"why not": f"{type(error).__name__}: {str(error)[:200]}"}
    finally:
        torch.set_default_dtype(kept)
        torch.cuda.empty_cache()
    # Theirs is in bfloat16 whatever the point's cache.
    plain = dataclasses.replace(point, cache="bfloat16")
    return _figures(plain, statistics.median(steps[1:]), rate)
