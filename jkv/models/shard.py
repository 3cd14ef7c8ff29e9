"""A decoder over several devices: weights placed so that each device has its own heads."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jkv import _compat
from jkv._text import plural
from jkv.models.decoder import Decoder
from jkv.models.lm import LM
from jkv.models.weights import add_copy

M = TypeVar("M", LM, Decoder)


def shard(lm: M, mesh: Mesh) -> M:
    """Shard a model over the devices of a mesh, each with its own heads and their caches.

    Heads, the feed-forward's inner units and the vocabulary are parted, and two sums per layer
    bring the parts together (Shoeybi et al. 2019, arXiv:1909.08053). Whatever runs a model runs
    this one, with any kind of cache: `generate`, `stream`, the engine, your own `jit`. Only scores
    that compare heads, such as `jkv.scores.tova`, cannot: each device sees its own. On a CPU
    ``jax.config.update("jax_num_cpu_devices", 2)``, before JAX starts, makes two devices of two
    cores.

    Args:
        lm: what `jkv.load` returns, or a decoder. It stays as it is.
        mesh: a `jax.sharding.Mesh` of one axis, ``jax.make_mesh((2,), ("heads",))``.

    Returns:
        The like, on these devices. A matrix whose parts would differ in size is whole on each.

    Raises:
        TypeError: no model, or no mesh.
        ValueError: a mesh of several axes, or of more devices than the key/value heads can be
            parted among.

    Example:
        >>> mesh = jax.make_mesh((1,), ("heads",))  # as many as there are devices
        >>> sharded = jkv.shard(lm, mesh)
        >>> sharded.model.mesh.axis_names
        ('heads',)
    """
    if isinstance(lm, LM):
        return dataclasses.replace(lm, model=shard(lm.model, mesh))
    if not isinstance(lm, Decoder):
        raise TypeError(
            f"shard got a {type(lm).__name__}; expected what jkv.load returns, or a decoder"
        )
    if not isinstance(mesh, Mesh):
        raise TypeError(f"shard got a {type(mesh).__name__}; expected a jax.sharding.Mesh")
    if len(mesh.axis_names) != 1:
        raise ValueError(
            f"shard got a mesh of axes {mesh.axis_names}; expected one, over which heads are "
            'parted: jax.make_mesh((devices,), ("heads",))'
        )
    if lm.config.kv_heads % mesh.size:
        raise ValueError(
            f"shard got {plural(mesh.size, 'device')} for "
            f"{plural(lm.config.kv_heads, 'key/value head')}; expected a number that divides them"
        )
    # What is between is parted by the compiler: axes of explicit type would ask the model how.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    (axis,) = mesh.axis_names
    model = nnx.clone(lm)  # with variables of its own
    outputs, inputs = PartitionSpec(axis), PartitionSpec(None, axis)
    where = {id(model.embedding): outputs}
    if model.head is not None:
        where[id(model.head.kernel)] = outputs
    for block in model.blocks:
        block.attention.mesh = mesh
        attention, mlp = block.attention, block.mlp
        for linear in (attention.q, attention.k, attention.v, mlp.up, mlp.gate):
            if linear is not None:
                where |= {id(linear.kernel): outputs, id(linear.bias): outputs}
        for linear in (attention.o, mlp.down):
            where[id(linear.kernel)] = inputs
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param):
            value = _compat.get_value(node)
            sharding = _sharding_of(mesh, where.get(id(node)), value.shape)
            _compat.set_value(node, _place(value, sharding))
    add_copy(lm, model)
    return model


def _place(
    value: jax.Array | jax.ShapeDtypeStruct, there: NamedSharding
) -> jax.Array | jax.ShapeDtypeStruct:
    """Put an array there, or give the shape of a future array its sharding."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=there)
    return jax.device_put(value, there)


def _sharding_of(mesh: Mesh, spec: PartitionSpec | None, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding into equal parts where possible, else replicated."""
    if spec is None or shape[len(spec) - 1] % mesh.size:
        spec = PartitionSpec()
    return NamedSharding(mesh, spec)
