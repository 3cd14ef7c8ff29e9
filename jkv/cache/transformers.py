"""Caches of transformers and of jkv: one from the other, to the bit.

Neither torch nor transformers is imported before a cache of theirs is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, TypeAlias

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer

from jkv._axes import Array
from jkv._checks import check_integer
from jkv._text import brief, plural
from jkv._transfer import transfers
from jkv.cache.base import Cache, on_device
from jkv.cache.dense import Dense
from jkv.cache.protocol import LayerCache
from jkv.cache.ring import Ring
from jkv.cache.window import Window
from jkv.errors import UnsupportedError

if TYPE_CHECKING:
    from jkv.cache.shared_state import SharedState

DynamicCache: TypeAlias = Any  # of transformers, which has to be installed for no type checker
Tensor: TypeAlias = Any  # of torch
Mask: TypeAlias = Any  # a tensor of torch, or an array of numpy or JAX


@transfers
def from_transformers(
    past_key_values: DynamicCache, attention_mask: Mask | None = None, *, slots: int | None = None
) -> Cache:
    """Make a cache of a `transformers.DynamicCache`, for the same model in jkv.

    Layers that keep all tokens become dense ones. A layer with a sliding window becomes a window of
    that size, as `jkv.window()` makes it; of it transformers has kept what the next token sees, so
    that it cannot be rolled back to earlier ones. Numbers keep their bits, bfloat16 too.

    Args:
        past_key_values: what a model of transformers returned.
        attention_mask: ``[B, S]``, 0 for padding, at the beginning or at the end of rows; none by
            default. Positions are those of `transformers.generate`: each row's first token that is
            no padding is at 0. Who calls a model with padding at the beginning passes its
            ``position_ids``, or the keys have been rotated elsewhere.
        slots: tokens that each row has room for, as many as the longest row has by default, which
            is then full.

    Raises:
        ImportError: torch or transformers is not installed.
        TypeError: no DynamicCache.
        ValueError: an empty one, or a mask of another shape or with holes.
        UnsupportedError: layers that keep other things than keys and values, or of which a row
            has lost tokens that it would see.

    Example:
        >>> out = model(ids, use_cache=True)  # doctest: +SKIP
        >>> cache = jkv.from_transformers(out.past_key_values, slots=256)  # doctest: +SKIP
        >>> logits = jnp.asarray(out.logits[:, -1].numpy())  # doctest: +SKIP
        >>> jkv.rollout(lm.model, logits, cache, steps=32).tokens  # doctest: +SKIP
    """
    theirs = _import("transformers.cache_utils")
    if not isinstance(past_key_values, theirs.DynamicCache):
        raise TypeError(
            f"from_transformers got {brief(past_key_values)}; expected a transformers.DynamicCache"
        )
    for i, layer in enumerate(past_key_values.layers):
        if type(layer) not in (theirs.DynamicLayer, theirs.DynamicSlidingWindowLayer):
            raise UnsupportedError(
                f"from_transformers got a {type(layer).__name__} as layer {i}; expected layers of "
                "keys and values alone, DynamicLayer or DynamicSlidingWindowLayer"
            )
    columns = past_key_values.get_seq_length()
    if not columns or any(layer.keys is None for layer in past_key_values.layers):
        raise ValueError("from_transformers got an empty cache; expected one of at least one token")
    batch = past_key_values.layers[0].keys.shape[0]
    first, lengths = _read_mask(attention_mask, batch, columns)
    layers: list[LayerCache] = []
    for i, layer in enumerate(past_key_values.layers):
        keys, values = _to_numpy(layer.keys), _to_numpy(layer.values)
        if type(layer) is theirs.DynamicLayer:
            at = first[:, None] + np.arange(int(lengths.max()))
            layers.append(Dense(keys=_gather(keys, at, 0.0), values=_gather(values, at, 0.0)))
        else:
            window = int(layer.sliding_window)
            at = _ring_columns(i, window, first, lengths, columns - keys.shape[2])
            ring = Ring(keys=_gather(keys, at, np.nan), values=_gather(values, at, 0.0))
            layers.append(Window(ring=ring, sinks=None))
    cache = Cache(
        layers=tuple(layers),
        lengths=jnp.asarray(lengths, jnp.int32),
        overflowed=jnp.zeros((batch,), bool),
    )
    if slots is None:
        return cache
    return cache.resize(check_integer("slots", slots, 1, of="from_transformers"))


@transfers
def to_transformers(cache: Cache) -> tuple[DynamicCache, Tensor]:
    """Make a `transformers.DynamicCache` of a cache, and its attention mask.

    For the same model in transformers. Windows become layers with a sliding window, all other kinds
    layers of all tokens: what is rounded as its rounded numbers. Rows end together: shorter ones
    are padded at the beginning.

    Args:
        cache: of any kind that has kept all tokens, or all that its window sees.

    Returns:
        The cache, and the mask ``[B, S]`` of torch, 0 for padding.

    Raises:
        ImportError: torch or transformers is not installed.
        TypeError: the cache is being traced.
        ValueError: an empty cache.
        UnsupportedError: tokens that have not been kept, or a window with sinks.

    Example:
        >>> past, mask = jkv.to_transformers(cache)  # doctest: +SKIP
        >>> more = torch.ones_like(mask[:, :1])  # doctest: +SKIP
        >>> model(  # doctest: +SKIP
        ...     token,
        ...     past_key_values=past,
        ...     attention_mask=torch.cat([mask, more], 1),
        ...     position_ids=mask.sum(1, keepdim=True),
        ... )
    """
    cache = on_device(cache)
    torch, theirs = _import("torch"), _import("transformers.cache_utils")
    if isinstance(cache.lengths, Tracer):
        raise TypeError("to_transformers is traced by jit, vmap or grad; call it on the host")
    lengths = np.asarray(cache.lengths)
    columns = int(lengths.max(initial=0))
    if not columns:
        raise ValueError("to_transformers got an empty cache; expected one of at least one token")
    first = columns - lengths  # rows end together
    past = theirs.DynamicCache()
    past.layers = [_layer(layer, cache.shared, lengths, torch, theirs) for layer in cache.layers]
    past.layer_class_to_replicate = None
    mask = np.arange(columns)[None] >= first[:, None]
    return past, torch.from_numpy(mask.astype(np.int64))


def _layer(
    layer: LayerCache,
    shared: tuple[SharedState, ...],
    lengths: np.ndarray,
    torch: Any,
    theirs: Any,
) -> Any:
    """Return a layer of transformers, in which rows end together."""
    columns = int(lengths.max())
    first = columns - lengths
    if isinstance(layer, Window):
        if layer.sinks is not None:
            raise UnsupportedError(
                "to_transformers got a window with sinks, which no layer of transformers keeps"
            )
        size = layer.ring.size
        kept = min(columns, size - 1)  # what the next token sees beside itself
        positions = np.arange(columns - kept, columns)[None] - first[:, None]
        pair = (layer.ring.keys, layer.ring.values)
        at = np.where(positions < 0, -1, positions % size)
        made = theirs.DynamicSlidingWindowLayer(sliding_window=size)
    else:
        pair = layer.to_legacy_shared(jnp.asarray(lengths), shared)
        at = np.arange(columns)[None] - first[:, None]
        made = theirs.DynamicLayer()
    made.update(*(_to_torch(_gather_host(np.asarray(x), at, 0.0), torch) for x in pair))
    if isinstance(layer, Window):
        made.cumulative_length = columns
    return made


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"caches of transformers need {name.partition('.')[0]}, which is not installed: "
            "pip install torch transformers"
        ) from error


def _read_mask(mask: Mask | None, batch: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's first column that is no padding, and how many follow, ``[B]``.

    Raises:
        ValueError: a mask of another shape, or of rows whose tokens are not contiguous.
    """
    if mask is None:
        return np.zeros(batch, np.int64), np.full(batch, columns)
    real = np.asarray(mask) != 0
    if real.shape != (batch, columns):
        raise ValueError(
            f"from_transformers got a mask of shape {list(real.shape)}; expected "
            f"[{batch}, {columns}], the rows and tokens of the cache"
        )
    first, lengths = real.argmax(axis=1), real.sum(axis=1)
    place = np.arange(columns)[None]
    whole = (place >= first[:, None]) & (place < (first + lengths)[:, None])
    if not lengths.all() or (whole != real).any():
        rows = np.flatnonzero((whole != real).any(axis=1) | (lengths == 0)).tolist()
        raise ValueError(
            f"from_transformers got a mask in which rows {brief(rows)} have holes or no token; "
            "expected padding at the beginning or at the end of rows"
        )
    return first, lengths


