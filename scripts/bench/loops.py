"""Decode loops and prefills to compile, of any size: nothing of them is ever allocated."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jkv
from jkv import ops
from jkv._pytree import replace
from jkv.cache import init_cache, sharding
from jkv.decoding import loop, programs
from jkv.decoding.faults import Faults
from jkv.models import Config, Decoder, Rope
from jkv.ops import pages
from jkv.ops.codecs import Affine, Encoded, Float8


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode loop to compile."""

    kind: Any
    batch: int
    groups: int
    new: int = 1  # tokens per pass: 1 decodes, more is a chunk of a prefill
    kv_heads: int = 4
    slots: int = 1024
    head_dim: int = 64
    layers: int = 2
    width: int = 64
    feed_forward: int = 64
    vocab: int = 128
    dtype: str = "float32"
    parts: int = 1  # devices, over which the heads are parted


@dataclasses.dataclass(frozen=True)
class Paged:
    """A decode loop over pages, of attention alone: each step writes a page and looks at all."""

    form: str  # one of `forms_of_pages`
    page: int
    batch: int
    groups: int
    slots: int = 32768
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 2
    dtype: str = "bfloat16"


def program(case: Case) -> tuple[Any, Any, Any]:
    """The jitted function, the shapes of its arguments, and of the cache among them."""
    config = Config(
        vocab=case.vocab,
        layers=case.layers,
        width=case.width,
        heads=case.kv_heads * case.groups,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        feed_forward=case.feed_forward,
        context=case.slots,
        rope=Rope(dims=case.head_dim),
        dtype=case.dtype,
    )
    rows = jnp.zeros((case.batch,), jnp.int32)

    def arguments() -> Any:
        model = Decoder(config, rngs=nnx.Rngs(0))
        cache = init_cache(config, case.kind, batch=case.batch, slots=case.slots)
        if case.new > 1:
            tokens = jnp.zeros((case.batch, case.new), jnp.int32)
            last = jnp.zeros((case.batch, config.width), case.dtype)
            return model, tokens, cache, rows, last
        faults = Faults.none(case.batch)
        state = loop.State(cache=cache, token=rows, done=rows > 0, sampling=(), faults=faults)
        ends = jnp.zeros((case.batch, 1), jnp.int32)
        return model, state, None, None, ends, jnp.int32(0)

    shapes = jax.eval_shape(arguments)
    if case.new > 1:
        return programs.absorb_jit, shapes, shapes[2]
    advanced: Any = programs.advance_jit  # without its jit, whose first argument is static
    decode = jax.jit(functools.partial(advanced.__wrapped__, 32), donate_argnums=1)
    return decode, shapes, shapes[1].cache


def forms_of_pages() -> dict[str, Any]:
    """Codecs of keys and values in pages by name; None is as they are."""
    return {
        "exact": None,
        "int8": (Affine(8), Affine(8)),
        "int4": (Affine(4, axis="channel", group=64), Affine(4)),
        "int4 by token": (Affine(4), Affine(4)),
        "fp8": (Float8(), Float8()),
    }


def paged_program(case: Paged) -> tuple[Any, Any, Any]:
    """As `program`, for pages: keys and values of all layers, and tables of the rows' pages.

    A token goes into its page while that is on its way into the chip; keys that are encoded some
    tokens at a time are written so, whenever their last is there.
    """
    columns, count = case.slots // case.page, case.kv_heads * case.groups
    sizes = (case.batch * columns, case.kv_heads, case.page, case.head_dim)
    codecs = forms_of_pages()[case.form] or (None, None)
    units = [1 if codec is None else codec.block_size for codec in codecs]

    def put(held: Any, unit: int, tokens: Any, table: Any, length: Any) -> Any:
        at = jnp.take_along_axis(table, length[:, None] // case.page, axis=1)[:, 0]
        inside = length % case.page
        old = pages.gather(held, at)
        if isinstance(old, Encoded):
            tokens = jnp.repeat(tokens, unit, axis=1)
            whole = jnp.where((inside + 1) % unit == 0, inside // unit, -1)
            new: Any = old.write_blocks(tokens, whole[:, None])
        else:
            own = jnp.arange(case.page)[None, None, :, None] == inside[:, None, None, None]
            new = jnp.where(own, jnp.swapaxes(tokens, 1, 2).astype(old.dtype), old)
        return pages.write_pages(held, pages.to_layout(held, new), at)

    def step(_: Any, state: Any) -> Any:
        layers, table, length, x = state
        after = []
        for pools in layers:
            new = jnp.mean(x.reshape(case.batch, 1, case.kv_heads, case.groups, -1), axis=3)
            k, v = (put(p, u, new, table, length) for p, u in zip(pools, units, strict=True))
            kv = ops.PagedKV(k, v, table, length + 1)
            x = ops.attention(x, kv, length[:, None]).out.astype(case.dtype)
            after.append((k, v))
        return after, table, length + 1, x

    def arguments() -> Any:
        layers = [pages.empty(codecs, *sizes, jnp.dtype(case.dtype)) for _ in range(case.layers)]
        table = jnp.zeros((case.batch, columns), jnp.int32)
        x = jnp.zeros((case.batch, 1, count, case.head_dim), case.dtype)
        return layers, table, jnp.zeros((case.batch,), jnp.int32), x

    shapes = jax.eval_shape(arguments)
    decode = jax.jit(lambda state: jax.lax.fori_loop(0, 32, step, state), donate_argnums=0)
    return decode, (shapes,), shapes[0]


def over(arguments: Any, there: Any) -> Any:
    """Shapes of what `program` decodes with, over devices, as `jkv.shard` and its loop lay them."""
    mesh = Mesh(np.array(there), ("heads",))

    def placed(leaf: Any, spec: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def everywhere(leaf: Any) -> Any:
        return placed(leaf, PartitionSpec())

    model, state, *rest = arguments
    layers = state.cache.layers
    layers = jax.tree.map(placed, layers, sharding.partition_specs(layers, mesh))
    state = jax.tree.map(everywhere, state)
    state = replace(state, cache=replace(state.cache, layers=layers))
    return jkv.shard(model, mesh), state, *jax.tree.map(everywhere, rest)
