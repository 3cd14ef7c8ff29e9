"""What other libraries are told of each pytree of this one: flax's state dicts, and `jax.export`.

Orbax needs to be told nothing: it saves and restores any pytree of arrays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import serialization
from jax import export

from jkv._description import describe, rebuild
from jkv._text import brief
from jkv.errors import UnsupportedError

_names: set[str] = set()  # by which exported programs know classes


def register(cls: type, data: tuple[str, ...], meta: tuple[str, ...]) -> None:
    """Register a class of pytrees with `jax.export` and `flax.serialization`.

    Args:
        cls: a class, registered as a pytree whose auxiliary data are the values of `meta`.
        data: its fields that are children.
        meta: its other fields.
    """
    _register_export(cls)
    _register_flax(cls, data, meta)


def _register_export(cls: type) -> None:
    """Let exported programs have it as an argument or a result.

    What they say of its other fields is read as a stored cache is: no code comes from there.
    """

    def serialize(aux: tuple[Any, ...]) -> bytes:
        arrays: dict[str, Any] = {}
        words = describe(aux, cls.__name__, arrays)
        if arrays:
            raise UnsupportedError(
                f"{cls.__name__} has arrays among its static fields: {aux!r:.60}"
            )
        return json.dumps(words).encode()

    def deserialize(data: bytes) -> tuple[Any, ...]:
        return rebuild(json.loads(data), {})

    name = f"{cls.__module__}:{cls.__qualname__}"
    # A class that is defined again, as a notebook's cell does that is run twice, is another one.
    count = sum(known.partition("#")[0] == name for known in _names)
    name = f"{name}#{count + 1}" if count else name
    _names.add(name)
    export.register_pytree_node_serialization(
        cls, serialized_name=name, serialize_auxdata=serialize, deserialize_auxdata=deserialize
    )


def _register_flax(cls: type, data: tuple[str, ...], meta: tuple[str, ...]) -> None:
    """Make its state dict that of its children, whose shapes and dtypes the target decides."""

    def to_state(node: object) -> dict[str, Any]:
        return {name: serialization.to_state_dict(getattr(node, name)) for name in data}

    def from_state(target: object, state: object) -> object:
        if not isinstance(state, Mapping) or set(state) != set(data):
            got = sorted(state) if isinstance(state, Mapping) else state
            raise ValueError(
                f"a state dict has {brief(got)} for a {cls.__name__}; expected {list(data)}, those "
                "of a cache of the same kind"
            )
        node = object.__new__(cls)
        for name in meta:
            object.__setattr__(node, name, getattr(target, name))
        for name in data:
            old = getattr(target, name)
            new = serialization.from_state_dict(old, state[name], name=name)
            _check(f"{cls.__name__}.{name}", old, new)
            object.__setattr__(node, name, new)
        return node

    serialization.register_serialization_state(cls, to_state, from_state)


def _check(where: str, old: object, new: object) -> None:
    """Check that what was restored has the shape and dtype that its place had.

    Raises:
        ValueError: another one, or nothing where there was something.
    """
    if isinstance(old, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        alike = isinstance(new, jax.Array | np.ndarray) and (new.shape, new.dtype) == (
            old.shape,
            old.dtype,
        )
        if not alike:
            expected = f"{old.dtype}{list(old.shape)}"
            raise ValueError(f"a state dict has {brief(new)} for {where}; expected {expected}")
    elif (old is None) != (new is None):
        raise ValueError(f"a state dict has {brief(new)} for {where}; expected {brief(old)}")
