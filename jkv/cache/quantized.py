"""Kinds that round what they keep: recent tokens exact, older ones in a codec's form."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from jkv._checks import check_integer
from jkv._text import brief
from jkv.cache.form import COUNT, KIND, REAL, Form, number, one_of
from jkv.cache.protocol import CacheKind, as_kind
from jkv.cache.quantized_layer import SLACK, QuantizedCache, far_slots
from jkv.cache.ring import Ring
from jkv.ops.codecs import Affine, Codec, Float8, Sparse

KeyAxis = Literal["channel", "token"]


@dataclasses.dataclass(frozen=True)
class QuantizedKind(CacheKind):
    """See `near_far`, `quantized`, `fp8` and `sparse`: how old keys and values are stored."""

    keys: Codec
    values: Codec
    recent: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        blocks = sorted((self.keys.block_size, self.values.block_size))
        if blocks[1] % blocks[0]:
            raise ValueError(
                f"keys are encoded {self.keys.block_size} tokens at a time and values "
                f"{self.values.block_size}; expected one to divide the other"
            )

    def init(
        self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> QuantizedCache:
        """Make an empty layer."""
        block = max(self.keys.block_size, self.values.block_size)
        room = far_slots(slots, self.recent, block)
        near = None
        if self.recent or block > 1:
            near = Ring.empty(batch, self.recent + block + SLACK, kv_heads, head_dim, dtype)
        return QuantizedCache(
            keys=self.keys.empty(batch, kv_heads, room, head_dim, dtype),
            values=self.values.empty(batch, kv_heads, room, head_dim, dtype),
            near=near,
            nonfinite=jnp.zeros((batch,), bool),
            recent=self.recent,
            slots=slots,
            dtype=jnp.dtype(dtype).name,
        )


def quantized(
    bits: int = 8,
    *,
    residual: int | None = None,
    group: int | None = None,
    key_axis: KeyAxis | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
) -> QuantizedKind:
    """Quantize keys and values to 8, 4 or 2 bits, with a scale and zero point per group.

    At 4 and 2 bits keys are grouped per channel over `group` tokens, since some channels of keys
    are many times as large as others, and values per token (KIVI, Liu et al. 2024,
    arXiv:2402.02750). A token is rounded once; only a roll-back by more than 16 tokens has fewer
    than a group of them rounded a second time.

    Keys with large biases in a few channels (Qwen2.5) want ``key_axis="channel"`` at 8 bits too.

    Args:
        bits: 8, 4 or 2.
        residual: newest tokens that stay exact: 0 at 8 bits and 128 below by default. There is
            room for them, a group and 16 more however short the text: with 208 exact tokens, a
            cache of fewer than some 230 is no smaller than a dense one.
        group: numbers that share a step: channels of a token, or tokens of a channel. The whole
            token at 8 bits and 64 below by default.
        key_axis: "channel" or "token"; "token" at 8 bits and "channel" below by default.
        key_bits: of keys, where they differ from those of values.
        value_bits: of values.

    Raises:
        ValueError: numbers of bits, groups or axes that there are no codecs for.

    Example:
        >>> full = jkv.init_cache(lm.config, batch=1, slots=512)
        >>> small = jkv.init_cache(lm.config, jkv.quantized(bits=8), batch=1, slots=512)
        >>> round(small.nbytes / full.nbytes, 2)
        0.27
    """
    keys = _affine(bits if key_bits is None else key_bits, key_axis, group)
    values = _affine(bits if value_bits is None else value_bits, "token", group)
    if residual is None:
        residual = 128 if min(keys.bits, values.bits) < 8 else 0
    residual = check_integer("residual", residual, 0, of="quantized")
    return QuantizedKind(keys=keys, values=values, recent=residual)


def _affine(bits: int, axis: KeyAxis | None, group: int | None) -> Affine:
    axis = ("token" if bits == 8 else "channel") if axis is None else axis
    # A group of one token may be all of it; one of tokens must fit into a block of attention.
    whole = None if axis == "token" and bits == 8 else 64
    return Affine(bits=bits, axis=axis, group=whole if group is None else group)


def fp8(*, residual: int = 0) -> QuantizedKind:
    """Round keys and values to 8-bit floats with a scale per token (e4m3, arXiv:2209.05433).

    Args:
        residual: newest tokens that stay exact, none by default.

    Raises:
        ValueError: a negative residual.

    Example:
        >>> jkv.init_cache(lm.config, jkv.fp8(), batch=1, slots=64).layers[0].rounds
        True
    """
    residual = check_integer("residual", residual, 0, of="fp8")
    return QuantizedKind(keys=Float8(), values=Float8(), recent=residual)


def near_far(*, recent: int = 128, far: CacheKind | Codec | str) -> QuantizedKind:
    """Keep the newest tokens exact and older ones in any codec: two partials, merged.

    Args:
        recent: newest tokens that stay exact.
        far: a kind that rounds, such as `jkv.quantized(bits=4)` or its text "int4", or a codec of
            `jkv.ops.codecs` for keys and values alike.

    Raises:
        TypeError: `far` is neither.
        ValueError: a negative `recent`.

    Example:
        >>> jkv.near_far(recent=64, far="int8") == jkv.quantized(bits=8, residual=64)
        True
    """
    recent = check_integer("recent", recent, 0, of="near_far")
    codec = as_kind(far)
    if isinstance(codec, QuantizedKind):
        return dataclasses.replace(codec, recent=recent)
    if isinstance(codec, type) or not isinstance(codec, Codec):
        raise TypeError(
            f"near_far got far={brief(codec)}; expected a kind that rounds, such as "
            "jkv.quantized(bits=4), or a codec"
        )
    return QuantizedKind(keys=codec, values=codec, recent=recent)


def sparse(keep: float = 0.25, *, bits: int | None = None, residual: int = 0) -> QuantizedKind:
    """Keep the largest `keep` share of each token's channels, with their indices.

    Args:
        keep: share of the channels, above 0 and at most 1.
        bits: 8, 4 or 2, to round what is kept as well; in the model's dtype by default.
        residual: newest tokens that stay whole, none by default.

    Raises:
        ValueError: a share or number of bits out of range.

    Example:
        >>> jkv.sparse(0.25, bits=8) == jkv.parse("sparse:0.25,int8")
        True
    """
    residual = check_integer("residual", residual, 0, of="sparse")
    codec = Sparse(keep=keep, inner=None if bits is None else _affine(bits, "token", None))
    return QuantizedKind(keys=codec, values=codec, recent=residual)


_BITS = number("kNvN", r"k\dv\d", lambda text: (int(text[1]), int(text[3])))
_ROUNDED = {
    "residual": COUNT,
    "group": COUNT,
    "key_axis": one_of(channel="channel", token="token"),
}


def _keys_and_values(bits: tuple[int, int], **more: Any) -> CacheKind:
    return quantized(key_bits=bits[0], value_bits=bits[1], **more)


def _rounded(bits: int, says: str) -> Form:
    return Form(functools.partial(quantized, bits), says, arguments=_ROUNDED)


FORMS = {
    "int8": _rounded(8, "all tokens in 8 bits, a step and a zero point for each"),
    "int4": _rounded(4, "4 bits, keys by channel and values by token; the newest 128 stay exact"),
    "int2": _rounded(2, "2 bits, keys by channel and values by token; the newest 128 stay exact"),
    "kv": Form(
        _keys_and_values,
        "keys and values in different numbers of bits",
        examples=(":k8v4",),
        arguments={"bits": _BITS, **_ROUNDED},
        bare=1,
        needed=1,
    ),
    "fp8": Form(fp8, "all tokens as 8-bit floats, a scale for each", arguments={"residual": COUNT}),
    "near_far": Form(
        near_far,
        "the newest tokens exact, those before them rounded as in another kind",
        examples=(":recent=1024,far=int4",),
        arguments={"far": KIND, "recent": COUNT},
        needed=1,
    ),
    "sparse": Form(
        sparse,
        "the largest channels of each token, as a share of all; rounded too, if wanted",
        examples=(":0.25", ":0.25,int8"),
        arguments={"keep": REAL, "bits": one_of(int8=8, int4=4), "residual": COUNT},
        bare=2,
    ),
}
