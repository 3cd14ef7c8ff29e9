"""Keys and values in other forms than arrays of numbers, which take part in products as they are.

Attention asks two things of what it reads: the products of queries with keys, and the weighted sum
of values. An encoded array answers both for a block of slots. What can be moved out of the block
is: steps that channels share are multiplied into the queries, steps that tokens share into the
scores and weights, so that the only work per number is to unpack and convert it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from jkv._axes import Array
from jkv._pytree import pytree, static
from jkv.ops import quantize
from jkv.ops.write import write

E = TypeVar("E", bound="_Stored")
_PRODUCT: dict[str, Any] = {
    "preferred_element_type": jnp.float32,
    "precision": lax.Precision.HIGHEST,
}


@runtime_checkable
class Codec(Protocol):
    """How one stream of tokens (keys or values) is stored: a small frozen value."""

    @property
    def unit(self) -> int:
        """Consecutive tokens that are encoded together."""
        ...

    def empty(self, batch: int, heads: int, slots: int, dim: int, dtype: Any) -> Encoded:
        """Nothing yet, with room for `slots` tokens, whole units."""
        ...


@runtime_checkable
class Encoded(Protocol):
    """Tokens ``[B, K, S, H]`` in a codec's form: a frozen pytree.

    Leaves begin with ``[B, K]``, and their third axis is S or S / unit.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once merged."""
        ...

    @property
    def unit(self) -> int:
        """Consecutive tokens that are encoded together."""
        ...

    def put(self, new: Float[Array, "B R K H"], at: Int[Array, "B U"]) -> Encoded:
        """With unit u of the new tokens as unit ``at[b, u]``; dropped where there is none."""
        ...

    def merged(self) -> Encoded:
        """Rows and heads as one axis, ``Z = B * K``."""
        ...

    def scores(self, q: Float[Array, "Z R H"], start: Any, size: int) -> Float[Array, "Z R size"]:
        """Products of queries with the keys of slots `start` to ``start + size``; once merged."""
        ...

    def weighted(
        self, w: Float[Array, "Z R size"], start: Any, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Weighted sum of the values of slots from `start`; those not `used` may be anything."""
        ...

    def decode(self) -> Float[Array, "*lines S H"]:
        """All of it in float32."""
        ...

    def resize(self: E, slots: int) -> E:
        """The same tokens in a buffer of another length."""
        ...


def finite(new: Float[Array, "B T K H"], real: Bool[Array, "B T 1 1"]) -> Bool[Array, " B"]:
    """Whether all numbers of a row's real tokens are."""
    return jnp.all(jnp.isfinite(new) | ~real, axis=(1, 2, 3))


