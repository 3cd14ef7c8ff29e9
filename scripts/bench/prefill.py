"""A layer's prefill over a dense cache: what is chosen, beside XLA's attention for all of it."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jkv
from jkv import ops
from jkv.cache.protocol import Step
from jkv.errors import UnsupportedError
from jkv.ops import AttentionSpec, dispatch


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Rows of `new` tokens each, after `past` others."""

    new: int
    past: int
    rows: int = 8
    shape: tuple[int, int, int] = (32, 8, 128)  # as in `attention.MODELS`: a Llama 3 8B
    dtype: str = "bfloat16"
    calls: int = 10
    rounds: int = 5

    def described(self) -> dict[str, Any]:
        """For a file."""
        return {name: getattr(self, name) for name in ("new", "past", "rows")}

    @property
    def flops(self) -> float:
        """Of both products over what is seen."""
        pairs = self.new * self.past + self.new * (self.new + 1) / 2
        return 4 * self.rows * self.shape[0] * self.shape[2] * pairs


POINTS = tuple(Prefill(new, past) for new in (512, 2048) for past in (0, 6144))
TINY = (
    Prefill(32, 0, 2, (4, 2, 8), "float32", 1, 1),
    Prefill(32, 32, 2, (4, 2, 8), "float32", 1, 1),
)


def chosen(q: Any, k: Any, v: Any, layer: Any, step: Step) -> Any:
    """As a cache does it."""
    return layer.attend(q, k, v, step, AttentionSpec(q.shape[-1] ** -0.5))


def whole(q: Any, k: Any, v: Any, layer: Any, step: Step) -> Any:
    """By XLA alone, over all that is held once the new tokens are."""
    layer = layer.append(k, v, step)
    kv = ops.ContiguousKV(layer.keys, layer.values, lengths=step.stop)
    part = ops.attention(q, kv, step.positions, implementation="xla")
    return part.out.astype(q.dtype), layer


CONTENDERS: dict[str, Callable[..., Any]] = {"jkv": chosen, "jkv, xla": whole}


def measure(points: tuple[Prefill, ...], until: float, say: Callable[[str], None]) -> list[Any]:
    """Microseconds and operations per second; told, not timed, where the two differ."""
    found = []
    for point in points:
        want = None
        for name in reversed(CONTENDERS):
            if time.monotonic() > until:
                return found
            entry = {**point.described(), "contender": name}
            try:
                more, out = _measured(point, CONTENDERS[name], want)
            except (UnsupportedError, NotImplementedError, ValueError, RuntimeError) as error:
                more, out = {"why not": f"{type(error).__name__}: {str(error)[:200]}"}, None
            want = out if want is None else want
            found.append(entry | more)
            say(line(found[-1]))
    return found


def _measured(point: Prefill, contender: Any, want: Any) -> tuple[dict[str, Any], Any]:
    heads, kv_heads, dim = point.shape
    dtype = jnp.dtype(point.dtype)
    sizes = [heads, kv_heads, kv_heads]
    keys = jax.random.split(jax.random.key(3), 5)
    q, k, v = (
        jax.random.normal(key, (point.rows, point.new, n, dim), dtype)
        for key, n in zip(keys, sizes, strict=False)
    )
    layer = jkv.dense().init(point.rows, point.new + point.past, kv_heads, dim, dtype)
    held = layer.keys.shape
    layer = dataclasses.replace(
        layer,
        keys=jax.random.normal(keys[3], held, dtype),
        values=jax.random.normal(keys[4], held, dtype),
    )
    start = jnp.full((point.rows,), point.past, jnp.int32)
    step = Step.after(start, jnp.full_like(start, point.new), point.new)
    with dispatch.record() as names:
        run = jax.jit(functools.partial(contender), donate_argnums=3)
        out, layer = run(q, k, v, layer, step)
    entry: dict[str, Any] = {"attention": "+".join(names)}
    if want is not None:
        off = float(jnp.max(jnp.abs(out - want)) / jnp.max(jnp.abs(want)))
        entry["off by"] = off
        if not off <= 2e-2:
            return entry | {"wrong": True, "why not": f"WRONG: off by {off:.3g}"}, out
    best = math.inf
    for _ in range(point.rounds):
        begun = time.perf_counter()
        for _ in range(point.calls):
            result, layer = run(q, k, v, layer, step)
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - begun) / point.calls)
    return entry | {"microseconds": 1e6 * best, "flops per second": point.flops / best}, out


def line(entry: dict[str, Any]) -> str:
    """One result in a line."""
    what = f"prefill of {entry['rows']} x {entry['new']} after {entry['past']}"
    what += f", {entry['contender']}"
    if "why not" in entry:
        return f"{what}: {entry['why not']}"
    rate = entry["flops per second"] / 1e12
    return f"{what} ({entry['attention']}): {entry['microseconds']:.0f} us, {rate:.1f} TFLOP/s"


def summary(entries: list[dict[str, Any]]) -> list[str]:
    """How much faster what is chosen is."""
    times = {
        (e["new"], e["past"], e["contender"]): e["microseconds"]
        for e in entries
        if "microseconds" in e
    }
    lines = []
    for (new, past, name), took in times.items():
        other = times.get((new, past, "jkv, xla"))
        if name == "jkv" and other is not None:
            lines.append(f"prefill of {new} after {past}: {other / took:.2f} times XLA's (1.0)")
    return lines
