"""Evict with larger budgets in the first layers than in the last."""

from __future__ import annotations

import dataclasses

from jax.typing import DTypeLike

from jkv._checks import check_integer, check_number
from jkv.cache import scores as _scores
from jkv.cache.evicting import KEPT, EvictingKind, evicting
from jkv.cache.evicting_layer import Evicting
from jkv.cache.form import COUNT, REAL, Form
from jkv.cache.protocol import CacheKind, Shape
from jkv.cache.scores import Score
from jkv.errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class PyramidKind(CacheKind):
    """See `pyramid`."""

    budget: int
    ratio: float
    score: Score
    recent: int | None
    sinks: int

    def budgets(self, layers: int) -> list[int]:
        """Return each layer's budget: falling from the first to the last, `budget` on average."""
        # Rounding is the same up and down, so what one layer gains another loses.
        most = self.budget * (self.ratio - 1) / (self.ratio + 1)
        ends = max(layers - 1, 1)
        steps = [(layers - 1 - 2 * i) / ends for i in range(layers)]
        return [self.budget + round(most * step) for step in steps]

    def bind(self, config: Shape, layer: int) -> EvictingKind:
        """Return the kind for one layer.

        Raises:
            ValueError: a layer's budget does not suffice for what is always kept.
        """
        return evicting(self.budgets(config.layers)[layer], self.score, self.recent, self.sinks)

    def init(
        self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> Evicting:
        """Refuse: there is no layer without a model.

        Raises:
            UnsupportedError: always.
        """
        del batch, slots, kv_heads, head_dim, dtype
        raise UnsupportedError(
            "pyramid has another budget for each layer of a model; make the cache with "
            "jkv.init_cache(config, ...), or pass config= to convert"
        )


def pyramid(
    budget: int,
    ratio: float = 4.0,
    score: Score = _scores.h2o,
    recent: int | None = None,
    sinks: int = 0,
) -> PyramidKind:
    """Evict with larger budgets in the first layers than in the last, falling in equal steps.

    Attention is spread in the first layers and narrows towards the last. Source: PyramidKV, Cai et
    al. 2024, arXiv:2406.02069, whose default beta = 20 is a ratio of 39.

    Args:
        budget: tokens per row and head, on average over the layers.
        ratio: of the first layer's budget to the last's, at least 1.
        score: see `evicting`.
        recent: see `evicting`; by default a quarter of each layer's own budget.
        sinks: see `evicting`.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> cache = jkv.init_cache(lm.config, jkv.pyramid(32, ratio=3.0), batch=1, slots=512)
        >>> [layer.retained for layer in cache.layers]
        [48, 40, 32, 24, 16]
    """
    budget = check_integer("budget", budget, 1, of="pyramid")
    sinks = check_integer("sinks", sinks, 0, of="pyramid")
    ratio = check_number("ratio", ratio, "a number of at least 1", lambda x: x >= 1, of="pyramid")
    evicting(budget, score, recent, sinks)
    return PyramidKind(budget, ratio, score, recent, sinks)


FORMS = {
    "pyramid": Form(
        pyramid,
        "N tokens of each head on average, more in the first layers than in the last",
        examples=(":1024",),
        arguments={"budget": COUNT, "ratio": REAL, **KEPT},
        bare=1,
        needed=1,
    ),
}
