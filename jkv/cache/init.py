"""Make an empty cache for a model."""

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