def _ring_columns(
    layer: int, size: int, first: np.ndarray, lengths: np.ndarray, lost: int
) -> np.ndarray:
    """Return the column of each slot of a ring, ``[B, W]``; below 0 where none is kept.

    Args:
        layer: its number, for messages.
        size: W.
        first: column of each row's token at 0, ``[B]``.
        lengths: tokens of each row, ``[B]``.
        lost: columns that the layer has let go of.

    Raises:
        UnsupportedError: a row would see tokens that are lost.
    """
    last = lengths[:, None] - 1
    positions = last - (last - np.arange(size)[None]) % size
    columns = np.where(positions < 0, -1, first[:, None] + positions - lost)
    seen = (positions >= 0) & (positions > last + 1 - size)  # by the next token
    if (seen & (columns < 0)).any():
        rows = np.flatnonzero((seen & (columns < 0)).any(axis=1)).tolist()
        raise UnsupportedError(
            f"from_transformers: layer {layer} keeps the last {plural(size - 1, 'token')} of all "
            f"rows together, and padding has taken the place of tokens that rows {rows} would see; "
            "pad at the beginning, or make the cache without config=: DynamicCache()"
        )
    return columns


def _gather(x: np.ndarray, at: np.ndarray, missing: float) -> Array:
    return jnp.array(_gather_host(x, at, missing))


def _gather_host(x: np.ndarray, at: np.ndarray, missing: float) -> np.ndarray:
    """Take slots `at` ``[B, S]`` of each row of ``[B, K, slots, H]``, `missing` where none is.

    A key that a ring should hold and that is lost is NaN: nothing sees it as long as the row goes
    on, and what looks at it after all shows it. (Its value is 0: a NaN would be multiplied by 0.)
    """
    inside = (at >= 0) & (at < x.shape[2])
    taken = np.take_along_axis(x, np.where(inside, at, 0)[:, None, :, None], axis=2)
    return np.where(inside[:, None, :, None], taken, np.asarray(missing, x.dtype))


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor on the host; bfloat16, which numpy lacks, by its bits."""
    torch = _import("torch")
    held = tensor.detach().cpu().contiguous()
    if held.dtype == torch.bfloat16:
        return held.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return held.numpy()


def _to_torch(array: np.ndarray, torch: Any) -> Tensor:
    """Return a tensor of its own on the host; bfloat16, which `from_numpy` lacks, by its bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
