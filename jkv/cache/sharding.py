"""Shard key/value heads over the devices of a mesh; each attends to its own without communication.

Tensor parallelism as of Shoeybi et al. 2019 (arXiv:1909.08053): attention is the same for any
number of heads, so that every kind of cache, and every kernel, runs on each device as on one alone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from jkv._axes import Array
from jkv.cache.protocol import L, LayerCache, Step
from jkv.ops.masks import AttentionSpec


def mesh_of(model: object) -> Mesh | None:
    """Return the mesh that a model's heads are sharded over, None for one device."""
    return getattr(model, "mesh", None)


def partition_specs(layers: Any, mesh: Mesh) -> Any:
    """Return how the leaves of layers lie over a mesh, as each layer's `partition_spec` says.

    Args:
        layers: a `LayerCache`, or a pytree of them.
        mesh: of one axis.
    """
    (axis,) = mesh.axis_names
    return jax.tree.map(
        lambda layer: layer.partition_spec(axis),
        layers,
        is_leaf=lambda x: isinstance(x, LayerCache),
    )


def shard_layers(layers: tuple[L, ...], mesh: Mesh | None) -> tuple[L, ...]:
    """Constrain layers, in a program, to lie with each device's own heads."""
    if mesh is None:
        return layers

    def shard(layer: L) -> L:
        # Scales of pages as one TPU lays them are lines of all heads.
        layer = layer.portable() if layer.rounds else layer
        there = jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(layer, mesh))
        return jax.tree.map(lax.with_sharding_constraint, layer, there)

    return tuple(map(shard, layers))


def attend(
    layer: LayerCache,
    mesh: Mesh | None,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    step: Step,
    spec: AttentionSpec,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """Attend on each device for its own heads, see `LayerCache.attend`.

    Args:
        layer: a `LayerCache` of all heads.
        mesh: of one axis, or None for one device.
        q: queries of all heads.
        k: keys.
        v: values.
        step: as of `LayerCache.attend`.
        spec: likewise.

    Raises:
        UnsupportedError: a layer that cannot be parted.
    """
    if mesh is None:
        return layer.attend(q, k, v, step, spec)
    (axis,) = mesh.axis_names
    heads, held = PartitionSpec(None, None, axis), partition_specs(layer, mesh)

    def own(
        layer: LayerCache, q: Array, k: Array, v: Array, step: Step
    ) -> tuple[Array, LayerCache]:
        out, after = layer.attend(q, k, v, step, spec)
        return out, jax.tree.map(whole, after, held)

    def whole(leaf: Array, spec: PartitionSpec) -> Array:
        # What is of all heads, such as a flag, is raised for all by any of them.
        if axis in spec:
            return leaf
        if leaf.dtype == bool:  # of which there is no largest
            return lax.pmax(leaf.astype(jnp.int32), axis).astype(bool)
        return lax.pmax(leaf, axis)

    run = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(held, heads, heads, heads, PartitionSpec()),
        out_specs=(heads, held),
        check_vma=False,
    )
    return run(layer, q, k, v, step)
