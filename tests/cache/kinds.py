"""The one list of kinds of cache. A new kind is one line here, and the whole suite runs on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jkv


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind, and what may be asked of it."""

    name: str
    kind: Any
    nbytes: Callable[[int, int, int, int, int], int]  # of (layers, B, K, S, H), float32
    exact: bool = True  # the tokens are those of a model without a cache
    window: int | None = None  # of the model that it is compared with
    sinks: int = 0  # first tokens that all see: no model has such a mask to compare with
    spread: float = 0.25  # standard deviations by which logits may be off, where not exact
    layered: bool = True  # has a LayerCache per layer
    fills: bool = True  # runs full
    rolls_back: bool = True  # whatever its length
    modelled: bool = True  # compared with a model without a cache; the others layer by layer
    recalls: bool = True  # well enough to tell tokens apart; test_quantized.py looks at the bits
    off: float = 0.35  # what a random life may find beside a value of up to 1, where not exact
    # As people write it, in sizes that a short conversation fills. A reply is that of a model which
    # reads the whole conversation at once, or goes on in words of its own. (Kinds that round do so
    # alike only as long as nothing has been rounded: a prompt sees itself exactly.)
    alike: tuple[str, ...] = ()
    goes_on: tuple[str, ...] = ()

    def sees(self, query: int, position: int) -> bool:
        """Whether a token at a position still sees another."""
        near = self.window is None or query - position < self.window
        return position <= query and (near or position < self.sinks)

    def rolls_back_from(self, held: int) -> bool:
        """Whether a row of so many tokens may be shortened."""
        return self.rolls_back or held <= (self.window or 0) + self.sinks


def dense_bytes(layers, b, k, s, h):
    return layers * 2 * b * k * s * h * 4


