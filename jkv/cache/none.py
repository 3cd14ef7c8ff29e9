"""No cache: the whole prefix is recomputed at each step, the baseline of every comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Float, Int

from jkv import ops
from jkv._axes import Array
from jkv._pytree import pytree, replace, static
from jkv.cache.base import Cache
from jkv.cache.protocol import Shape, Stack, Step
from jkv.errors import UnsupportedError
from jkv.ops.masks import AttentionSpec


@pytree
class Chunk:
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

    def put(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], step: Step) -> Chunk:
        """Nothing is kept."""
        del k, v, step
        return self


@pytree
class Tokens:
    """What a model without a cache has to remember: the tokens themselves, for all layers."""

    tokens: Array  # [B, S] int32
    layers: int = static()  # of the model

    grows: ClassVar[bool] = True

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.tokens.shape[1]

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
        raise UnsupportedError("a cache of kind none() keeps no keys and values to convert")


@pytree
class Recompute(Cache):
    """The cache of `none()`: runs the model over every row's whole history at each pass.

    A `Cache` to whoever calls it, so that no model, loop or test needs to know of it.
    """

    # The work of a pass grows with the buffer, so a loop keeps it as short as it can.
    recomputes: ClassVar[bool] = True

    def advance(
        self, stack: Stack, tokens: Int[Array, "B T"], counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T D"], Recompute]:
        """Append the tokens, run the layers over the history, return the new tokens' part."""
        self.expect(tokens)
        (past,) = self.layers
        step, overflowed = self.admit(tokens.shape[1], counts)
        slots = jnp.where(step.positions < 0, past.capacity, step.positions)
        rows = jnp.arange(self.batch, dtype=jnp.int32)[:, None]
        history = past.tokens.at[rows, slots].set(tokens.astype(jnp.int32), mode="drop")
        whole = Step.after(jnp.zeros_like(step.stop), step.stop, past.capacity)
        hidden, _ = stack(history, whole, (Chunk(),) * past.layers)
        hidden = jnp.take_along_axis(hidden, jnp.maximum(step.positions, 0)[..., None], axis=1)
        layers = (replace(past, tokens=history),)
        return hidden, Recompute(layers=layers, lengths=step.stop, overflowed=overflowed)


@dataclasses.dataclass(frozen=True)
class NoneKind:
    """See `none`."""

    grows: ClassVar[bool] = True
    recomputes: ClassVar[bool] = True

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
