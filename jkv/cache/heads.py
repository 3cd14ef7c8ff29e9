"""Key/value heads over the devices of a mesh: each has its own of every layer, and asks nobody.

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
from jkv.cache.protocol import Step
from jkv.errors import UnsupportedError
from jkv.ops.masks import AttentionSpec
from jkv.ops.pages import Tiled


def mesh_of(model: Any) -> Mesh | None:
    """Over which a model's heads are parted, if they are; whatever runs like a decoder is one."""
    return getattr(model, "mesh", None)


def specs(layers: Any, mesh: Mesh) -> Any:
    """How the leaves of layers lie: what has heads has them second, the rest is of rows or pages.

    Args:
        layers: a `LayerCache`, or a pytree of them.
        mesh: of one axis.
    """
    (axis,) = mesh.axis_names
    second = PartitionSpec(None, axis)
    return jax.tree.map(lambda x: second if x.ndim > 1 else PartitionSpec(), layers)


def parted(layers: tuple[Any, ...], mesh: Mesh | None) -> tuple[Any, ...]:
    """Layers in a program, each device with its own heads; as they are without a mesh."""
    if mesh is None:
        return layers

    def one(layer: Any) -> Any:
        if not hasattr(layer, "attend"):
            return layer  # tokens, of which a model makes keys and values anew
        # Scales of pages as one TPU lays them are lines of all heads.
        layer = layer.plain() if getattr(layer, "rounds", False) else layer
        there = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(layer, mesh))
        return jax.tree.map(lax.with_sharding_constraint, layer, there)

    return tuple(map(one, layers))


def _check(layer: Any) -> None:
    """Refuse what cannot be parted.

    Raises:
        UnsupportedError: a score of several heads together, or pages whose scales lie together.
    """
    score = getattr(layer, "score", None)
    if getattr(score, "across_heads", False):
        raise UnsupportedError(
            f"the score {score} compares all heads, of which each device sees its own; use one of "
            "single heads, such as jkv.scores.h2o, or a model that is not sharded"
        )
    if isinstance(getattr(layer, "k_pages", None), Tiled) and layer.rounds:
        raise UnsupportedError(
            "these pages lie as one TPU wants them, the scales of all heads together; give the "
            "sharded model a cache whose layers are layer.plain() of these"
        )


def attend(
    layer: Any,
    mesh: Mesh | None,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    step: Step,
    spec: AttentionSpec,
) -> tuple[Float[Array, "B T N H"], Any]:
    """`LayerCache.attend`, on each device for its own heads.

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
    _check(layer)
    (axis,) = mesh.axis_names
    heads, held = PartitionSpec(None, None, axis), specs(layer, mesh)

    def own(layer: Any, q: Array, k: Array, v: Array, step: Step) -> tuple[Array, Any]:
        out, after = layer.attend(q, k, v, step, spec)
        return out, jax.tree.map(whole, after)

    def whole(leaf: Array) -> Array:
        # A flag is raised for all heads by any of them.
        if leaf.ndim > 1:
            return leaf
        return lax.pmax(leaf.astype(jnp.int32), axis).astype(leaf.dtype)

    run = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(held, heads, heads, heads, PartitionSpec()),
        out_specs=(heads, held),
        check_vma=False,
    )
    return run(layer, q, k, v, step)
