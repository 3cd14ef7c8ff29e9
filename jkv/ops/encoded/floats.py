"""Floating numbers of fewer bits."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from jkv._axes import Array
from jkv._pytree import pytree, replace, static
from jkv._text import brief
from jkv.ops import quantize
from jkv.ops.encoded.base import PRODUCT, Stored, check_slots, halves, wide
from jkv.ops.write import write

TOP = 448.0  # the largest number of e4m3
SHIFT = 2.0**8  # half precision has an exponent bias that is larger by 8


@pytree
class Floats8(Stored):
    """8-bit floats with a scale per token, see `Float8`."""

    codes: Array  # [B, K, S, H] bits of float8_e4m3fn
    scales: Array  # [B, K, S] bits of bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once merged."""
        return self.codes.shape

    def put(self, new: Float[Array, "B R K H"], at: Int[Array, "B U"], run: int = 1) -> Floats8:
        """Encode tokens, once."""
        new = new.astype(jnp.float32)
        top = jnp.max(jnp.abs(new), axis=-1)
        finite = jnp.all(jnp.isfinite(new), axis=-1)  # XLA's largest on the CPU passes over NaN
        scales = quantize.up(jnp.maximum(top / TOP, quantize.LEAST))
        scaled = new / scales[..., None].astype(jnp.float32)
        codes = jnp.where(finite[..., None], scaled, 0.0).astype(jnp.float8_e4m3fn)
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
        scales = halves(jnp.where(finite, scales, jnp.nan))
        return Floats8(
            codes=write(self.codes, codes, at, run), scales=write(self.scales, scales, at, run)
        )

    def _numbers(self) -> Array:
        """What the codes stand for, but for the scale and for a factor of `SHIFT`.

        As bits of a half precision number those of e4m3 mean 2^-8 as much, subnormal numbers
        included; and that is a type which processors convert.
        """
        codes = self.codes.astype(jnp.uint16)
        sign, rest = codes & jnp.uint16(0x80), codes & jnp.uint16(0x7F)
        half = (sign << jnp.uint16(8)) | (rest << jnp.uint16(7))
        return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32)

    def decode(self) -> Float[Array, "*lines S H"]:
        """All of it in float32."""
        return self._numbers() * (wide(self.scales) * SHIFT)[..., None]

    def scores(self, q: Float[Array, "Z R H"], start: Any, size: int) -> Float[Array, "Z R size"]:
        """Products with keys; see `Encoded`."""
        block = self.block(start, size)
        out = jnp.einsum("zrh,zsh->zrs", q, block._numbers(), **PRODUCT)
        return out * (wide(block.scales) * SHIFT)[:, None]

    def weighted(
        self, w: Float[Array, "Z R size"], start: Any, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Weighted sum of values; see `Encoded`."""
        block = self.block(start, w.shape[2])
        scales = jnp.where(used, wide(block.scales) * SHIFT, 0.0)
        return jnp.einsum("zrs,zsh->zrh", w * scales[:, None], block._numbers(), **PRODUCT)


@dataclasses.dataclass(frozen=True)
class Float8:
    """8-bit floats, e4m3, with a scale per token (Micikevicius et al. 2022, arXiv:2209.05433)."""

    unit: ClassVar[int] = 1

    def empty(self, batch: int, heads: int, slots: int, dim: int, dtype: Any) -> Floats8:
        """Zeros.

        Raises:
            ValueError: no slots.
        """
        del dtype
        check_slots(slots, 1)
        return Floats8(
            codes=jnp.zeros((batch, heads, slots, dim), jnp.uint8),
            scales=jnp.zeros((batch, heads, slots), jnp.uint16),
        )


@pytree
class Plain(Stored):
    """Numbers in a dtype, see `Cast`."""

    numbers: Array  # [B, K, S, H], of 16-bit ones the bits, for the reason that `halves` has
    dtype: str = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once merged."""
        return self.numbers.shape

    def put(self, new: Float[Array, "B R K H"], at: Int[Array, "B U"], run: int = 1) -> Plain:
        """Round to the dtype, once."""
        new = new.astype(self.dtype)
        if self.numbers.dtype == jnp.uint16:
            new = lax.bitcast_convert_type(new, jnp.uint16)
        return replace(self, numbers=write(self.numbers, new, at, run))

    def decode(self) -> Float[Array, "*lines S H"]:
        """All of it in float32."""
        if self.dtype == "bfloat16":
            return wide(self.numbers)
        if self.numbers.dtype == jnp.uint16:
            return lax.bitcast_convert_type(self.numbers, self.dtype).astype(jnp.float32)
        return self.numbers.astype(jnp.float32)

    def scores(self, q: Float[Array, "Z R H"], start: Any, size: int) -> Float[Array, "Z R size"]:
        """Products with keys; see `Encoded`."""
        return jnp.einsum("zrh,zsh->zrs", q, self.block(start, size).decode(), **PRODUCT)

    def weighted(
        self, w: Float[Array, "Z R size"], start: Any, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Weighted sum of values; see `Encoded`."""
        values = jnp.where(used[..., None], self.block(start, w.shape[2]).decode(), 0.0)
        return jnp.einsum("zrs,zsh->zrh", w, values, **PRODUCT)


@dataclasses.dataclass(frozen=True)
class Cast:
    """Another floating dtype, such as "bfloat16"; float32 is held as it is.

    Attributes:
        dtype: its name, or anything that names one.
    """

    dtype: Any
    unit: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Refuse a dtype that holds no fractions; of the spellings of one, keep its name."""
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

    def empty(self, batch: int, heads: int, slots: int, dim: int, dtype: Any) -> Plain:
        """Zeros.

        Raises:
            ValueError: no slots.
        """
        del dtype
        check_slots(slots, 1)
        held = jnp.float32 if self.dtype == "float32" else jnp.uint16
        return Plain(numbers=jnp.zeros((batch, heads, slots, dim), held), dtype=self.dtype)
