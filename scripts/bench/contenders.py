"""One decode step's attention over caches of many forms, and what else there is for it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkv import ops
from jkv._pytree import nbytes
from jkv.errors import UnsupportedError
from jkv.ops import dispatch
from jkv.ops.codecs import Affine, Float8

# Query heads, key/value heads and channels of one layer.
MODELS = {
    "llama-3-8b": (32, 8, 128),
    "llama-2-7b": (32, 32, 128),
    "qwen2.5-7b": (28, 4, 128),
}
FORMS: dict[str, Any] = {
    "bfloat16": None,
    "int8": (Affine(8), Affine(8)),
    "fp8": (Float8(), Float8()),
    "int4": (Affine(4, axis="channel", group=64), Affine(4)),
    "int4 by token": (Affine(4), Affine(4)),
}
MOST = 40 << 30  # bytes of a cache that are tried
POOL = 256 << 20  # bytes of all caches in turn: more than any chip's cache memory


@dataclasses.dataclass(frozen=True)
class Point:
    """What is timed: a token per row, every row as long as its buffer."""

    model: str
    rows: int
    slots: int
    form: str
    page: int | None
    dtype: str = "bfloat16"
    shape: tuple[int, int, int] = (0, 0, 0)

    def described(self) -> dict[str, Any]:
        """For a file."""
        names = ("model", "rows", "slots", "form", "page")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Grid:
    """All points, those first that tell most."""

    models: tuple[str, ...] = tuple(MODELS)
    rows: tuple[int, ...] = (8, 1, 64)
    slots: tuple[int, ...] = (32768, 8192, 131072, 1024)
    forms: tuple[str, ...] = tuple(FORMS)
    pages: tuple[int | None, ...] = (None, 16, 64)
    rounds: int = 5
    steps: int = 32  # of one program
    copied: int = 4 << 30  # bytes
    pool: int = POOL
    dtype: str = "bfloat16"
    shape: tuple[int, int, int] | None = None

    def points(self) -> Iterator[Point]:
        """Without pages that a form's units of tokens do not fit into, and what is too big."""
        for model in self.models:
            for slots in self.slots:
                for rows in self.rows:
                    for page in self.pages:
                        for form in self.forms:
                            shape = self.shape or MODELS[model]
                            size = 4 * rows * slots * shape[1] * shape[2]
                            unit = max((codec.block_size for codec in FORMS[form] or ()), default=1)
                            if size <= MOST and (page is None or page % unit == 0):
                                yield Point(model, rows, slots, form, page, self.dtype, shape)


TINY = Grid(
    models=("llama-3-8b",),
    rows=(2,),
    slots=(128,),
    forms=("bfloat16", "int8"),
    pages=(None, 64),
    rounds=1,
    steps=1,
    copied=1 << 20,
    pool=1,
    shape=(4, 2, 128),
)


