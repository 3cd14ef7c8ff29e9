"""Copies of pages between the layers of a cache and arrays of the host."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jkv._axes import Array
from jkv._pytree import replace
from jkv.cache.paged import Paged
from jkv.engine.request import Contents
from jkv.ops.pages import gather, to_layout, write_pages

Layers = tuple[Paged, ...]
PageForm = list[tuple[tuple[int, ...], np.dtype]]  # shape and dtype of each leaf


@jax.jit
def gather_jit(layers: Layers, tables: tuple[Array, ...]) -> Contents:
    """Copy pages out of all layers, in a form that every device has.

    Args:
        layers: of a paged cache.
        tables: ``[n]`` page numbers for each group of layers; the copy holds anything at -1.
    """
    contents = []
    for layer in layers:
        at = jnp.maximum(tables[layer.group], 0)
        contents.append((gather(layer.k_pages, at), gather(layer.v_pages, at)))
    return contents


@functools.partial(jax.jit, donate_argnums=0)
def scatter_jit(layers: Layers, tables: tuple[Array, ...], contents: Contents) -> Layers:
    """Write pages that `gather_jit` has copied into all layers; nothing where a table has -1."""
    after = []
    for layer, (keys, values) in zip(layers, contents, strict=True):
        at = tables[layer.group]
        keys, values = (
            write_pages(held, to_layout(held, new), at)
            for held, new in ((layer.k_pages, keys), (layer.v_pages, values))
        )
        after.append(replace(layer, k_pages=keys, v_pages=values))
    return tuple(after)


def pad(values: Sequence[int] | np.ndarray, width: int, rest: int = -1) -> np.ndarray:
    """Return the values as an int32 array of `width`, `rest` after them."""
    out = np.full(width, rest, np.int32)
    out[: len(values)] = values
    return out
