"""The one list of kinds of cache. A new kind is one line here, and the whole suite runs on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jkv
from tests.cache import throwaway


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind, and what may be asked of it."""

    name: str
    kind: Any
    nbytes: Callable[[int, int, int, int, int], int]  # of (layers, B, K, S, H), float32
    exact: bool = True  # the tokens are those of a model without a cache
    window: int | None = None  # of the model that it is compared with
    layered: bool = True  # has a LayerCache per layer
    fills: bool = True  # runs full
    rolls_back: bool = True  # whatever its length
    off: float = 0.35  # what a random life may find beside a value of up to 1, where not exact

    def sees(self, query: int, position: int) -> bool:
        """Whether a token at a position still sees another."""
        return position <= query and (self.window is None or query - position < self.window)

    def rolls_back_from(self, held: int) -> bool:
        """Whether a row of so many tokens may be shortened."""
        return self.rolls_back or held <= (self.window or 0)


def dense_bytes(layers, b, k, s, h):
    return layers * 2 * b * k * s * h * 4


def int8_bytes(layers, b, k, s, h, near=6):
    return layers * 2 * b * k * (s * (h + 4) + near * h * 4)


def evicting_bytes(budget):
    """Keys, values, positions and scores."""
    return lambda layers, b, k, s, h: layers * b * k * budget * (2 * h * 4 + 4 + 4)


KINDS = [
    Case("dense", jkv.dense(), dense_bytes),
    Case("dense:grow", jkv.dense(grow=True), dense_bytes),
    Case("none", jkv.none(), lambda layers, b, k, s, h: b * s * 4, layered=False),
    Case(
        "window",
        jkv.window(7),
        lambda layers, b, k, s, h: layers * 2 * b * k * 7 * h * 4,
        window=7,
        fills=False,
        rolls_back=False,
    ),
    Case("int8", throwaway.int8(6), int8_bytes, exact=False),
    # A budget that no row of the suite uses up; what eviction does is in test_evicting.py.
    Case("evicting", jkv.evicting(40), evicting_bytes(40), fills=False),
]