def copy_bandwidth(grid: Grid) -> float:
    """Bytes per second, read and written, at which an array is copied; the best of some rounds."""
    x = jnp.ones((grid.copied // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    best = math.inf
    for _ in range(grid.rounds + 2):
        start = time.perf_counter()
        jax.block_until_ready(copy(x))
        best = min(best, time.perf_counter() - start)
    return 2 * grid.copied / best


def drawn(point: Point, seed: int) -> tuple[Any, Any]:
    """Keys and values [B, K, S, H] or [P, K, page, H]: any numbers that are finite."""
    _, heads, dim = point.shape
    page = point.page or point.slots
    many = point.rows * point.slots // page
    codecs = FORMS[point.form]
    key = jax.random.key(seed)

    @functools.partial(jax.jit, static_argnums=0)
    def fill(which: int, key: Any) -> Any:
        if codecs is None:
            return jax.random.normal(key, (many, heads, page, dim), jnp.dtype(point.dtype))
        empty = codecs[which].empty(many, heads, page, dim, jnp.dtype(point.dtype))
        return jax.tree.map(lambda x: full(x, key), empty)

    return fill(0, key), fill(1, jax.random.fold_in(key, 1))


def full(x: Any, key: Any) -> Any:
    """An array of a cache with anything in it: normal numbers, or codes, steps and zero points."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jax.random.normal(key, x.shape, x.dtype)
    if x.dtype == jnp.uint8:
        return jax.random.bits(key, x.shape, jnp.uint8) & jnp.uint8(0xBB)  # no NaN
    if x.dtype == jnp.uint16:
        step = jax.lax.bitcast_convert_type(jnp.bfloat16(0.02), jnp.uint16)
        return jnp.full(x.shape, step, x.dtype)
    return jnp.full(x.shape, -8, x.dtype) if x.dtype == jnp.int16 else x


class Mine:
    """This library, an implementation by name or the one it chooses."""

    def __init__(self, point: Point, implementation: str | None = None) -> None:
        self.point, self.implementation = point, implementation

    def refusal(self) -> str | None:
        """Why it cannot."""
        return None

    def prepared(self, q: Any, k: Any, v: Any) -> Any:
        """Cache as it is wanted."""
        del q
        return k, v

    def __call__(self, q: Any, cache: Any, lengths: Any) -> Any:
        """Output [B, 1, N, H]."""
        point = self.point
        (k, v), at = cache, lengths[:, None] - 1
        if point.page is None:
            kv = ops.ContiguousKV(k, v, lengths=lengths)
            return ops.attention(q, kv, at, implementation=self.implementation).out
        many = point.rows * point.slots // point.page
        table = np.random.default_rng(0).permutation(many).reshape(point.rows, -1)
        table = jnp.asarray(table, jnp.int32)
        paged = ops.PagedKV(k, v, table, lengths)
        return ops.attention(q, paged, at, implementation=self.implementation).out


class Library(Mine):
    """`jax.nn.dot_product_attention`, whose caches are [B, S, K, H]."""

    def refusal(self) -> str | None:
        """Why it cannot."""
        if self.implementation == "cudnn" and jax.default_backend() != "gpu":
            return "no GPU"
        return None

    def prepared(self, q: Any, k: Any, v: Any) -> Any:
        """Cache as it is wanted."""
        del q
        return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def __call__(self, q: Any, cache: Any, lengths: Any) -> Any:
        """Output [B, 1, N, H]."""
        named: Any = self.implementation
        attention: Any = jax.nn.dot_product_attention
        return attention(q, *cache, key_value_seq_lengths=lengths, implementation=named)


class Triton(Library):
    """The decode kernel in `jax.experimental.pallas.ops.gpu`, deprecated."""

    def refusal(self) -> str | None:
        """Why it cannot."""
        if jax.default_backend() != "gpu":
            return "no GPU"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module("jax.experimental.pallas.ops.gpu.decode_attention")
        except ImportError as error:
            return f"cannot be imported: {error}"
        return None

    def __call__(self, q: Any, cache: Any, lengths: Any) -> Any:
        """Output [B, 1, N, H]."""
        del lengths
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module("jax.experimental.pallas.ops.gpu.decode_attention")
            return module.gqa(q[:, 0], *cache)[:, None]


class Torch(Mine):
    """torch's attention, timed by its own clock; caches are [B, K, S, H]."""

    def refusal(self) -> str | None:
        """Why it cannot."""
        try:
            torch = importlib.import_module("torch")
        except ImportError:
            return "torch is not installed"
        return None if torch.cuda.is_available() else "torch sees no GPU"

    def step(self, q: Any, k: Any, v: Any) -> Any:
        """One token of each row, q being [B, N, 1, H]."""
        torch = importlib.import_module("torch")
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class TorchFlash(Torch):
    """FlashAttention as torch has it: nothing else is allowed to take its place."""

    def step(self, q: Any, k: Any, v: Any) -> Any:
        """One token of each row, q being [B, N, 1, H]."""
        found = importlib.import_module("torch.nn.attention")
        with found.sdpa_kernel(found.SDPBackend.FLASH_ATTENTION):
            return super().step(q, k, v)


class FlashAttention(Torch):
    """The package flash_attn, whose caches are [B, S, K, H]: its form for decoding, split KV."""

    def refusal(self) -> str | None:
        """Why it cannot."""
        try:
            importlib.import_module("flash_attn")
        except ImportError:
            return "flash_attn is not installed"
        return super().refusal()

    def step(self, q: Any, k: Any, v: Any) -> Any:
        """One token of each row; the same bytes, taken as this package orders them."""
        attend = importlib.import_module("flash_attn").flash_attn_with_kvcache
        batch, heads, slots, dim = k.shape
        k, v = (x.view(batch, slots, heads, dim) for x in (k, v))
        return attend(q.transpose(1, 2), k, v, cache_seqlens=slots)


def contenders(point: Point) -> dict[str, Mine]:
    """Who takes part, this library first."""
    found: dict[str, Mine] = {"jkv": Mine(point)}
    if jax.default_backend() != "cpu":  # where it is not what is chosen
        found["jkv, xla"] = Mine(point, "xla")
    if point.form == "bfloat16" and point.page is None:
        found["jax.nn, xla"] = Library(point, "xla")
        found["jax.nn, cudnn"] = Library(point, "cudnn")
        found["pallas triton"] = Triton(point)
        found["torch sdpa"] = Torch(point)
        found["torch flash"] = TorchFlash(point)
        found["flash_attn"] = FlashAttention(point)
    return found


def measure(point: Point, contender: Mine, rate: float, grid: Grid) -> dict[str, Any]:
    """Microseconds of a step, and the share of the copy's bandwidth; or why there are none."""
    why = contender.refusal()
    if why is not None:
        return {"why not": why}
    heads, _, dim = point.shape
    q = jax.random.normal(jax.random.key(9), (point.rows, 1, heads, dim), jnp.dtype(point.dtype))
    size = nbytes(jax.eval_shape(functools.partial(drawn, point, 0)))
    try:
        if isinstance(contender, Torch):
            seconds, extra = _torch_seconds(point, contender, grid, size), {}
        else:
            seconds, extra = _seconds(point, contender, q, grid, size)
    except (UnsupportedError, NotImplementedError, ValueError, RuntimeError) as error:
        return {"why not": f"{type(error).__name__}: {str(error)[:200]}"}
    if seconds is None:
        return extra
    return extra | {
        "microseconds": 1e6 * seconds,
        "bytes": size,
        "bytes per second": size / seconds,
        "share": size / seconds / rate,
    }


def _seconds(
    point: Point, contender: Mine, q: Any, grid: Grid, size: int
) -> tuple[float | None, dict[str, Any]]:
    caches = [
        contender.prepared(q, *drawn(point, i)) for i in range(min(-(-grid.pool // size), 32))
    ]
    lengths = jnp.full((point.rows,), point.slots, jnp.int32)
    with dispatch.record() as names:
        one = jax.jit(contender)
        first = one(q, caches[0], lengths)
    extra: dict[str, Any] = {"attention": "+".join(names)} if names else {}
    if contender.implementation is None and size <= 2 << 30:
        want = jax.jit(Mine(point, "reference"))(q, caches[0], lengths)
        off = float(jnp.max(jnp.abs(first - want)) / jnp.max(jnp.abs(want)))
        extra["off by"] = off
        if not off <= 2e-2:
            return None, extra | {"wrong": True, "why not": f"WRONG: off by {off:.3g}"}
    steps = max(grid.steps, len(caches))

    @jax.jit
    def many(q: Any, caches: Any, lengths: Any) -> Any:
        # One after another: each step's queries depend on what the last one found.
        for i in range(steps):
            out = one(q, caches[i % len(caches)], lengths)
            q = q + (out * 0).astype(q.dtype)
        return q

    jax.block_until_ready(many(q, caches, lengths))
    best = math.inf
    for _ in range(grid.rounds):
        start = time.perf_counter()
        jax.block_until_ready(many(q, caches, lengths))
        best = min(best, time.perf_counter() - start)
    return best / steps, extra


def _torch_seconds(point: Point, contender: Torch, grid: Grid, size: int) -> float:
    torch = importlib.import_module("torch")
    heads, kv_heads, dim = point.shape
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(point.rows, heads, 1, dim, **options)
    many = min(-(-grid.pool // size), 32)
    caches = [
        [torch.randn(point.rows, kv_heads, point.slots, dim, **options) for _ in range(2)]
        for _ in range(many)
    ]
    steps = max(grid.steps, many)

    def run() -> None:
        for i in range(steps):
            contender.step(q, *caches[i % many])

    try:
        run()
        torch.cuda.synchronize()
        # As one program, like ours: else a short step is the time that Python takes to ask for it.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        best = math.inf
        for _ in range(grid.rounds + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        del graph
    finally:
        caches.clear()
        torch.cuda.empty_cache()
    return best / steps


def summary(points: list[dict[str, Any]]) -> list[str]:
    """The figures that are to be reached, each beside what was measured."""
    mine = [p for p in points if p["contender"] == "jkv" and "share" in p]

    def of(**wanted: Any) -> dict[tuple[Any, ...], dict[str, Any]]:
        chosen = [p for p in mine if all(p[k] == v for k, v in wanted.items())]
        return {(p["model"], p["rows"], p["slots"]): p for p in chosen}

    plain, lines = of(form="bfloat16", page=None), []
    large = [p["share"] for p in plain.values() if p["rows"] * p["slots"] >= 1 << 18]
    if large:
        lines.append(f"bfloat16, 256k tokens and more: {min(large):.0%} of the copy (85 %)")
    for form, least in (("int8", 1.8), ("fp8", 1.8), ("int4", 3.0)):
        pairs = [(plain[k], p) for k, p in of(form=form, page=None).items() if k in plain]
        ratios = [a["microseconds"] / b["microseconds"] for a, b in pairs if a["slots"] >= 32768]
        if ratios:
            lines.append(f"{form} at 32k and more: {min(ratios):.2f} times as fast ({least})")
    for page in (16, 64):
        pairs = [(plain[k], p) for k, p in of(form="bfloat16", page=page).items() if k in plain]
        slower = [b["microseconds"] / a["microseconds"] - 1 for a, b in pairs]
        if slower:
            lines.append(f"pages of {page}: at most {max(slower):.0%} slower (5 %)")
    others = [p for p in points if not p["contender"].startswith("jkv") and "microseconds" in p]
    keyed = [(plain.get((p["model"], p["rows"], p["slots"])), p) for p in others]
    ratios = [b["microseconds"] / a["microseconds"] for a, b in keyed if a is not None]
    if ratios:
        lines.append(f"beside the others: {np.min(ratios):.2f} times as fast or more (1.0)")
    return lines
