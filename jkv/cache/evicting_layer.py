"""A budget of tokens per head: a score says which tokens stay."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv._pytree import pytree, replace, static
from jkv._text import plural
from jkv.cache import scores as _scores
from jkv.cache.protocol import LayerCache, Step, check_heads, shard_heads
from jkv.cache.scores import Score
from jkv.errors import UnsupportedError
from jkv.ops.attention.weights import attention_weights
from jkv.ops.masks import AttentionSpec
from jkv.ops.order import depend_on
from jkv.ops.write import write

EMPTY = -1  # a slot without a token
CLOSED = -2  # and one that its head may not use
_MOST = float(np.finfo(np.float32).max)


@pytree
class Evicting(LayerCache):
    """A layer's best tokens by a score, each head its own, in any order of slots.

    Of equal scores the newest token is kept, whatever slots they are in.

    Example:
        >>> layer = jkv.evicting(8, sinks=2).init(2, 64, kv_heads=1, head_dim=4, dtype="float32")
        >>> layer.keys.shape, layer.retained
        ((2, 1, 8, 4), 8)
    """

    keys: Array  # [B, K, S, H]
    values: Array  # [B, K, S, H]
    positions: Array  # [B, K, S] int32, EMPTY or CLOSED where there is no token
    scores: Array  # [B, K, S] float32
    score: Score = static()  # of jkv.scores, or one like them
    recent: int = static()  # the newest tokens, kept whatever their scores
    sinks: int = static()  # and the first

    @property
    def capacity(self) -> None:
        """Never full."""
        return None

    @property
    def retained(self) -> int:
        """Tokens of a row, at most, however long it is."""
        return self.keys.shape[2]

    @property
    def weighs_tokens(self) -> bool:
        """Whether it needs the weights of all tokens at once: it does."""
        return True

    def reach(self, new: int) -> int | None:
        """Return how far back a token sees; each of several new ones sees all before it."""
        return self.retained + new - 1 if is_window(self.score, self.sinks) else None

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        step: Step,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "B T N H"], Evicting]:
        """Attend, and evict: before one new token attends, or after several have.

        Raises:
            ValueError: keys of other heads than the cache was made for, or a score of another
                shape than the tokens.
        """
        at, window = step.positions, spec.window
        check_heads(self.keys.shape, k)
        if q.shape[1] == 1:
            cache = self._append_one(k, v, step, window)
            held = (cache.keys, cache.values, cache.positions)
            out, weights = attention_weights(q, [held], at, spec)
            return out.astype(q.dtype), cache._update_scores(weights, at, step)
        new = (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), self._places(step))
        held = (self.keys, self.values, self.positions)
        out, weights = attention_weights(q, [held, new], at, spec)
        cache = self._append_chunk(k, v, step, weights, at, window, out)
        return out.astype(q.dtype), cache

    def append(
        self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], step: Step
    ) -> Evicting:
        """Append the new tokens without attention weights: see each score for what that means.

        Raises:
            ValueError: keys of other heads than the cache was made for.
        """
        check_heads(self.keys.shape, k)
        queries = jnp.max(step.positions, axis=1)[:, None]
        if k.shape[1] == 1:
            cache = self._append_one(k, v, step, None)
            return cache._update_scores(_no_weights(cache.scores), queries, step)
        places = self._places(step).astype(self.scores.dtype)
        weights = _no_weights(jnp.concatenate([self.scores, places], axis=-1))
        return self._append_chunk(k, v, step, weights, queries, None, None)

    def _places(self, step: Step) -> Array:
        """Return the positions of the new tokens for each head, ``[B, K, T]``."""
        batch, new = step.positions.shape
        return jnp.broadcast_to(step.positions[:, None], (batch, self.keys.shape[1], new))

    def _append_one(self, k: Array, v: Array, step: Step, window: int | None) -> Evicting:
        """Write a row's one new token to an empty slot of each head, or over the worst token."""
        rank = self._rank(self.scores, self.positions, step, window)
        rank = jnp.where(self.positions == CLOSED, jnp.inf, rank)
        worst = rank == jnp.min(rank, axis=-1, keepdims=True)
        oldest = jnp.where(worst, self.positions, jnp.iinfo(jnp.int32).max)
        slot = jnp.argmin(oldest, axis=-1)[..., None].astype(jnp.int32)
        places = self._places(step)
        return self._write(k, v, places, jnp.where(places >= 0, slot, -1))

    def _append_chunk(
        self,
        k: Array,
        v: Array,
        step: Step,
        weights: Array,
        queries: Array,
        window: int | None,
        result: Array | None,
    ) -> Evicting:
        """Keep the best of old and new tokens; new ones take the slots of those evicted."""
        slots, places = self.keys.shape[2], self._places(step)

        def joined(old: Array, new: Array) -> Array:
            return jnp.concatenate([old, new.astype(old.dtype)], axis=2)

        both = replace(
            self,
            keys=joined(self.keys, jnp.swapaxes(k, 1, 2)),
            values=joined(self.values, jnp.swapaxes(v, 1, 2)),
            positions=joined(self.positions, places),
            scores=joined(self.scores, jnp.zeros_like(places)),
        )._update_scores(weights, queries, step)
        best = _best_first(both._rank(both.scores, both.positions, step, window), both.positions)
        open_slots = jnp.sum(self.positions != CLOSED, axis=-1, keepdims=True)
        kept = (jnp.argsort(best, axis=-1) < open_slots) & (both.positions >= 0)
        old, new = kept[..., :slots], kept[..., slots:]
        free = jnp.argsort(old | (self.positions == CLOSED), axis=-1).astype(jnp.int32)
        # Where anything is evicted all slots are filled again: the free ones are just enough.
        nth = jnp.clip(jnp.cumsum(new, axis=-1) - 1, 0, slots - 1)
        target = jnp.where(new, jnp.take_along_axis(free, nth, axis=-1), -1)
        if result is not None:
            target = depend_on(target, result)
        cache = replace(self, scores=both.scores[..., :slots])
        return cache._write(k, v, places, target, both.scores[..., slots:])

    def _write(
        self, k: Array, v: Array, places: Array, slots: Array, scores: Array | None = None
    ) -> Evicting:
        """Write new tokens to each head's own `slots` ``[B, K, T]``, nowhere where they are -1."""
        new = slots.shape[2]

        def put(buffer: Array, tokens: Array) -> Array:
            # Rows and heads as rows of one head each.
            lines = buffer.reshape(-1, 1, *buffer.shape[2:])
            tokens = tokens.reshape(-1, new, 1, *buffer.shape[3:])
            return write(lines, tokens, slots.reshape(-1, new)).reshape(buffer.shape)

        return replace(
            self,
            keys=put(self.keys, jnp.swapaxes(k, 1, 2)),
            values=put(self.values, jnp.swapaxes(v, 1, 2)),
            positions=put(self.positions, places),
            scores=put(self.scores, jnp.zeros(slots.shape) if scores is None else scores),
        )

    def _update_scores(self, weights: Array, queries: Array, step: Step) -> Evicting:
        """Update the scores after a pass; a row without new tokens keeps its own."""
        shape = self.scores.shape
        is_new = self.positions >= step.start[:, None, None]
        inputs = _scores.ScoreInputs(
            previous=self.scores,
            weights=weights,
            keys=self.keys,
            values=self.values,
            positions=self.positions,
            queries=queries,
            is_new=is_new,
        )
        found = jnp.asarray(self.score(inputs))
        if found.shape != shape or not jnp.issubdtype(found.dtype, jnp.floating):
            raise ValueError(
                f"the score {self.score} made {found.dtype}{list(found.shape)}; expected "
                f"float32{list(shape)}, a number for each token, as in inputs.previous"
            )
        counts = (self.positions >= 0) & (step.stop > step.start)[:, None, None]
        return replace(self, scores=jnp.where(counts, found.astype(jnp.float32), self.scores))

    def _rank(self, scores: Array, positions: Array, step: Step, window: int | None) -> Array:
        """Rank tokens by score, protected ones first and those out of the layer's window last."""
        last = (step.stop - 1)[:, None, None]
        rank = jnp.clip(jnp.where(jnp.isnan(scores), -_MOST, scores), -_MOST, _MOST)
        if window is not None:
            rank = jnp.where(positions <= last - window, -_MOST, rank)  # no query will see it again
        always = (positions > last - self.recent) | (positions < self.sinks)
        return jnp.where(positions < 0, -jnp.inf, jnp.where(always, jnp.inf, rank))

    def take(self, rows: Int[Array, " R"]) -> Evicting:
        """Return the cache of other rows."""
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def resize(self, slots: int) -> Evicting:
        """Return itself: the budget does not depend on the slots."""
        del slots
        return self

    def concat(self, others: Sequence[Evicting]) -> Evicting:
        """Concatenate along the batch axis."""
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), self, *others)

    def crop(self, held: Int[Array, " B"], lengths: Int[Array, " B"]) -> Evicting:
        """Remove later tokens; scores keep the attention of these.

        Raises:
            UnsupportedError: an earlier token has been evicted, or, under `jit`, may have been.
        """
        self._need("crop", jnp.where(lengths < held, lengths, 0))
        gone = self.positions >= lengths[:, None, None]
        return replace(
            self,
            positions=jnp.where(gone, EMPTY, self.positions),
            scores=jnp.where(gone, 0.0, self.scores),
        )

    def partition_spec(self, axis: str) -> Evicting:
        """See `LayerCache.partition_spec`.

        Raises:
            UnsupportedError: a score of several heads together.
        """
        if _scores.compares_heads(self.score):
            raise UnsupportedError(
                f"the score {self.score} compares all heads, of which each device sees its own; "
                "use one of single heads, such as jkv.scores.h2o, or a model that is not sharded"
            )
        return shard_heads(self, axis)

    def to_legacy(
        self, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Return keys and values of rows of which no token has been evicted, in order.

        Raises:
            UnsupportedError: one has been, or, under `jit`, may have been.
        """
        self._need("to_legacy", lengths)
        order = jnp.argsort(self.positions.astype(jnp.uint32), axis=-1)[..., None]
        keys = jnp.take_along_axis(self.keys, order, axis=2)
        return keys, jnp.take_along_axis(self.values, order, axis=2)

    def _need(self, what: str, lengths: Array) -> None:
        """Refuse where a head has not kept all of a row's first `lengths[b]` tokens."""
        if isinstance(lengths, Tracer) or isinstance(self.positions, Tracer):
            raise UnsupportedError(
                f"{what} under jit: whether an evicting cache still holds what it would need is "
                "only known outside of it"
            )
        held, wanted = np.asarray(self.positions), np.asarray(lengths)
        count = ((held >= 0) & (held < wanted[:, None, None])).sum(axis=-1)
        short = np.flatnonzero((count < wanted[:, None]).any(axis=1))
        if len(short):
            raise UnsupportedError(
                f"{what}: tokens of rows {short.tolist()} that it would need have been evicted "
                f"(a budget of {self.keys.shape[2]}); keep the cache from before, it is still a "
                "value, or give a larger budget"
            )

    def evict(self, held: Int[Array, " B"], budget: int | tuple[int, ...]) -> Evicting:
        """Keep the best tokens by their scores, in smaller buffers.

        Raises:
            ValueError: a larger budget, or one that the first tokens alone fill.
        """
        budgets = per_head(budget, self.keys.shape[1])
        slots, most = max(budgets), self.keys.shape[2]
        if slots > most:
            raise ValueError(
                f"evict got a budget of {slots} for a cache of {plural(most, 'token')}; "
                "expected at most that: what was evicted does not come back"
            )
        recent = min(self.recent, min(budgets) - self.sinks)
        if recent < 1:
            raise ValueError(
                f"evict got a budget of {min(budgets)} for a cache that always keeps the first "
                f"{plural(self.sinks, 'token')}; expected more than that"
            )
        smaller = replace(self, recent=recent)
        step = Step.after(held, jnp.zeros_like(held), 1)
        rank = smaller._rank(self.scores, self.positions, step, None)
        order = _best_first(rank, self.positions)[..., :slots]
        positions = jnp.take_along_axis(self.positions, order, axis=-1)
        closed = np.arange(slots)[None, None] >= np.asarray(budgets)[None, :, None]
        return replace(
            smaller,
            keys=jnp.take_along_axis(self.keys, order[..., None], axis=2),
            values=jnp.take_along_axis(self.values, order[..., None], axis=2),
            positions=jnp.where(closed, CLOSED, positions),
            scores=jnp.where(closed, 0.0, jnp.take_along_axis(self.scores, order, axis=-1)),
        )


def _best_first(rank: Array, positions: Array) -> Array:
    """Sort slots by falling rank, of equals the newest first."""
    slots = lax.broadcasted_iota(jnp.int32, rank.shape, rank.ndim - 1)
    return lax.sort((-rank, -positions, slots), dimension=-1, num_keys=2)[2]


def _no_weights(scores: Array) -> Array:
    """Return the weights of one query that looks at no token: [B, K, 1, 1, S]."""
    return jnp.zeros((*scores.shape[:2], 1, 1, scores.shape[2]), jnp.float32)


def is_window(score: Score, sinks: int) -> bool:
    """Return whether what is kept is a window of the last tokens."""
    return score is _scores.recency and sinks == 0


def per_head(budget: int | tuple[int, ...], kv_heads: int) -> tuple[int, ...]:
    """Return a budget for each key/value head.

    Raises:
        ValueError: budgets for another number of heads.
    """
    budgets = budget if isinstance(budget, tuple) else (budget,) * kv_heads
    if len(budgets) != kv_heads:
        raise ValueError(
            f"an evicting cache got {len(budgets)} budgets for {kv_heads} key/value heads; "
            "expected one for each, or one for all"
        )
    return budgets
