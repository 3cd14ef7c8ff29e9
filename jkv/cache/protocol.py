"""What every kind of cache is: the protocol of one layer's keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv._pytree import pytree
from jkv.ops.masks import AttentionSpec


@pytree
class Step:
    """What all layers share in one forward pass: where the new tokens are.

    The tokens of a row are contiguous and come first: token t of row b has position
    ``start[b] + t`` while that is below ``stop[b]``, and -1 (padding) from there on.
    """

    positions: Array  # [B, T] int32
    start: Array  # [B] int32, tokens in the row before this pass
    stop: Array  # [B] int32, and after it
    pages: tuple[Any, ...] = ()  # a `pages.Plan` for each group of layers of pages

    @classmethod
    def after(cls, start: Int[Array, " B"], counts: Int[Array, " B"], new: int) -> Step:
        """The step in which `counts[b]` of `new` tokens follow the `start[b]` of each row."""
        offsets = jnp.arange(new, dtype=jnp.int32)[None, :]
        positions = jnp.where(offsets < counts[:, None], start[:, None] + offsets, -1)
        return cls(positions=positions, start=start, stop=start + counts)


@runtime_checkable
class LayerCache(Protocol):
    """One layer's keys and values: a frozen pytree that knows how to attend to itself.

    One method rather than "append" and "read": the order of the two is the cache's own affair
    (a ring given a chunk longer than itself must read first), and what a cache stores never has
    to be written out in full for somebody else to read.

    A kind that lets go of tokens says in `keeps` how many it has of a row, however long: what is
    planned before anything is allocated depends on it.
    """

    @property
    def capacity(self) -> int | None:
        """Tokens that a row can hold, None when it never runs full."""
        ...

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        step: Step,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "B T N H"], LayerCache]:
        """Attention of the new tokens over the old and themselves, and the cache with both.

        Tokens at position -1 are padding: nothing of them is stored, what they get is undefined.
        """
        ...

    def put(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], step: Step) -> LayerCache:
        """The cache with the new tokens, nobody having looked at it: what `attend` leaves behind.

        Only a kind that keeps tokens by the attention they get leaves something else.
        """
        ...

    def take(self, rows: Int[Array, " R"]) -> LayerCache:
        """The cache whose row r is this one's row ``rows[r]``."""
        ...

    def resize(self, slots: int) -> LayerCache:
        """The same tokens in a buffer of another length."""
        ...

    def crop(self, held: Int[Array, " B"], lengths: Int[Array, " B"]) -> LayerCache:
        """The cache rolled back from `held[b]` tokens to the first `lengths[b]` of them.

        Raises:
            UnsupportedError: what is needed has been overwritten.
        """
        ...

    def concat(self, others: Sequence[LayerCache]) -> LayerCache:
        """The rows of this cache followed by those of others of the same kind and length."""
        ...

    def to_legacy(
        self, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Keys and values of each row's `lengths[b]` tokens in order, one slot per position.

        Raises:
            UnsupportedError: a token's have not been kept.
        """
        ...


@runtime_checkable
class Kind(Protocol):
    """How a layer's tokens are kept, described before there is a shape: a small frozen value.

    A kind that depends on the model or on the layer has a method ``bind(config, layer)`` too, which
    returns the kind for that layer and raises `UnsupportedError` for a model that it cannot serve.
    One that grows with its rows says ``grows = True``. One that lets go of what no token looks back
    at says ``unbounded = True``, and has a method ``reach(new)``, as its layers do: the positions
    that a token may look back at in a pass of `new` tokens, itself included; None where that grows
    with the row. A model may run past its context where no layer reaches further than that.
    """

    def init(self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any) -> LayerCache:
        """An empty layer cache."""
        ...


def as_kind(kind: Any) -> Any:
    """Return the kind that a text names, such as "int4" or "window:252,sinks=4"; others as given.

    Raises:
        ValueError: a text that names no kind, or arguments that it does not take.
    """
    if not isinstance(kind, str):
        return kind
    from jkv.cache import spec  # its table holds every kind, and these read kinds within kinds

    return spec.parse(kind)


def bound(kind: Any, config: Any, layer: int) -> Any:
    """The kind that keeps the tokens of one layer of a model."""
    return kind.bind(config, layer) if hasattr(kind, "bind") else kind


def furthest(parts: Iterable[Any], new: int) -> int | None:
    """How far a token may look back in any of these kinds or layers, None where without limit.

    Args:
        parts: kinds, each bound to its layer, or layers of a cache.
        new: tokens of a pass.
    """
    most = 0
    for part in parts:
        reach = part.reach(new) if getattr(part, "unbounded", False) else None
        if reach is None:
            return None
        most = max(most, reach)
    return most


@runtime_checkable
class Shape(Protocol):
    """What a cache must know of a model's configuration."""

    @property
    def layers(self) -> int: ...  # noqa: D102
    @property
    def kv_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102


# The model without its cache: tokens [B, T], their step and the layers' caches in; the hidden
# states [B, T, D] and the next caches out.
Stack = Callable[[Array, Step, tuple[Any, ...]], tuple[Array, tuple[Any, ...]]]


def check_heads(held: Any, new: Array) -> None:
    """Refuse keys ``[B, T, K, H]`` for a buffer ``[B, K, S, H]`` of other heads.

    Raises:
        ValueError: another number of heads, or of dimensions.
    """
    heads, dim = held.shape[1], held.shape[3]
    if (heads, dim) != new.shape[2:]:
        raise ValueError(
            f"the cache holds {heads} heads of {dim} dimensions, and the model makes "
            f"{new.shape[2]} of {new.shape[3]}; expected a cache made from this model's "
            "configuration"
        )
