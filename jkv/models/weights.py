"""The weights that a cache was computed with, identified without keeping them alive."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jkv.cache.fingerprint import checksum

_KEPT = 64  # sets of weights that are looked for by their arrays


class Weights:
    """One set of weights: the arrays that hold it, in one model or in several.

    Arrays never change, so weights that were changed in place are other arrays. The arrays are held
    weakly. A copy or a pickle of what refers to them knows nothing of them.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        self._copies = [tuple(map(weakref.ref, leaves))]

    def holds(self, leaves: Sequence[Any]) -> bool:
        """Return whether these are the arrays."""
        return any(
            len(refs) == len(leaves) and all(r() is x for r, x in zip(refs, leaves, strict=True))
            for refs in self._copies
        )

    def add(self, leaves: Sequence[Any]) -> None:
        """Add other arrays of the same values."""
        self._copies.append(tuple(map(weakref.ref, leaves)))

    def alive(self) -> list[Any] | None:
        """Return the arrays, if all of them still exist."""
        for refs in self._copies:
            leaves = [ref() for ref in refs]
            if not any(leaf is None or _is_deleted(leaf) for leaf in leaves):
                return leaves
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as None: arrays of another process are others."""
        return type(None), ()


_known: list[Weights] = []  # the latest last


def _leaves(model: object) -> list[Any]:
    # Those of numpy too (`jax.device_get(model)`), of which only new ones are seen, and no change
    # within one.
    return [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array | np.ndarray)]


def _is_deleted(leaf: object) -> bool:
    return isinstance(leaf, jax.Array) and leaf.is_deleted()


def weights_of(model: object) -> Weights:
    """Return the weights that a model has now."""
    leaves = _leaves(model)
    for weights in reversed(_known):
        if weights.holds(leaves):
            return weights
    weights = Weights(leaves)
    _known[:] = [known for known in _known if known.alive() is not None][1 - _KEPT :]
    _known.append(weights)
    return weights


def add_copy(model: object, other: object) -> None:
    """Record that another model has the same weights in arrays of its own."""
    weights_of(model).add(_leaves(other))


def is_current(weights: Weights | None, model: object) -> bool:
    """Return whether a model has these weights: the same arrays, or others of the same values.

    Values can only be compared while the old arrays exist. None is unknown and counts as equal.
    """
    if weights is None:
        return True
    leaves = _leaves(model)
    if weights.holds(leaves):
        return True
    old = weights.alive()
    if old is None or [(x.shape, x.dtype) for x in old] != [(x.shape, x.dtype) for x in leaves]:
        return False
    return checksum(tuple(old)) == checksum(tuple(leaves))
