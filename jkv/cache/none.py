"""No cache: the whole prefix is recomputed at each step, the baseline of every comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jkv import ops
from jkv._axes import Array
from jkv._pytree import pytree, replace, static
from jkv.cache.base import Cache, Run
from jkv.cache.protocol import CacheKind, LayerCache, Shape, Step, shard_heads
from jkv.errors import UnsupportedError
from jkv.ops.masks import AttentionSpec

_NO_KEYS = "a cache of kind none() keeps no keys and values to convert or to attend to"


@pytree
class Chunk(LayerCache):
    """A layer that keeps nothing: new tokens see each other and no more."""

    @property
    def capacity(self) -> None:
        """Never full."""
        return None

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        step: Step,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "B T N H"], Chunk]:
        """Causal attention within the chunk."""
        part = ops.attention_with_chunk(q, k, v, step.positions, spec)
        return part.out.astype(q.dtype), self

    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], step: Step) -> Chunk:
        """Keep nothing."""
        del k, v, step
        return self

    def take(self, rows: Int[Array, " R"]) -> Chunk:
        """Return itself: there are no rows."""
        del rows
        return self

    def resize(self, slots: int) -> Chunk:
        """Return itself: there are no slots."""
        del slots
        return self

    def crop(self, held: Int[Array, " B"], lengths: Int[Array, " B"]) -> Chunk:
        """Return itself: there are no tokens."""
        del held, lengths
        return self

    def concat(self, others: Sequence[Chunk]) -> Chunk:
        """Return itself: there are no rows."""
        del others
        return self

    def to_legacy(self, lengths: Int[Array, " B"]) -> NoReturn:
        """Refuse: there are no keys and values to give.

        Raises:
            UnsupportedError: always.
        """
        del lengths
        raise UnsupportedError(_NO_KEYS)

    def partition_spec(self, axis: str) -> Chunk:
        """Return itself: there are no leaves."""
        del axis
        return self


@pytree
class Tokens(LayerCache):
    """What a model without a cache has to remember: the tokens themselves, for all layers."""

    tokens: Array  # [B, S] int32
    layers: int = static()  # of the model

    @property
    def grows(self) -> bool:
        """The work of a pass grows with the buffer, so a loop keeps it as short as it can."""
        return True

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.tokens.shape[1]

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        step: Step,
        spec: AttentionSpec,
    ) -> NoReturn:
        """Refuse: there are no keys and values to attend to.

        Raises:
            UnsupportedError: always.
        """
        del q, k, v, step, spec
        raise UnsupportedError(_NO_KEYS)

    def append(
        self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], step: Step
    ) -> NoReturn:
        """Refuse: keys and values are not kept.

        Raises:
            UnsupportedError: always.
        """
        del k, v, step
        raise UnsupportedError(_NO_KEYS)

    def partition_spec(self, axis: str) -> Tokens:
        """See `LayerCache.partition_spec`: each device has all tokens."""
        del axis
        return shard_heads(self, "", whole=("tokens",))

    def take(self, rows: Int[Array, " R"]) -> Tokens:
        """Other rows."""
        return replace(self, tokens=self.tokens[rows])

    def resize(self, slots: int) -> Tokens:
        """The same tokens in a buffer of another length."""
        change = max(slots - self.capacity, 0)
        return replace(self, tokens=jnp.pad(self.tokens[:, :slots], ((0, 0), (0, change))))

    def crop(self, held: Int[Array, " B"], lengths: Int[Array, " B"]) -> Tokens:
        """Nothing to do: what lies past a row's length is padding."""
        del held, lengths
        return self

    def concat(self, others: Sequence[Tokens]) -> Tokens:
        """The rows of all."""
        return replace(self, tokens=jnp.concatenate([self.tokens, *(o.tokens for o in others)]))

    def to_legacy(self, lengths: Int[Array, " B"]) -> tuple[Array, Array]:
        """There are no keys and values to give.

        Raises:
            UnsupportedError: always.
        """
        del lengths
        raise UnsupportedError(_NO_KEYS)


@pytree
class Recompute(Cache):
    """The cache of `none()`: runs the model over every row's whole history at each pass.

    A `Cache` to whoever calls it, so that no model, loop or test needs to know of it.
    """

    @property
    def recomputes(self) -> bool:
        """Whether each pass runs over all tokens."""
        return True

    def begin(self, tokens: Int[Array, "B T"], counts: Int[Array, " B"] | None = None) -> Run:
        """Append the tokens, and begin a pass over the whole history."""
        self.check_batch(tokens)
        (past,) = self.layers
        step, overflowed = self.reserve(tokens.shape[1], counts)
        slots = jnp.where(step.positions < 0, past.capacity, step.positions)
        rows = jnp.arange(self.batch, dtype=jnp.int32)[:, None]
        history = past.tokens.at[rows, slots].set(tokens.astype(jnp.int32), mode="drop")
        whole = Step.after(jnp.zeros_like(step.stop), step.stop, past.capacity)
        return Run(self, history, whole, (Chunk(),) * past.layers, step, overflowed)

    def finish(self, run: Run, hidden: Array, layers: tuple[Any, ...]) -> tuple[Array, Cache]:
        """Return the new tokens' part of the hidden states."""
        del layers
        at = jnp.maximum(run.new.positions, 0)
        at = at.reshape(*at.shape, *(1,) * (hidden.ndim - 2))
        after = replace(
            self,
            layers=(replace(self.layers[0], tokens=run.tokens),),
            lengths=run.new.stop,
            overflowed=run.overflowed,
        )
        return jnp.take_along_axis(hidden, at, axis=1), after


@dataclasses.dataclass(frozen=True)
class NoneKind(CacheKind):
    """See `none`."""

    @property
    def grows(self) -> bool:
        """Of the buffer of tokens."""
        return True

    @property
    def recomputes(self) -> bool:
        """Whether each pass runs over all tokens."""
        return True

    def init(
        self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> NoReturn:
        """Refuse: the tokens are those of the whole model, and no layer keeps any.

        Raises:
            UnsupportedError: always.
        """
        del batch, slots, kv_heads, head_dim, dtype
        raise UnsupportedError("a cache of kind none() has no layers; use jkv.init_cache")

    def init_cache(self, config: Shape, batch: int, slots: int, dtype: Any) -> Recompute:
        """An empty history."""
        del dtype
        tokens = Tokens(tokens=jnp.zeros((batch, slots), jnp.int32), layers=config.layers)
        return Recompute(
            layers=(tokens,),
            lengths=jnp.zeros((batch,), jnp.int32),
            overflowed=jnp.zeros((batch,), bool),
        )


def none() -> NoneKind:
    """Keep nothing and recompute the whole prefix at each step: what a cache is compared with."""
    return NoneKind()
