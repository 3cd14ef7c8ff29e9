"""The variables of a decoder that hold a checkpoint's tensors, for reading and writing."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jkv import _compat
from jkv.errors import UnsupportedError
from jkv.models.config import Config
from jkv.models.decoder import Decoder, Linear
from jkv.models.families import Family
from jkv.models.tensor_names import Place


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor that a model needs, and the variables that hold it.

    Attributes:
        name: in the family's table.
        place: how it lies on disk.
        shape: on disk.
        owners: modules that hold the variables.
        variables: several, where the tensor is fused.
    """

    name: str
    place: Place
    shape: tuple[int, ...]
    owners: tuple[Any, ...]
    variables: tuple[nnx.Variable, ...]

    def fill(self, array: np.ndarray, dtype: str) -> None:
        """Set the variables to a tensor as it lies on disk."""
        if self.place.kind == "array":
            _compat.set_value(self.variables[0], _to_device(array, dtype))
            return
        if self.place.kind == "linear":
            array = array.T  # a view; what is copied below is the part in its final layout
        start = 0
        for owner, variable in zip(self.owners, self.variables, strict=True):
            part = array[..., start : start + owner.shape[1]]
            start += owner.shape[1]
            layout = Linear.layout(part) if self.place.kind != "bias" else part
            _compat.set_value(variable, _to_device(layout, dtype))

    def collect(self) -> np.ndarray:
        """Return the tensor as it lies on disk, from the variables: the inverse of `fill`.

        Raises:
            UnsupportedError: the variables hold shapes only, or lie on other processes' devices.
        """
        parts = [self._host(_compat.get_value(variable)) for variable in self.variables]
        if self.place.kind == "array":
            return parts[0]
        # `Linear.layout` is its own inverse: from [outputs, inputs] to [inputs, outputs].
        if self.place.kind != "bias":
            parts = [Linear.layout(part) for part in parts]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        return whole.T if self.place.kind == "linear" else whole

    def _host(self, value: jax.Array | jax.ShapeDtypeStruct) -> np.ndarray:
        if isinstance(value, jax.ShapeDtypeStruct):
            raise UnsupportedError(
                f"{self.name} has a shape and no values: an outline cannot be saved; use jkv.load"
            )
        if not getattr(value, "is_fully_addressable", True):
            raise UnsupportedError(
                f"{self.name} lies on devices of other processes: gather the weights first, with "
                "jax.experimental.multihost_utils.process_allgather"
            )
        return np.asarray(value)


def outline_model(config: Config) -> Decoder:
    """Make a decoder with shapes in place of the weights.

    All blocks are copies of one: to trace 1000 layers, which a configuration may claim in a few
    bytes, would take minutes.
    """
    one = dataclasses.replace(config, layers=1, windows=())
    model = nnx.eval_shape(lambda: Decoder(one, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model.blocks[0])
    blocks = [nnx.merge(graph, state, copy=True) for _ in range(config.layers)]
    for i, block in enumerate(blocks):
        block.attention.configure(config, config.window(i))
    model.config, model.blocks = config, _compat.module_list(blocks)
    return model


def find_slots(model: Decoder, family: Family) -> list[Slot]:
    """Find the rows of the family's table that this model has a place for."""
    slots = []
    for pattern, place in family.tensors.items():
        layers = range(len(model.blocks)) if "*" in pattern else (0,)
        for layer in layers:
            paths = [target.replace("*", str(layer)) for target in place.targets]
            slot = _slot(model, pattern.replace("*", str(layer)), place, paths)
            if slot is not None:
                slots.append(slot)
    return slots


def tensor_shapes(config: Config, family: Family) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors that a model needs, by name.

    All layers have the same shapes, so a model of one layer is enough: a configuration that claims
    1000 layers for a file of two is refused at once.
    """
    one = dataclasses.replace(config, layers=1, windows=(), dtype="float32")
    model = outline_model(one)
    place = {pattern.replace("*", "0"): pattern for pattern in family.tensors}
    shapes = {}
    for slot in find_slots(model, family):
        pattern = place[slot.name]
        for layer in range(config.layers) if "*" in pattern else (0,):
            shapes[pattern.replace("*", str(layer))] = slot.shape
    return shapes


def _slot(model: Decoder, name: str, place: Place, paths: list[str]) -> Slot | None:
    if place.kind == "array":
        owner, _, leaf = paths[0].rpartition(".")
        owners = (_walk(model, owner),)
        variables: tuple[Any, ...] = (getattr(owners[0], leaf, None),)
    else:
        leaf = "bias" if place.kind == "bias" else "kernel"
        owners = tuple(_walk(model, path) for path in paths)
        variables = tuple(getattr(owner, leaf, None) for owner in owners)
    if None in variables:
        return None
    if place.kind == "array":
        shape = variables[0].shape
    else:
        outputs = sum(owner.shape[1] for owner in owners)
        inputs = owners[0].shape[0]
        shape = {"bias": (outputs,), "linear": (outputs, inputs), "conv1d": (inputs, outputs)}[
            place.kind
        ]
    return Slot(name, place, tuple(shape), owners, variables)


def _walk(module: Any, path: str) -> Any:
    """Find the module at a path, None where a model of this configuration has none."""
    for step in path.split(".") if path else []:
        module = module[int(step)] if step.isdigit() else getattr(module, step, None)
        if module is None:
            return None
    return module


def _to_device(array: np.ndarray, dtype: str) -> jax.Array:
    """Copy to the device; `device_put` would alias memory on the CPU."""
    return jnp.array(array, dtype=jnp.dtype(dtype), copy=True)
