"""Kinds that differ from layer to layer."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import NoReturn

from jax.typing import DTypeLike

from jkv._checks import check_integer
from jkv._text import brief, plural
from jkv.cache.dense import dense
from jkv.cache.form import COUNT, KIND, Form
from jkv.cache.protocol import CacheKind, Shape, as_kind, is_kind, own_kind_hint
from jkv.errors import UnsupportedError


class _PerLayer(CacheKind):
    """What both forms share: a layer is only known once bound to a model."""

    @abc.abstractmethod
    def _used(self) -> tuple[CacheKind, ...]:
        """Return the kinds that a layer may get."""

    @property
    def grows(self) -> bool:
        """Whether any layer's does."""
        return any(kind.grows for kind in self._used())

    def init(
        self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> NoReturn:
        """Refuse: there is no layer without a model.

        Raises:
            UnsupportedError: always.
        """
        del batch, slots, kv_heads, head_dim, dtype
        raise UnsupportedError(
            "per_layer has another kind for each layer of a model; make the cache with "
            "jkv.init_cache(config, ...), or pass config= to convert"
        )


@dataclasses.dataclass(frozen=True)
class ListedKind(_PerLayer):
    """See `per_layer`: one kind for each layer."""

    kinds: tuple[CacheKind, ...]

    def _used(self) -> tuple[CacheKind, ...]:
        return self.kinds

    def bind(self, config: Shape, layer: int) -> CacheKind:
        """Return the layer's kind.

        Raises:
            UnsupportedError: the model has another number of layers.
        """
        if len(self.kinds) != config.layers:
            raise UnsupportedError(
                f"per_layer got {plural(len(self.kinds), 'kind')} for a model of "
                f"{plural(config.layers, 'layer')}; expected one for each"
            )
        return self.kinds[layer].bind(config, layer)


@dataclasses.dataclass(frozen=True)
class EndsKind(_PerLayer):
    """See `per_layer`: one kind for the layers at the ends, another between."""

    default: CacheKind
    first: int
    last: int
    exact: CacheKind

    def _used(self) -> tuple[CacheKind, ...]:
        return (self.default, self.exact) if self.first + self.last else (self.default,)

    def bind(self, config: Shape, layer: int) -> CacheKind:
        """Return the layer's kind.

        Raises:
            UnsupportedError: the model has fewer layers than are to be kept exact.
        """
        if self.first + self.last > config.layers:
            raise UnsupportedError(
                f"per_layer got first={self.first} and last={self.last} for a model of "
                f"{plural(config.layers, 'layer')}; expected no more than there are"
            )
        between = self.first <= layer < config.layers - self.last
        return (self.default if between else self.exact).bind(config, layer)


def per_layer(
    kinds: CacheKind | str | Sequence[CacheKind | str],
    first: int = 0,
    last: int = 0,
    exact: CacheKind | str | None = None,
) -> ListedKind | EndsKind:
    """Give each layer a kind of its own, or the layers at the ends another kind.

    Args:
        kinds: a list with one kind per layer, each a kind or its text ("int4"); or the kind of all
            layers but those named next.
        first: layers at the start that are kept in `exact`.
        last: layers at the end that are.
        exact: their kind, `jkv.dense()` by default.

    Raises:
        TypeError: something that is no kind of a layer.
        ValueError: no kinds, `first` or `last` below 0, or beside a list.

    Example:
        >>> alternating = jkv.per_layer([jkv.dense(), jkv.window(256)] * 6)
        >>> jkv.per_layer(jkv.quantized(4), first=1) == jkv.parse("per_layer:int4,first=1")
        True
    """
    first = check_integer("first", first, 0, of="per_layer")
    last = check_integer("last", last, 0, of="per_layer")
    if isinstance(kinds, Sequence) and not isinstance(kinds, str):
        if not kinds:
            raise ValueError("per_layer got no kinds; expected one for each layer")
        if first or last or exact is not None:
            raise ValueError(
                "per_layer got a list, which names every layer's kind, and first, last or exact; "
                "expected one or the other"
            )
        return ListedKind(tuple(_layer_kind(kind) for kind in kinds))
    exact = dense() if exact is None else exact
    return EndsKind(_layer_kind(kinds), first, last, _layer_kind(exact))


def _layer_kind(given: CacheKind | str) -> CacheKind:
    kind = as_kind(given)
    if not is_kind(kind) or kind.recomputes:
        raise TypeError(
            f"per_layer got {brief(kind)}; expected kinds that keep keys and values, such as "
            f"jkv.dense(){own_kind_hint(kind)}"
        )
    return kind


FORMS = {
    "per_layer": Form(
        per_layer,
        "a kind for all layers but the first and the last ones, which are kept dense or as said",
        examples=(":int4,first=1,last=1",),
        arguments={"kinds": KIND, "first": COUNT, "last": COUNT, "exact": KIND},
        bare=1,
        needed=1,
    ),
}
