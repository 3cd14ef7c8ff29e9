"""Codecs of floating numbers of fewer bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jkv._axes import Array, Index
from jkv._pytree import pytree, replace, static
from jkv._text import brief
from jkv.ops import quantize
from jkv.ops.codecs import base
from jkv.ops.codecs.base import PRODUCT, Encoded, check_slots, from_bf16_bits, to_bf16_bits
from jkv.ops.write import write

MAX_E4M3 = 448.0
SHIFT = 2.0**8  # half precision has an exponent bias that is larger by 8


@pytree
class Float8Codes(Encoded):
    """8-bit floats with a scale per token, see `Float8`."""

    codes: Array  # [B, K, S, H] bits of float8_e4m3fn
    scales: Array  # [B, K, S] bits of bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once flattened."""
        return self.codes.shape

    def write_blocks(
        self, new: Float[Array, "B R K H"], at: Int[Array, "B U"], run: int = 1
    ) -> Float8Codes:
        """Encode tokens, once; see `Encoded`."""
        new = new.astype(jnp.float32)
        largest = jnp.max(jnp.abs(new), axis=-1)
        finite = jnp.all(jnp.isfinite(new), axis=-1)  # XLA's largest on the CPU passes over NaN
        scales = quantize.round_up(jnp.maximum(largest / MAX_E4M3, quantize.LEAST))
        scaled = new / scales[..., None].astype(jnp.float32)
        codes = jnp.where(finite[..., None], scaled, 0.0).astype(jnp.float8_e4m3fn)
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
        scales = to_bf16_bits(jnp.where(finite, scales, jnp.nan))
        return Float8Codes(
            codes=write(self.codes, codes, at, run), scales=write(self.scales, scales, at, run)
        )

    def map_slots(self, change: Callable[[Array, int], Array]) -> Float8Codes:
        """Apply `change` to each leaf, given its axis of slots."""
        return base.map_slots(self, change)

    def flatten_heads(self) -> Float8Codes:
        """Make rows and heads one axis."""
        return base.flatten_heads(self)

    def slice_slots(self, start: Index, size: int) -> Float8Codes:
        """Slice slots `start` to ``start + size``."""
        return base.slice_slots(self, start, size)

    def _numbers(self) -> Array:
        """Return what the codes stand for, divided by the scale and by `SHIFT`.

        Read as half precision, the bits of an e4m3 number mean 2^-8 as much, subnormal numbers
        included, and half precision is a type that processors convert.
        """
        codes = self.codes.astype(jnp.uint16)
        sign, rest = codes & jnp.uint16(0x80), codes & jnp.uint16(0x7F)
        half = (sign << jnp.uint16(8)) | (rest << jnp.uint16(7))
        return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32)

    def decode(self) -> Float[Array, "*lines S H"]:
        """Decode all tokens to float32."""
        return self._numbers() * (from_bf16_bits(self.scales) * SHIFT)[..., None]

    def scores(self, q: Float[Array, "Z R H"], start: Index, size: int) -> Float[Array, "Z R size"]:
        """Multiply queries with keys; see `Encoded`."""
        block = self.slice_slots(start, size)
        out = jnp.einsum("zrh,zsh->zrs", q, block._numbers(), **PRODUCT)
        return out * (from_bf16_bits(block.scales) * SHIFT)[:, None]

    def weighted_sum(
        self, w: Float[Array, "Z R size"], start: Index, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Sum values with weights; see `Encoded`."""
        block = self.slice_slots(start, w.shape[2])
        scales = jnp.where(used, from_bf16_bits(block.scales) * SHIFT, 0.0)
        return jnp.einsum("zrs,zsh->zrh", w * scales[:, None], block._numbers(), **PRODUCT)


@dataclasses.dataclass(frozen=True)
class Float8:
    """8-bit floats, e4m3, with a scale per token (Micikevicius et al. 2022, arXiv:2209.05433).

    Example:
        >>> jkv.near_far(recent=0, far=jkv.ops.codecs.Float8()) == jkv.fp8()
        True
    """

    @property
    def block_size(self) -> int:
        """Every token is encoded by itself."""
        return 1

    def empty(self, batch: int, heads: int, slots: int, dim: int, dtype: DTypeLike) -> Float8Codes:
        """Return zeros for `slots` tokens per row.

        Raises:
            ValueError: no slots.
        """
        del dtype
        check_slots(slots, 1)
        return Float8Codes(
            codes=jnp.zeros((batch, heads, slots, dim), jnp.uint8),
            scales=jnp.zeros((batch, heads, slots), jnp.uint16),
        )


@pytree
class CastArray(Encoded):
    """Numbers in another dtype, see `Cast`."""

    numbers: (
        Array  # [B, K, S, H], of 16-bit ones the bits, for the reason that `to_bf16_bits` gives
    )
    dtype: str = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once flattened."""
        return self.numbers.shape

    def write_blocks(
        self, new: Float[Array, "B R K H"], at: Int[Array, "B U"], run: int = 1
    ) -> CastArray:
        """Round to the dtype, once; see `Encoded`."""
        new = new.astype(self.dtype)
        if self.numbers.dtype == jnp.uint16:
            new = lax.bitcast_convert_type(new, jnp.uint16)
        return replace(self, numbers=write(self.numbers, new, at, run))

    def map_slots(self, change: Callable[[Array, int], Array]) -> CastArray:
        """Apply `change` to each leaf, given its axis of slots."""
        return base.map_slots(self, change)

    def flatten_heads(self) -> CastArray:
        """Make rows and heads one axis."""
        return base.flatten_heads(self)

    def slice_slots(self, start: Index, size: int) -> CastArray:
        """Slice slots `start` to ``start + size``."""
        return base.slice_slots(self, start, size)

    def decode(self) -> Float[Array, "*lines S H"]:
        """Decode all tokens to float32."""
        if self.dtype == "bfloat16":
            return from_bf16_bits(self.numbers)
        if self.numbers.dtype == jnp.uint16:
            return lax.bitcast_convert_type(self.numbers, self.dtype).astype(jnp.float32)
        return self.numbers.astype(jnp.float32)

    def scores(self, q: Float[Array, "Z R H"], start: Index, size: int) -> Float[Array, "Z R size"]:
        """Multiply queries with keys; see `Encoded`."""
        return jnp.einsum("zrh,zsh->zrs", q, self.slice_slots(start, size).decode(), **PRODUCT)

    def weighted_sum(
        self, w: Float[Array, "Z R size"], start: Index, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Sum values with weights; see `Encoded`."""
        values = jnp.where(used[..., None], self.slice_slots(start, w.shape[2]).decode(), 0.0)
        return jnp.einsum("zrs,zsh->zrh", w, values, **PRODUCT)


@dataclasses.dataclass(frozen=True)
class Cast:
    """Another floating dtype, such as "bfloat16"; float32 is held as it is.

    Attributes:
        dtype: its name, or anything that names one.

    Raises:
        ValueError: no float of 16 or 32 bits.

    Example:
        >>> kind = jkv.near_far(recent=16, far=jkv.ops.codecs.Cast("bfloat16"))
    """

    dtype: DTypeLike

    @property
    def block_size(self) -> int:
        """Every token is encoded by itself."""
        return 1

    def __post_init__(self) -> None:
        """Refuse a dtype that holds no fractions, and store the dtype's name."""
        try:
            dtype = jnp.dtype(self.dtype)
        except TypeError:
            raise ValueError(
                f"got dtype={brief(self.dtype)}; expected one such as 'bfloat16'"
            ) from None
        if dtype.name not in ("bfloat16", "float16", "float32"):
            raise ValueError(
                f"got dtype={brief(dtype.name)}; expected 'bfloat16', 'float16' or 'float32' (a "
                "float of 8 bits needs scales, which Float8 has)"
            )
        object.__setattr__(self, "dtype", dtype.name)

    def empty(self, batch: int, heads: int, slots: int, dim: int, dtype: DTypeLike) -> CastArray:
        """Return zeros for `slots` tokens per row.

        Raises:
            ValueError: no slots.
        """
        del dtype
        check_slots(slots, 1)
        name = jnp.dtype(self.dtype).name
        storage = jnp.float32 if name == "float32" else jnp.uint16
        return CastArray(numbers=jnp.zeros((batch, heads, slots, dim), storage), dtype=name)
