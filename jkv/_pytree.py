"""Frozen dataclasses as pytrees: the one way in which a value of this library is defined."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax

from jkv import _interop

T = TypeVar("T")
_STATIC = "jkv_static"


def static(**kwargs: Any) -> Any:
    """Mark a dataclass field as part of the tree's structure: hashable, compared when traced.

    Example:
        >>> @jkv.cache.pytree
        ... class Named:
        ...     name: str = jkv.cache.static()
        >>> jax.tree.leaves(Named("a"))
        []
        >>> jax.tree.structure(Named("a")) == jax.tree.structure(Named("b"))
        False
    """
    return dataclasses.field(metadata={_STATIC: True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass whose fields are pytree children, except `static()` ones.

    Unflattening bypasses `__init__`: JAX rebuilds trees around tracers, shapes and sentinels, and
    the checks of a constructor are meant for users.

    Example:
        >>> @jkv.cache.pytree
        ... class Counter:
        ...     counts: jax.Array
        ...     name: str = jkv.cache.static(default="tokens")
        >>> jax.tree.map(lambda x: x + 1, Counter(jnp.zeros(2))).counts.tolist()
        [1.0, 1.0]
    """
    cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    data = tuple(f.name for f in fields if not f.metadata.get(_STATIC))
    meta = tuple(f.name for f in fields if f.metadata.get(_STATIC))

    def flatten_with_keys(node: T):
        children = tuple((jax.tree_util.GetAttrKey(n), getattr(node, n)) for n in data)
        return children, tuple(getattr(node, n) for n in meta)

    def flatten(node: T):
        return tuple(getattr(node, n) for n in data), tuple(getattr(node, n) for n in meta)

    def unflatten(aux: tuple, children: Iterable[Any]):
        node = object.__new__(cls)
        for name, value in zip(data + meta, tuple(children) + aux, strict=True):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    _interop.register(cls, data, meta)
    cls.__repr__ = _repr
    return cls


def replace(node: T, **changes: Any) -> T:
    """Copy a pytree value with some fields changed.

    Example:
        >>> step = jkv.Step.after(jnp.array([0]), jnp.array([1]), new=1)
        >>> jkv.cache.replace(step, start=jnp.array([7])).start.tolist()
        [7]
    """
    return dataclasses.replace(node, **changes)  # pyright: ignore[reportArgumentType]


def nbytes(tree: object) -> int:
    """Count the bytes of the arrays of `tree`, without the padding of the device's layout."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _repr(self: Any) -> str:
    """Shapes and dtypes in place of a screen of numbers."""

    def show(value: Any) -> str:
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return f"{value.dtype}{list(value.shape)}"
        if isinstance(value, tuple) and len(value) > 2 and len({repr(v) for v in value}) == 1:
            return f"{len(value)} x {value[0]!r}"
        return repr(value)

    fields = ", ".join(f"{f.name}={show(getattr(self, f.name))}" for f in dataclasses.fields(self))
    return f"{type(self).__name__}({fields})"
