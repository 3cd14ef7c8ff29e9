"""Make an empty cache for a model."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from jkv._checks import check_integer
from jkv._text import brief
from jkv._transfer import transfers
from jkv.cache.base import Cache
from jkv.cache.dense import dense
from jkv.cache.protocol import CacheKind, LayerCache, Shape, as_kind, is_kind, own_kind_hint


@transfers
def init_cache(
    config: Shape,
    kind: CacheKind | str | None = None,
    *,
    batch: int,
    slots: int,
    dtype: DTypeLike | None = None,
) -> Cache:
    """Make an empty cache for a model.

    Args:
        config: the model's configuration (`layers`, `kv_heads`, `head_dim`, `dtype`).
        kind: how tokens are kept: `jkv.dense()` by default, `jkv.none()`, or a text ("int4").
        batch: rows.
        slots: tokens that each row has room for.
        dtype: of the keys and values, the model's by default.

    Raises:
        TypeError: something that is no configuration, kind or dtype.
        ValueError: a batch or number of slots below 1, a dtype that holds no fractions, or a text
            that names no kind.

    Example:
        >>> cache = jkv.init_cache(lm.config, "window:32,sinks=4", batch=2, slots=64)
        >>> cache.batch, len(cache.layers) == lm.config.layers
        (2, True)
    """
    checked = dense() if kind is None else as_kind(kind)
    batch = check_integer("batch", batch, 1, of="init_cache")
    slots = check_integer("slots", slots, 1, of="init_cache")
    if not isinstance(config, Shape):
        hint = "; pass its .config" if hasattr(config, "config") else ""
        raise TypeError(
            f"init_cache got a {type(config).__name__}; expected a configuration with layers, "
            f"kv_heads and head_dim{hint}"
        )
    if not is_kind(checked):
        raise TypeError(
            f"init_cache got kind={brief(checked)}; expected a kind such as jkv.dense(), or a text "
            f"such as 'int4'{own_kind_hint(checked)}"
        )
    try:
        dtype = jnp.dtype(getattr(config, "dtype", jnp.float32) if dtype is None else dtype)
    except TypeError:
        raise TypeError(
            f"init_cache got dtype={brief(dtype)}; expected one such as float32"
        ) from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"init_cache got dtype={dtype}; expected a floating one, such as float32 or bfloat16"
        )
    layers = [
        checked.bind(config, i).init(batch, slots, config.kv_heads, config.head_dim, dtype)
        for i in range(config.layers)
    ]
    for i, layer in enumerate(layers):
        if not isinstance(layer, LayerCache):
            raise TypeError(
                f"{brief(checked)} made a {type(layer).__name__} for layer {i}; expected a "
                "jkv.cache.LayerCache"
            )
    return Cache.empty(layers, batch, slots)


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What a cache must know of a model that has no configuration of jkv's."""

    layers: int
    kv_heads: int
    head_dim: int


def attention_cache(
    kind: CacheKind | str | None = None,
    *,
    batch: int,
    slots: int,
    layers: int,
    kv_heads: int,
    head_dim: int,
    dtype: DTypeLike = jnp.float32,
) -> Cache:
    """Make an empty cache for a model of your own, of any library.

    Such a model is a function ``logits, cache = model(tokens, cache, counts)``, see
    `jkv.decoding.CachedModel`, which `jkv.prefill`, `jkv.decode_step` and `jkv.rollout` run.

    Args:
        kind: how tokens are kept: `jkv.dense()` by default, `jkv.none()`, or a text ("int4").
        batch: rows.
        slots: tokens that each row has room for.
        layers: with attention, L.
        kv_heads: heads of keys and values, K; fewer than those of queries if these share them.
        head_dim: of a head, H.
        dtype: of the keys and values.

    Raises:
        TypeError: something that is no kind or dtype.
        ValueError: numbers below 1, a dtype that holds no fractions, or a text that names no kind.
        UnsupportedError: a kind that depends on more of a model, such as its rotary positions.

    Example:
        >>> table, spec = jnp.eye(11, 8), jkv.ops.AttentionSpec(8**-0.5)
        >>> def model(tokens, cache, counts):  # one layer, one head, no weights but the embedding
        ...     run = cache.begin(tokens, counts)
        ...     x, layers = table[run.tokens], []  # [B, T, H]
        ...     for layer in run.layers:
        ...         q = k = v = x[:, :, None]  # [B, T, N, H] and twice [B, T, K, H]
        ...         out, layer = layer.attend(q, k, v, run.step, spec)
        ...         x = x + out[:, :, 0]
        ...         layers.append(layer)
        ...     x, cache = run.end(x, layers)
        ...     return x @ table.T, cache
        >>> cache = jkv.attention_cache(batch=1, slots=8, layers=1, kv_heads=1, head_dim=8)
        >>> logits, cache = jkv.prefill(model, jnp.array([[5, 6, 7]]), cache)
        >>> jkv.rollout(model, logits, cache, steps=2).check().tokens.shape
        (1, 2)
    """
    sizes = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
    checked = {n: check_integer(n, size, 1, of="attention_cache") for n, size in sizes.items()}
    return init_cache(AttentionShape(**checked), kind, batch=batch, slots=slots, dtype=dtype)
