"""What every kind of cache is: the protocol of one layer's keys and values."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jkv._axes import Array
from jkv._pytree import pytree
from jkv.errors import UnsupportedError
from jkv.ops.masks import AttentionSpec

if TYPE_CHECKING:
    from typing import Self

    from jkv.cache.shared_state import SharedState
else:
    Self = Any  # beartype, which watches the tests, has none inside of jaxtyping's decorators
    SharedState = Any  # its module imports this one

L = TypeVar("L", bound="LayerCache")


@pytree
class Step:
    """What all layers share in one forward pass: where the new tokens are.

    The tokens of a row are contiguous and come first: token t of row b has position
    ``start[b] + t`` while that is below ``stop[b]``, and -1 (padding) from there on.

    Example:
        >>> step = jkv.Step.after(jnp.array([4, 0]), jnp.array([1, 2]), new=2)
        >>> step.positions.tolist(), step.stop.tolist()
        ([[4, -1], [0, 1]], [5, 2])
    """

    positions: Array  # [B, T] int32
    start: Array  # [B] int32, tokens in the row before this pass
    stop: Array  # [B] int32, and after it
    pages: tuple[Any, ...] = ()  # `PageWrites` of each group of layers of pages

    @classmethod
    def after(cls, start: Int[Array, " B"], counts: Int[Array, " B"], new: int) -> Step:
        """Return the step in which `counts[b]` of `new` tokens follow the `start[b]` of a row."""
        offsets = jnp.arange(new, dtype=jnp.int32)[None, :]
        positions = jnp.where(offsets < counts[:, None], start[:, None] + offsets, -1)
        return cls(positions=positions, start=start, stop=start + counts)


class LayerCache(abc.ABC):
    """One layer's keys and values: a frozen pytree, with the attention over them.

    Decorate a subclass with `jkv.cache.pytree`. What has a default here is optional: what it says
    is true of a cache that keeps every token in slots of its own.

    Example:
        >>> layer = jkv.dense().init(batch=1, slots=8, kv_heads=2, head_dim=4, dtype="float32")
        >>> step = jkv.Step.after(jnp.array([0]), jnp.array([2]), new=2)
        >>> new = jnp.ones((1, 2, 2, 4))  # [B, T, K, H]
        >>> out, layer = layer.attend(new, new, new, step, jkv.ops.AttentionSpec(scale=0.5))
        >>> out.shape, layer.take(jnp.array([0, 0])).keys.shape
        ((1, 2, 2, 4), (2, 2, 8, 4))
    """

    @property
    @abc.abstractmethod
    def capacity(self) -> int | None:
        """Tokens that a row can hold, None when it never runs full."""

    @abc.abstractmethod
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        step: Step,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "B T N H"], Self]:
        """Attend from the new tokens to the old and to themselves, and append the new ones.

        One method rather than "append" and "read": the order of the two is the cache's own affair
        (a ring given a chunk longer than itself must read first), and codes never have to be
        decoded in full for a caller.

        Tokens at position -1 are padding: nothing of them is stored, what they get is undefined.
        """

    @abc.abstractmethod
    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], step: Step) -> Self:
        """Append the new tokens without attending: what `attend` leaves behind.

        Only a kind that keeps tokens by the attention they get leaves something else.
        """

    @abc.abstractmethod
    def take(self, rows: Int[Array, " R"]) -> Self:
        """Return the cache whose row r is this one's row ``rows[r]``."""

    @abc.abstractmethod
    def resize(self, slots: int) -> Self:
        """Return the same tokens in a buffer of another length."""

    @abc.abstractmethod
    def crop(self, held: Int[Array, " B"], lengths: Int[Array, " B"]) -> Self:
        """Roll back from `held[b]` tokens to the first `lengths[b]` of them.

        Raises:
            UnsupportedError: what is needed has been overwritten.
        """

    @abc.abstractmethod
    def concat(self, others: Sequence[Self]) -> Self:
        """Concatenate along the batch axis, with others of the same kind and length."""

    @abc.abstractmethod
    def to_legacy(
        self, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Return keys and values of each row's `lengths[b]` tokens, one slot per position.

        Raises:
            UnsupportedError: a token's have not been kept.
        """

    def partition_spec(self, axis: str) -> Self:
        """Return the axis of each leaf that holds key/value heads, for `jkv.shard`.

        Args:
            axis: of the mesh, over which heads are sharded.

        Returns:
            This pytree with a `jax.sharding.PartitionSpec` for each leaf: ``PartitionSpec(None,
            axis)`` for keys ``[B, K, S, H]``, ``PartitionSpec()`` for what is of all heads, such
            as flags ``[B]``, which any of the devices may raise.

        Raises:
            UnsupportedError: the kind does not say, or cannot be sharded.
        """
        raise UnsupportedError(
            f"{type(self).__name__} does not say which axes of its arrays hold key/value heads; "
            "expected a method partition_spec(axis), see jkv.cache.LayerCache, or a model that is "
            "not sharded"
        )

    @property
    def shares(self) -> type[SharedState] | None:
        """The class of what it shares with other layers, None where it shares nothing."""
        return None

    def to_legacy_shared(
        self, lengths: Int[Array, " B"], shared: tuple[SharedState, ...]
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Return what `to_legacy` does, of a layer that `shares` what it needs for that.

        Raises:
            UnsupportedError: a token's have not been kept.
        """
        del shared
        return self.to_legacy(lengths)

    @property
    def grows(self) -> bool:
        """Whether a loop gives it slots as it goes, and not all at the start."""
        return False

    @property
    def retained(self) -> int | None:
        """Most tokens that are kept of a row, however long; None: a share of them, or all."""
        return None

    def reach(self, new: int) -> int | None:
        """Return how far back a token sees in a pass of `new` tokens, itself included.

        A model may run past its context where no layer reaches further than that.

        Returns:
            Positions; None where it grows with the row.
        """
        del new
        return None

    @property
    def weighs_tokens(self) -> bool:
        """Whether it needs the weights of all tokens at once, to choose which it keeps."""
        return False

    @property
    def rounds(self) -> bool:
        """Whether it stores codes, which `requantise` makes anew."""
        return False

    def requantise(self, to: CacheKind, lengths: Int[Array, " B"]) -> Self:
        """Return the same tokens in another kind that rounds.

        Raises:
            UnsupportedError: it does not round.
        """
        del to, lengths
        raise UnsupportedError(f"{type(self).__name__} rounds nothing; use cache.convert")

    def invalid_rows(self, shared: tuple[SharedState, ...]) -> Bool[Array, " B"] | None:
        """Return the rows that hold what cannot be stored, NaN among codes; None: never any.

        Args:
            shared: what the layers of the cache share.
        """
        del shared
        return None

    def portable(self) -> Self:
        """Return it in the form that all platforms and meshes have."""
        return self


Layers = tuple[LayerCache, ...]


class CacheKind(abc.ABC):
    """How a layer's tokens are kept, before any shape is known: a small frozen value.

    Example:
        >>> import dataclasses
        >>> @dataclasses.dataclass(frozen=True)
        ... class HalfKind(jkv.CacheKind):
        ...     def init(self, batch, slots, kv_heads, head_dim, dtype):
        ...         return jkv.dense().init(batch, slots, kv_heads, head_dim, jnp.bfloat16)
        >>> jkv.init_cache(lm.config, HalfKind(), batch=1, slots=8).layers[0].keys.dtype
        dtype(bfloat16)
    """

    @abc.abstractmethod
    def init(
        self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> LayerCache:
        """Make an empty layer cache."""

    def bind(self, config: Shape, layer: int) -> CacheKind:
        """Return the kind for one layer of a model.

        Raises:
            UnsupportedError: a model that it cannot serve.
        """
        del config, layer
        return self

    @property
    def grows(self) -> bool:
        """Whether a loop gives it slots as it goes, and not all at the start."""
        return False

    @property
    def recomputes(self) -> bool:
        """Whether it keeps tokens alone, and each pass runs over all of them."""
        return False

    @property
    def managed(self) -> bool:
        """Whether the caller supplies block tables before any token can be appended."""
        return False

    def reach(self, new: int) -> int | None:
        """Return how far back a token sees, see `LayerCache.reach`."""
        del new
        return None


def shard_heads(layer: L, axis: str, whole: tuple[str, ...] = ()) -> L:
    """Return a `partition_spec` of leaves whose second axis holds heads.

    Args:
        layer: a layer cache.
        axis: of the mesh.
        whole: fields of the layer that belong to all heads.

    Example:
        >>> layer = jkv.dense().init(batch=1, slots=8, kv_heads=2, head_dim=4, dtype="float32")
        >>> tuple(jkv.cache.shard_heads(layer, "heads").keys)  # a `jax.sharding.PartitionSpec`
        (None, 'heads')
    """

    def spec(path: tuple[Any, ...], leaf: Array) -> PartitionSpec:
        del leaf
        return PartitionSpec() if path[0].name in whole else PartitionSpec(None, axis)

    return jax.tree_util.tree_map_with_path(spec, layer)


def is_kind(kind: object) -> TypeGuard[CacheKind]:
    """Return whether this is a kind, hashable as a program's static argument is."""
    return isinstance(kind, CacheKind) and type(kind).__hash__ is not None


def as_kind(kind: object) -> object:
    """Return the kind that a text names, such as "int4" or "window:252,sinks=4"; others as given.

    Raises:
        ValueError: a text that names no kind, or arguments that it does not take.
    """
    if not isinstance(kind, str):
        return kind
    from jkv.cache import spec  # its table holds every kind, and these read kinds within kinds

    return spec.parse(kind)


def own_kind_hint(kind: object) -> str:
    """Return what to do with something that would be a kind, but for its base class."""
    if isinstance(kind, type) or not callable(getattr(type(kind), "init", None)):
        return ""
    return ". A kind of your own derives from jkv.cache.CacheKind, its layers from LayerCache"


def furthest(parts: Iterable[CacheKind | LayerCache], new: int) -> int | None:
    """Return how far a token may look back in any of these, None where without limit.

    Args:
        parts: kinds, each bound to its layer, or layers of a cache.
        new: tokens of a pass.
    """
    most = 0
    for part in parts:
        reach = part.reach(new)
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


def window_of(config: Shape, layer: int) -> int | None:
    """Return a layer's own window of the model; a bare shape has none."""
    return config.window(layer) if isinstance(config, Windowed) else None


@runtime_checkable
class Windowed(Protocol):
    """A configuration whose layers may have windows of their own."""

    def window(self, layer: int) -> int | None: ...  # noqa: D102


def check_heads(shape: tuple[int, ...], new: Float[Array, "B T K H"]) -> None:
    """Refuse keys ``[B, T, K, H]`` for a buffer of `shape` ``[B, K, S, H]`` of other heads.

    Raises:
        ValueError: another number of heads, or of dimensions.

    Example:
        >>> from jkv.cache.dense import check_heads
        >>> check_heads((1, 4, 16, 64), jnp.zeros((1, 3, 2, 64)))
        Traceback (most recent call last):
            ...
        ValueError: the cache holds 4 heads of 64 dimensions, and the model makes 2 of 64...
    """
    _, heads, _, dim = shape
    if (heads, dim) != new.shape[2:]:
        raise ValueError(
            f"the cache holds {heads} heads of {dim} dimensions, and the model makes "
            f"{new.shape[2]} of {new.shape[3]}: keys {list(new.shape)} in the order "
            "[B, T, heads, head_dim]; expected keys in that order, and a cache made from this "
            "model's configuration"
        )