class _Stored:
    """What all forms share: leaves that begin with rows and heads, then slots or units."""

    dim: int
    unit: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once merged."""
        first = jax.tree.leaves(self)[0]
        return (*first.shape[:-1], self.dim)

    def merged(self: E) -> E:
        """Rows and heads as one axis."""
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self)

    def resize(self: E, slots: int) -> E:
        """The same tokens in a buffer of another length."""
        held = self.shape[2]

        def resized(leaf: Array) -> Array:
            count = slots * leaf.shape[2] // held
            room = [(0, 0), (0, 0), (0, max(count - leaf.shape[2], 0))]
            return jnp.pad(leaf[:, :, :count], room + [(0, 0)] * (leaf.ndim - 3))

        return jax.tree.map(resized, self)

    def _slice(self: E, start: Any, size: int) -> E:
        """Slots `start` to ``start + size`` of a merged form, both whole units."""
        held = self.shape[1]

        def cut(leaf: Array) -> Array:
            per = held // leaf.shape[1]
            return lax.dynamic_slice_in_dim(leaf, start // per, size // per, 1)

        return jax.tree.map(cut, self)


@pytree
class Rounded(_Stored):
    """Codes of a few bits with a step and a zero point per group, see `Affine`."""

    codes: Array  # [B, K, S, P] uint8, packed
    steps: Array  # bfloat16: [B, K, S, groups] per token, [B, K, S / unit, H] per channel
    zeros: Array  # int16, like the steps, which are their unit
    dim: int = static()
    bits: int = static()
    group: int = static()
    unit: int = static()  # 1 per token, `group` per channel

    def put(self, new: Float[Array, "B R K H"], at: Int[Array, "B U"]) -> Rounded:
        """Encode whole units, once."""
        batch, count, heads, dim = new.shape
        if self.unit > 1:
            units = new.reshape(batch, count // self.unit, self.unit, heads, dim)
            codes, steps, zeros = quantize.affine(units, 2, self.bits)
            codes = codes.reshape(new.shape)
            steps, zeros = steps[:, :, 0], zeros[:, :, 0]
        else:
            room = self._groups * self.group - dim
            wide = jnp.pad(new, ((0, 0), (0, 0), (0, 0), (0, room)))
            wide = wide.reshape(batch, count, heads, self._groups, self.group)
            real = jnp.arange(wide.shape[-2] * self.group).reshape(wide.shape[-2:]) < dim
            codes, steps, zeros = quantize.affine(wide, -1, self.bits, real[None, None, None])
            codes = codes.reshape(batch, count, heads, -1)[..., :dim]
            steps, zeros = steps[..., 0], zeros[..., 0]
        slots = at
        if self.unit > 1:
            slots = at[:, :, None] * self.unit + jnp.arange(self.unit)[None, None]
            slots = jnp.where(at[:, :, None] < 0, -1, slots).reshape(batch, -1)
        return Rounded(
            codes=write(self.codes, quantize.pack(codes, self.bits), slots),
            steps=write(self.steps, steps, at),
            zeros=write(self.zeros, zeros, at),
            dim=self.dim,
            bits=self.bits,
            group=self.group,
            unit=self.unit,
        )

    @property
    def _groups(self) -> int:
        return -(-self.dim // self.group)

    def _codes(self) -> Array:
        return quantize.unpack(self.codes, self.bits, self.dim).astype(jnp.float32)

    def _offsets(self) -> tuple[Array, Array]:
        """Steps, and the numbers that code 0 stands for, both float32."""
        steps = self.steps.astype(jnp.float32)
        return steps, steps * self.zeros.astype(jnp.float32)

    def scores(self, q: Float[Array, "Z R H"], start: Any, size: int) -> Float[Array, "Z R size"]:
        """Products with keys; see `Encoded`."""
        block = self._slice(start, size)
        codes, (steps, lows) = block._codes(), block._offsets()
        if self.unit > 1:
            # A channel's step belongs to the query: one product of plain codes is left.
            z, r, h = q.shape
            units = codes.reshape(z, -1, self.unit, h)
            scaled = q[:, :, None] * steps[:, None]
            out = jnp.einsum("zruh,zuth->zrut", scaled, units, **_PRODUCT)
            low = jnp.einsum("zrh,zuh->zru", q, lows, **_PRODUCT)
            return (out + low[..., None]).reshape(z, r, size)
        q, codes = self._by_group(q), self._by_group(codes)
        out = jnp.einsum("zrgh,zsgh->zgrs", q, codes, **_PRODUCT)
        steps, lows = (jnp.moveaxis(x, -1, 1)[:, :, None] for x in (steps, lows))
        whole = jnp.moveaxis(jnp.sum(q, axis=-1), -1, 1)[..., None]
        return jnp.sum(out * steps + whole * lows, axis=1)

    def weighted(
        self, w: Float[Array, "Z R size"], start: Any, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Weighted sum of values; see `Encoded`."""
        size = w.shape[2]
        block = self._slice(start, size)
        codes, (steps, lows) = block._codes(), block._offsets()
        if self.unit > 1:
            z, r, _ = w.shape
            some = jnp.any(used.reshape(z, -1, self.unit), axis=-1)[..., None]
            steps, lows = (jnp.where(some, x, 0.0) for x in (steps, lows))
            parts = w.reshape(z, r, -1, self.unit)
            units = codes.reshape(z, -1, self.unit, self.dim)
            out = jnp.einsum("zrut,zuth->zruh", parts, units, **_PRODUCT)
            out = jnp.sum(out * steps[:, None], axis=2)
            return out + jnp.einsum("zru,zuh->zrh", jnp.sum(parts, axis=-1), lows, **_PRODUCT)
        steps, lows = (jnp.where(used[..., None], x, 0.0) for x in (steps, lows))
        # A token's step belongs to its weight.
        scaled = w[..., None] * steps[:, None]
        out = jnp.einsum("zrsg,zsgh->zrgh", scaled, self._by_group(codes), **_PRODUCT)
        low = jnp.einsum("zrs,zsg->zrg", w, lows, **_PRODUCT)
        return (out + low[..., None]).reshape(*w.shape[:2], -1)[..., : self.dim]

    def _by_group(self, x: Array) -> Array:
        """[..., H] as [..., groups, group], zeros where the last is short."""
        room = [(0, 0)] * (x.ndim - 1) + [(0, self._groups * self.group - self.dim)]
        return jnp.pad(x, room).reshape(*x.shape[:-1], self._groups, self.group)

    def decode(self) -> Float[Array, "*lines S H"]:
        """All of it in float32."""
        steps, zeros = self.steps.astype(jnp.float32), self.zeros.astype(jnp.float32)
        if self.unit > 1:
            steps, zeros = (jnp.repeat(x, self.unit, axis=2) for x in (steps, zeros))
        else:
            steps, zeros = (
                jnp.repeat(x, self.group, axis=-1)[..., : self.dim] for x in (steps, zeros)
            )
        return (self._codes() + zeros) * steps