def near_far_bytes(key, value, recent=0, unit=1):
    """Of a far part with `key` and `value` bytes per unit of a head, and the exact tokens.

    By hand: what leaves the near part leaves it in whole units, and 16 tokens may be rolled back.
    """

    def count(layers, b, k, s, h):
        far = max((s - recent) // unit * unit, unit)
        near = recent + unit + 16 if recent or unit > 1 else 0
        return layers * (b * k * (far // unit * (key(h) + value(h)) + 2 * near * h * 4) + b)

    return count


def evicting_bytes(budget):
    """Keys, values, positions and scores."""
    return lambda layers, b, k, s, h: layers * b * k * budget * (2 * h * 4 + 4 + 4)


def paged_bytes(page, key, value, flags=0):
    """Of pages with `key` and `value` bytes per token of a head, and one table for all layers."""

    def count(layers, b, k, s, h):
        pages = b * -(-s // page)
        return layers * pages * (k * page * (key(h) + value(h)) + flags) + 4 * pages

    return count


KINDS = [
    Case("dense", jkv.dense(), dense_bytes, alike=("dense",)),
    Case("dense:grow", jkv.dense(grow=True), dense_bytes, alike=("dense:grow",)),
    Case(
        "none",
        jkv.none(),
        lambda layers, b, k, s, h: b * s * 4,
        layered=False,
        alike=("none",),
    ),
    Case(
        "window",
        jkv.window(7),
        lambda layers, b, k, s, h: layers * 2 * b * k * 7 * h * 4,
        window=7,
        fills=False,
        rolls_back=False,
        alike=("window:12",),
    ),
    Case(
        "sinks",
        jkv.window(7, sinks=2, positions="text"),
        lambda layers, b, k, s, h: layers * 2 * b * k * 9 * h * 4,
        window=7,
        sinks=2,
        fills=False,
        rolls_back=False,
        modelled=False,
        alike=(
            "window:10,sinks=2",
            "window:10,sinks=2,positions=text",
            "window:10,sinks=2,positions=clamped",
        ),
    ),
    Case(
        "int8",
        jkv.quantized(bits=8),
        near_far_bytes(lambda h: h + 4, lambda h: h + 4),
        exact=False,
        alike=("int8:residual=64",),
        goes_on=("int8",),
    ),
    # Four bits of four tokens in two bytes per channel; a step and a zero point for each channel
    # of keys and each token of values.
    Case(
        "int4",
        jkv.quantized(bits=4, residual=3, group=4),
        near_far_bytes(lambda h: 2 * h + 4 * h, lambda h: 2 * h + 4 * 4 * -(-h // 4), 3, 4),
        exact=False,
        off=0.7,
        goes_on=("int4:residual=4,group=8",),
    ),
    Case(
        "int2",
        jkv.quantized(bits=2, residual=0, group=8),
        near_far_bytes(lambda h: 2 * h + 4 * h, lambda h: 2 * h + 8 * 4 * -(-h // 8), 0, 8),
        exact=False,
        spread=1.0,
        recalls=False,
        modelled=False,
        goes_on=("int2:residual=0,group=8",),
    ),
    Case(
        "k8v4",
        jkv.quantized(key_bits=8, value_bits=4, residual=2),
        near_far_bytes(lambda h: h + 4, lambda h: -(-h // 2) + 4, 2),
        exact=False,
        modelled=False,
        goes_on=("kv:k8v4,residual=4",),
    ),
    Case(
        "fp8",
        jkv.fp8(),
        near_far_bytes(lambda h: h + 2, lambda h: h + 2),
        exact=False,
        modelled=False,
        goes_on=("fp8:residual=3",),
    ),
    Case(
        "near_far",
        jkv.near_far(recent=5, far=jkv.quantized(bits=8)),
        near_far_bytes(lambda h: h + 4, lambda h: h + 4, 5),
        exact=False,
        modelled=False,
        goes_on=("near_far:recent=6,far=int8",),
    ),
    # Numbers of 4 bytes, and of 1, with a byte that says which channel.
    Case(
        "sparse",
        jkv.sparse(1.0),  # all channels, each with its number: what is told apart is exact
        near_far_bytes(*(2 * (lambda h: h * 5,))),
        modelled=False,
        goes_on=("sparse:0.5",),
    ),
    Case(
        "mixed",
        jkv.sparse(1.0, bits=8),
        near_far_bytes(*(2 * (lambda h: 2 * h + 4,))),
        exact=False,
        modelled=False,
        goes_on=("sparse:0.5,int8",),
    ),
    Case(
        "paged",
        jkv.paged(4),
        paged_bytes(4, *(2 * (lambda h: 4 * h,))),
        alike=("paged:4",),
    ),
    Case(
        "paged:int8",
        jkv.paged(4, bits=8),
        paged_bytes(4, *(2 * (lambda h: h + 4,)), flags=1),
        exact=False,
        modelled=False,
        goes_on=("paged:4,int8",),
    ),
    Case(
        "paged:int4",
        jkv.paged(4, bits=4),
        paged_bytes(4, *(2 * (lambda h: -(-h // 2) + 4 * -(-h // 64),)), flags=1),
        exact=False,
        modelled=False,
        off=0.85,
    ),
    Case(
        "paged:fp8",
        jkv.paged(4, codec=jkv.fp8()),
        paged_bytes(4, *(2 * (lambda h: h + 2,)), flags=1),
        exact=False,
        modelled=False,
    ),
    # A budget that no row of the suite uses up; what eviction does is in test_evicting.py.
    Case(
        "evicting",
        jkv.evicting(40),
        evicting_bytes(40),
        fills=False,
        alike=("evict:64",),
        goes_on=(
            "evict:16,score=h2o,sinks=2,recent=4",
            "evict:16,score=tova",
            "evict:16,score=snapkv",
            "evict:16,score=key_norm",
            "evict:16,score=recency",
        ),
    ),
]
# Kinds that are nothing without a model.
ALIKE = [*(text for case in KINDS for text in case.alike), "per_layer:window:12,first=1"]
GO_ON = [*(text for case in KINDS for text in case.goes_on), "pyramid:16"]
