"""No cache: the whole prefix is recomputed at each step, the baseline of every comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NoReturn

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jkv import ops
from jkv._axes import Array
from jkv._pytree import pytree
from jkv.cache.form import Form
from jkv.cache.protocol import CacheKind, LayerCache, Layers, Step
from jkv.cache.shared_state import SharedState
from jkv.errors import UnsupportedError
from jkv.ops.masks import AttentionSpec


@pytree
class NoCache(LayerCache):
    """A layer that keeps nothing: new tokens see each other and no more.

    In a cache, whose layers share the history of tokens, all of these are new in each pass.

    Example:
        >>> layer = jkv.none().init(batch=1, slots=8, kv_heads=2, head_dim=4, dtype="float32")
        >>> jax.tree.leaves(layer), layer.capacity
        ([], None)
    """

    @property
    def shares(self) -> type[TokenHistory]:
        """The history of tokens."""
        return TokenHistory

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
    ) -> tuple[Float[Array, "B T N H"], NoCache]:
        """Attend causally within the chunk."""
        part = ops.attention_with_chunk(q, k, v, step.positions, spec)
        return part.out.astype(q.dtype), self

    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], step: Step) -> NoCache:
        """Keep nothing."""
        del k, v, step
        return self

    def take(self, rows: Int[Array, " R"]) -> NoCache:
        """Return itself: there are no rows."""
        del rows
        return self

    def resize(self, slots: int) -> NoCache:
        """Return itself: there are no slots."""
        del slots
        return self

    def crop(self, held: Int[Array, " B"], lengths: Int[Array, " B"]) -> NoCache:
        """Return itself: there are no tokens."""
        del held, lengths
        return self

    def concat(self, others: Sequence[NoCache]) -> NoCache:
        """Return itself: there are no rows."""
        del others
        return self

    def to_legacy(self, lengths: Int[Array, " B"]) -> NoReturn:
        """Refuse: there are no keys and values to give.

        Raises:
            UnsupportedError: always.
        """
        del lengths
        raise UnsupportedError(
            "a cache of kind none() keeps no keys and values to convert or to attend to"
        )

    def partition_spec(self, axis: str) -> NoCache:
        """Return itself: there are no leaves."""
        del axis
        return self


@pytree
class TokenHistory(SharedState):
    """The tokens of each row, over all of which every pass runs."""

    tokens: Array  # [B, S] int32

    @classmethod
    def empty(
        cls, layers: Sequence[LayerCache], batch: int, slots: int
    ) -> tuple[Layers, TokenHistory]:
        """Make an empty history; the layers keep nothing."""
        return tuple(layers), cls(jnp.zeros((batch, slots), jnp.int32))

    def capacity(self, layers: Layers) -> int:
        """Return the tokens that a row can hold."""
        del layers
        return self.tokens.shape[1]

    @property
    def grows(self) -> bool:
        """The work of a pass grows with the buffer, so a loop keeps it as short as it can."""
        return True

    @property
    def recomputes(self) -> bool:
        """Whether each pass runs over all tokens."""
        return True

    def begin(
        self, reserved: None, tokens: Int[Array, "B T"], step: Step
    ) -> tuple[TokenHistory, Int[Array, "B S"], Step]:
        """Append the tokens, and begin a pass over the whole history."""
        del reserved
        batch, slots = self.tokens.shape
        at = jnp.where(step.positions < 0, slots, step.positions)
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        history = self.tokens.at[rows, at].set(tokens.astype(jnp.int32), mode="drop")
        whole = Step.after(jnp.zeros_like(step.stop), step.stop, slots)
        return TokenHistory(history), history, whole

    def end(self, hidden: Float[Array, "B S *D"], step: Step) -> Float[Array, "B T *D"]:
        """Return the new tokens' part of the hidden states."""
        at = jnp.maximum(step.positions, 0)
        return jnp.take_along_axis(hidden, at.reshape(*at.shape, *(1,) * (hidden.ndim - 2)), axis=1)

    def take(self, rows: Int[Array, " R"]) -> TokenHistory:
        """Return the history of other rows."""
        return TokenHistory(self.tokens[rows])

    def crop(
        self, layers: Layers, held: Int[Array, " B"], lengths: Int[Array, " B"]
    ) -> TokenHistory:
        """Return itself: what lies past a row's length is padding."""
        del layers, held, lengths
        return self

    def resize(self, layers: Layers, slots: int) -> TokenHistory:
        """Return the same tokens in a buffer of another length."""
        del layers
        more = max(slots - self.tokens.shape[1], 0)
        return TokenHistory(jnp.pad(self.tokens[:, :slots], ((0, 0), (0, more))))

    def concat(self, others: Sequence[TokenHistory], layers: Sequence[Layers]) -> TokenHistory:
        """Concatenate along the batch axis."""
        del layers
        return TokenHistory(jnp.concatenate([self.tokens, *(o.tokens for o in others)]))


@dataclasses.dataclass(frozen=True)
class NoneKind(CacheKind):
    """See `none`."""

    @property
    def grows(self) -> bool:
        """The buffer of tokens grows."""
        return True

    @property
    def recomputes(self) -> bool:
        """Whether each pass runs over all tokens."""
        return True

    def init(
        self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> NoCache:
        """Make a layer that keeps nothing."""
        del batch, slots, kv_heads, head_dim, dtype
        return NoCache()


def none() -> NoneKind:
    """Keep nothing and recompute the whole prefix at each step: what a cache is compared with.

    Example:
        >>> cache = jkv.init_cache(lm.config, jkv.none(), batch=1, slots=8)
        >>> cache.recomputes, jax.tree.leaves(cache.layers)
        (True, [])
    """
    return NoneKind()


FORMS = {
    "none": Form(none, "nothing: the whole prefix is computed again at each step"),
}
