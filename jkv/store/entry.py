"""What the store keeps: named arrays and what they are. Immutable; imported without JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from jkv._text import brief


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """Arrays by name, and what they are.

    Attributes:
        arrays: read-only arrays of numpy, in which bfloat16 and the like are dtypes of `ml_dtypes`;
            what a tier on a device gives has arrays of JAX, which every tier takes.
        meta: what JSON can say: how to make a cache of the arrays, how many tokens it holds, what
            it cost (`seconds`), in which form it is (`form`: "exact", "int8", "int4").

    Example:
        >>> entry = jkv.store.Entry({"k": np.zeros((2, 3), np.float32)}, {"note": "mine"})
        >>> entry.nbytes
        24
    """

    arrays: Mapping[str, Any]
    meta: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrays", MappingProxyType(dict(self.arrays)))
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


class Private(np.ndarray):
    """Memory that a tier of this library has made, and that nothing else refers to."""


def check_store(store: Any, methods: Sequence[str]) -> None:
    """Refuse what cannot do all that will be asked of it.

    Raises:
        TypeError: it lacks one of the methods.
    """
    missing = [name for name in methods if not callable(getattr(store, name, None))]
    if missing:
        raise TypeError(
            f"store got {brief(store)}, without {', '.join(missing)}; expected a jkv.store.Store"
        )


def reject(store: Any, key: str, tenant: str = "") -> None:
    """Give back an entry that is not what it says; a store of a user's own need only remove it."""
    if hasattr(store, "reject"):
        store.reject(key, tenant=tenant)
    else:
        store.remove(key, tenant=tenant, sync=False)
