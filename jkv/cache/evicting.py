"""Kinds that keep a budget of tokens per head; a score says which."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jkv._checks import check_integer
from jkv._text import brief
from jkv.cache import scores as _scores
from jkv.cache.evicting_layer import CLOSED, EMPTY, Evicting, is_window, per_head
from jkv.cache.form import COUNT, Form, one_of
from jkv.cache.protocol import CacheKind
from jkv.cache.scores import Score


@dataclasses.dataclass(frozen=True)
class EvictingKind(CacheKind):
    """See `evicting`."""

    budget: int | tuple[int, ...]
    score: Score
    recent: int
    sinks: int

    def reach(self, new: int) -> int | None:
        """Return how far back a token sees: of several new ones, each sees all before.

        There is no limit unless what is kept is a window. Tokens keep their positions in the text,
        so a token that is kept for long is looked at from a distance that the model was never
        trained for.
        """
        if not is_window(self.score, self.sinks):
            return None
        return int(np.max(self.budget)) + new - 1

    def init(
        self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> Evicting:
        """Make an empty layer of zeros.

        Raises:
            ValueError: budgets for another number of heads.
        """
        del slots
        budgets = np.asarray(per_head(self.budget, kv_heads))
        held = (batch, kv_heads, int(budgets.max()))
        closed = np.arange(held[2])[None] >= budgets[:, None]
        shape = (*held, head_dim)
        return Evicting(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            positions=jnp.array(np.broadcast_to(np.where(closed, CLOSED, EMPTY), held), jnp.int32),
            scores=jnp.zeros(held, jnp.float32),
            score=self.score,
            recent=self.recent,
            sinks=self.sinks,
        )


def evicting(
    budget: int | Sequence[int],
    score: Score = _scores.h2o,
    recent: int | None = None,
    sinks: int = 0,
) -> EvictingKind:
    """Keep at most `budget` tokens per row and head, each head its own; never full.

    As long as nothing has been evicted, exact. A new token of the decode loop takes the place of
    the token with the lowest score by what was known before it, and of equals of the oldest; the
    tokens of a prefill's chunk look at all that was kept and at each other, and then the best of
    all stay. In a layer with a window, tokens that have left it go first.

    Tokens keep their positions in the text. The layer's bytes do not grow with the text; during a
    chunk of T tokens the attention weights do exist, B * N * T * (budget + T) of them.

    Args:
        budget: tokens; or one number for each key/value head, in buffers of the largest.
        score: of `jkv.scores`, or a function like them.
        recent: the newest tokens, kept whatever their scores; half of the budget by default.
        sinks: the first tokens, kept likewise.

    Raises:
        TypeError: a score that cannot be called, or not be hashed.
        ValueError: numbers out of range, more tokens always kept than there is room for, or budgets
            per head with a score that keeps the same tokens in all.

    Example:
        >>> kind = jkv.evicting(32, score=jkv.scores.tova, sinks=4)
        >>> jkv.init_cache(lm.config, kind, batch=1, slots=1000).capacity is None  # never full
        True
    """
    budgets = budget if isinstance(budget, list | tuple) else (budget,)
    if not budgets:
        raise ValueError("evicting got no budgets; expected one for each key/value head, or one")
    budgets = tuple(check_integer("budget", each, 1, of="evicting") for each in budgets)
    least = min(budgets)
    sinks = check_integer("sinks", sinks, 0, of="evicting")
    recent = max(least // 2, 1) if recent is None else recent
    recent = check_integer("recent", recent, 1, of="evicting")
    if recent + sinks > least:
        raise ValueError(
            f"evicting got recent={recent} and sinks={sinks} for a budget of {least}; expected at "
            "most as many, since these are kept whatever their scores"
        )
    maker = score is _scores.snapkv
    if maker or not callable(score) or isinstance(score, type) or score.__hash__ is None:
        raise TypeError(
            f"evicting got score={brief(score)}; expected one of jkv.scores, such as "
            "jkv.scores.h2o, or a function like them that can be hashed"
            + ("; jkv.scores.snapkv(), with brackets, makes one" if maker else "")
        )
    if score is _scores.tova and len(set(budgets)) > 1:
        raise ValueError(
            f"evicting got the budgets {budgets} with jkv.scores.tova, which keeps the same tokens "
            "in all heads; expected one budget for all, or another score"
        )
    kept = budgets if isinstance(budget, list | tuple) else budgets[0]
    return EvictingKind(kept, score, recent, sinks)


KEPT = {
    "score": one_of(
        h2o=_scores.h2o,
        tova=_scores.tova,
        snapkv=_scores.snapkv(),
        key_norm=_scores.key_norm,
        recency=_scores.recency,
    ),
    "recent": COUNT,
    "sinks": COUNT,
}

FORMS = {
    "evict": Form(
        evicting,
        "the best N tokens of each head by a score",
        examples=(":1024,score=h2o",),
        arguments={"budget": COUNT, **KEPT},
        bare=1,
        needed=1,
    ),
}