@dataclasses.dataclass(frozen=True)
class Affine:
    """Codes of 8, 4 or 2 bits with a step and a zero point for each group of numbers.

    Attributes:
        bits: of a code.
        axis: "token": a group is `group` channels of one token, all of them where None; "channel":
            it is one channel of `group` consecutive tokens (KIVI, Liu et al. 2024,
            arXiv:2402.02750), which keeps large channels of keys away from small ones.
        group: numbers that share a step; along tokens a power of two up to 128.
    """

    bits: Any = 8  # int
    axis: Any = "token"  # str
    group: Any = None  # int

    def __post_init__(self) -> None:
        """Refuse what there is no form for."""
        if self.bits not in (8, 4, 2):
            raise ValueError(f"got bits={self.bits!r}; expected 8, 4 or 2")
        if self.axis not in ("token", "channel"):
            raise ValueError(f"got axis={self.axis!r}; expected 'token' or 'channel'")
        group = self.group
        if group is None and self.axis == "token":
            return
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise ValueError(f"got group={group!r}; expected an integer of at least 1")
        if self.axis == "channel" and (group > 128 or group & (group - 1) or group < 2):
            raise ValueError(
                f"got group={group} tokens that share a step; expected a power of two, 2 to 128"
            )

    @property
    def unit(self) -> int:
        """Consecutive tokens that are encoded together."""
        return self.group if self.axis == "channel" and self.group else 1

    def empty(self, batch: int, heads: int, slots: int, dim: int, dtype: Any) -> Rounded:
        """Zeros."""
        del dtype
        group = min(self.group or dim, dim) if self.axis == "token" else self.unit
        width = quantize.lanes(dim, self.bits)[1]
        if self.axis == "channel":
            meta = (batch, heads, slots // group, dim)
        else:
            meta = (batch, heads, slots, -(-dim // group))
        return Rounded(
            codes=jnp.zeros((batch, heads, slots, width), jnp.uint8),
            steps=jnp.zeros(meta, jnp.bfloat16),
            zeros=jnp.zeros(meta, jnp.int16),
            dim=dim,
            bits=self.bits,
            group=group,
            unit=self.unit,
        )


class _Decodable(_Stored):
    """A form whose blocks are decoded before the product."""

    def _decoded(self) -> Array:
        raise NotImplementedError

    def decode(self) -> Float[Array, "*lines S H"]:
        """All of it in float32."""
        return self._decoded()

    def scores(self, q: Float[Array, "Z R H"], start: Any, size: int) -> Float[Array, "Z R size"]:
        """Products with keys; see `Encoded`."""
        return jnp.einsum("zrh,zsh->zrs", q, self._slice(start, size)._decoded(), **_PRODUCT)

    def weighted(
        self, w: Float[Array, "Z R size"], start: Any, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Weighted sum of values; see `Encoded`."""
        values = jnp.where(used[..., None], self._slice(start, w.shape[2])._decoded(), 0.0)
        return jnp.einsum("zrs,zsh->zrh", w, values, **_PRODUCT)


@pytree
class Floats8(_Decodable):
    """8-bit floats with a scale per token, see `Float8`."""

    codes: Array  # [B, K, S, H] float8_e4m3fn
    scales: Array  # [B, K, S, 1] bfloat16

    @property
    def dim(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """H."""
        return self.codes.shape[-1]

    def put(self, new: Float[Array, "B R K H"], at: Int[Array, "B U"]) -> Floats8:
        """Encode tokens."""
        wide = new.astype(jnp.float32)
        top = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
        scales = quantize.up(top / float(jnp.finfo(jnp.float8_e4m3fn).max))
        by = scales.astype(jnp.float32)
        codes = (wide / jnp.where(by > 0, by, 1.0)).astype(jnp.float8_e4m3fn)
        scales = jnp.where(jnp.isfinite(by), scales, jnp.nan)
        return Floats8(codes=write(self.codes, codes, at), scales=write(self.scales, scales, at))

    def _decoded(self) -> Array:
        return self.codes.astype(jnp.float32) * self.scales.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Float8:
    """8-bit floats, e4m3, with a scale per token (Micikevicius et al. 2022, arXiv:2209.05433)."""

    unit: ClassVar[int] = 1

    def empty(self, batch: int, heads: int, slots: int, dim: int, dtype: Any) -> Floats8:
        """Zeros."""
        del dtype
        return Floats8(
            codes=jnp.zeros((batch, heads, slots, dim), jnp.float8_e4m3fn),
            scales=jnp.zeros((batch, heads, slots, 1), jnp.bfloat16),
        )


@pytree
class Plain(_Decodable):
    """Another dtype, see `Cast`."""

    numbers: Array  # [B, K, S, H]

    @property
    def dim(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """H."""
        return self.numbers.shape[-1]

    def put(self, new: Float[Array, "B R K H"], at: Int[Array, "B U"]) -> Plain:
        """Round to the dtype."""
        return Plain(numbers=write(self.numbers, new, at))

    def _decoded(self) -> Array:
        return self.numbers.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Cast:
    """Another floating dtype, such as "bfloat16"."""

    dtype: str
    unit: ClassVar[int] = 1

    def empty(self, batch: int, heads: int, slots: int, dim: int, dtype: Any) -> Plain:
        """Zeros."""
        del dtype
        return Plain(numbers=jnp.zeros((batch, heads, slots, dim), self.dtype))


@pytree
class Sparsed(_Decodable):
    """Some channels of each token, and which they are, see `Sparse`."""

    kept: Any  # [B, K, S, k], or Rounded
    channels: Array  # [B, K, S, k] uint8 or uint16, ascending
    dim: int = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once merged."""
        return (*self.channels.shape[:-1], self.dim)

    def put(self, new: Float[Array, "B R K H"], at: Int[Array, "B U"]) -> Sparsed:
        """Keep the channels of the largest magnitude; NaN is larger than any."""
        size = jnp.abs(new.astype(jnp.float32))
        _, channels = lax.top_k(jnp.where(jnp.isnan(size), jnp.inf, size), self.channels.shape[-1])
        channels = jnp.sort(channels, axis=-1)
        kept = jnp.take_along_axis(new, channels, axis=-1)
        plain = isinstance(self.kept, jax.Array)
        return Sparsed(
            kept=write(self.kept, kept, at) if plain else self.kept.put(kept, at),
            channels=write(self.channels, channels, at),
            dim=self.dim,
        )

    def _decoded(self) -> Array:
        plain = isinstance(self.kept, jax.Array)
        kept = self.kept.astype(jnp.float32) if plain else self.kept.decode()
        # A comparison with every channel: a scatter would be a loop over single numbers.
        at = self.channels[..., None].astype(jnp.int32) == jnp.arange(self.dim).reshape(
            (1,) * self.channels.ndim + (-1,)
        )
        return jnp.sum(jnp.where(at, kept[..., None], 0.0), axis=-2)


@dataclasses.dataclass(frozen=True)
class Sparse:
    """The largest `keep` share of each token's channels, with their numbers; the rest is zero.

    Attributes:
        keep: share of the channels.
        inner: a codec per token for what is kept, in the model's dtype where None.
    """

    keep: Any = 0.25  # float
    inner: Affine | None = None
    unit: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Refuse what there is no form for."""
        number = isinstance(self.keep, int | float) and not isinstance(self.keep, bool)
        if not number or not 0 < self.keep <= 1:
            raise ValueError(f"got keep={self.keep!r}; expected a share above 0 and at most 1")
        if self.inner is not None and self.inner.unit != 1:
            raise ValueError(f"got inner={self.inner!r}; expected a codec per token")

    def empty(self, batch: int, heads: int, slots: int, dim: int, dtype: Any) -> Sparsed:
        """Zeros."""
        count = max(1, round(self.keep * dim))
        kept = (
            jnp.zeros((batch, heads, slots, count), dtype)
            if self.inner is None
            else self.inner.empty(batch, heads, slots, count, dtype)
        )
        number = jnp.uint8 if dim <= 256 else jnp.uint16
        return Sparsed(kept=kept, channels=jnp.zeros((batch, heads, slots, count), number), dim=dim)
