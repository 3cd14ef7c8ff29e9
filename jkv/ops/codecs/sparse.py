"""A codec that keeps some channels of each token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jkv._axes import Array, Index
from jkv._pytree import pytree, replace, static
from jkv._text import brief
from jkv.ops.codecs import base
from jkv.ops.codecs.affine import FEW, Affine, PerTokenCodes
from jkv.ops.codecs.base import PRODUCT, Encoded, check_slots
from jkv.ops.codecs.floats import Cast, CastArray
from jkv.ops.write import write


@pytree
class SparseArray(Encoded):
    """Some channels of each token, and which they are, see `Sparse`."""

    kept: PerTokenCodes | CastArray  # of [B, K, S, C]
    channels: Array  # [B, K, S, C] uint8 or uint16, ascending
    dim: int = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once flattened."""
        return (*self.channels.shape[:-1], self.dim)

    def write_blocks(
        self, new: Float[Array, "B R K H"], at: Int[Array, "B U"], run: int = 1
    ) -> SparseArray:
        """Keep the channels of the largest magnitude, once; NaN is larger than any."""
        size = jnp.abs(new.astype(jnp.float32))
        _, channels = lax.top_k(jnp.where(jnp.isnan(size), jnp.inf, size), self.channels.shape[-1])
        channels = jnp.sort(channels, axis=-1)
        return replace(
            self,
            kept=self.kept.write_blocks(jnp.take_along_axis(new, channels, axis=-1), at, run),
            channels=write(self.channels, channels, at, run),
        )

    def map_slots(self, change: Callable[[Array, int], Array]) -> SparseArray:
        """Apply `change` to each leaf, given its axis of slots."""
        channels = change(self.channels, self.channels.ndim - 2)
        return replace(self, kept=self.kept.map_slots(change), channels=channels)

    def flatten_heads(self) -> SparseArray:
        """Make rows and heads one axis."""
        return base.flatten_heads(self)

    def slice_slots(self, start: Index, size: int) -> SparseArray:
        """Slice slots `start` to ``start + size``."""
        return base.slice_slots(self, start, size)

    def decode(self) -> Float[Array, "*lines S H"]:
        """Decode all tokens to float32."""
        *lead, count = self.channels.shape
        lines = jnp.arange(math.prod(lead), dtype=jnp.int32)[:, None]
        flat = jnp.zeros((math.prod(lead), self.dim), jnp.float32)
        channels, kept = (x.reshape(-1, count) for x in (self.channels, self.kept.decode()))
        flat = flat.at[lines, channels].set(kept, mode="drop", unique_indices=True)
        return flat.reshape(self.shape)

    def scores(self, q: Float[Array, "Z R H"], start: Index, size: int) -> Float[Array, "Z R size"]:
        """Multiply queries with keys; see `Encoded`."""
        block = self.slice_slots(start, size)
        if q.shape[1] > FEW:
            return jnp.einsum("zrh,zsh->zrs", q, block.decode(), **PRODUCT)
        kept = block.kept.decode()[:, None]
        chosen = jax.vmap(lambda q, at: q.at[:, at].get(mode="clip"))(q, block.channels)
        # A sum is what XLA does best as a product with ones.
        return jnp.einsum("zrsc,c->zrs", chosen * kept, jnp.ones(kept.shape[-1]), **PRODUCT)

    def weighted_sum(
        self, w: Float[Array, "Z R size"], start: Index, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Sum values with weights; see `Encoded`."""
        values = jnp.where(used[..., None], self.slice_slots(start, w.shape[2]).decode(), 0.0)
        return jnp.einsum("zrs,zsh->zrh", w, values, **PRODUCT)


@dataclasses.dataclass(frozen=True)
class Sparse:
    """The largest `keep` share of each token's channels, with their numbers; the rest is zero.

    Attributes:
        keep: share of the channels.
        inner: a codec per token for what is kept, in the model's dtype where None.

    Raises:
        ValueError: no such share, or a codec of blocks of tokens.

    Example:
        >>> kind = jkv.near_far(recent=16, far=jkv.ops.codecs.Sparse(keep=0.5))
    """

    keep: float = 0.25
    inner: Affine | None = None

    @property
    def block_size(self) -> int:
        """Every token is encoded by itself."""
        return 1

    def __post_init__(self) -> None:
        """Refuse settings that no form has."""
        number = isinstance(self.keep, int | float) and not isinstance(self.keep, bool)
        if not number or not 0 < self.keep <= 1:
            raise ValueError(f"got keep={brief(self.keep)}; expected a share above 0 and at most 1")
        per_token = isinstance(self.inner, Affine) and self.inner.block_size == 1
        if self.inner is not None and not per_token:
            raise ValueError(
                f"got inner={brief(self.inner)}; expected an Affine codec per token, or None"
            )

    def empty(self, batch: int, heads: int, slots: int, dim: int, dtype: DTypeLike) -> SparseArray:
        """Return zeros for `slots` tokens per row.

        Raises:
            ValueError: no slots.
        """
        check_slots(slots, 1)
        count = max(1, round(self.keep * dim))
        inner = Cast(dtype) if self.inner is None else self.inner
        number = jnp.uint8 if dim <= 256 else jnp.uint16
        return SparseArray(
            kept=inner.empty(batch, heads, slots, count, dtype),  # pyright: ignore
            channels=jnp.zeros((batch, heads, slots, count), number),
            dim=dim,
        )
