"""What several layers of a cache share: the protocol of block tables and of token histories."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jkv._axes import Array
from jkv.cache.protocol import LayerCache, Layers, Step

if TYPE_CHECKING:
    from typing import Self
else:
    Self = Any  # beartype, which watches the tests, has none inside of jaxtyping's decorators


class SharedState(abc.ABC):
    """What several layers of a cache share: block tables, or the history of tokens.

    A frozen pytree, decorated with `jkv.cache.pytree`. A layer names its class by `shares`, and
    the cache then makes one, and asks it whatever it asks the layers.

    Example:
        >>> layer = jkv.none().init(batch=1, slots=8, kv_heads=2, head_dim=4, dtype="float32")
        >>> issubclass(layer.shares, jkv.cache.SharedState)  # all layers recompute from one history
        True
    """

    @classmethod
    @abc.abstractmethod
    def empty(cls, layers: Sequence[LayerCache], batch: int, slots: int) -> tuple[Layers, Self]:
        """Make the state of new layers, and return these with their place in it."""

    @abc.abstractmethod
    def capacity(self, layers: Layers) -> int | None:
        """Return the tokens that a row can hold, None when it never runs full."""

    @abc.abstractmethod
    def begin(
        self, reserved: Any, tokens: Int[Array, "B T"], step: Step
    ) -> tuple[Self, Int[Array, "B T"], Step]:
        """Begin a pass over new tokens.

        Args:
            reserved: what `reserve` returned.
            tokens: of each row.
            step: where they are.

        Returns:
            The state after the pass, and the tokens and the step that the layers run over.
        """

    @abc.abstractmethod
    def take(self, rows: Int[Array, " R"]) -> Self:
        """Return the state whose row r is this one's row ``rows[r]``."""

    @abc.abstractmethod
    def crop(self, layers: Layers, held: Int[Array, " B"], lengths: Int[Array, " B"]) -> Self:
        """Roll back from `held[b]` tokens to the first `lengths[b]` of them.

        Raises:
            UnsupportedError: what is needed has been overwritten.
        """

    @abc.abstractmethod
    def resize(self, layers: Layers, slots: int) -> Self:
        """Return the same tokens with room for `slots` of each row."""

    @abc.abstractmethod
    def concat(self, others: Sequence[Self], layers: Sequence[Layers]) -> Self:
        """Concatenate along the batch axis.

        Args:
            others: of caches of the same kind and length.
            layers: of each cache, this one's first.
        """

    def reserve(
        self,
        layers: Layers,
        start: Int[Array, " B"],
        counts: Int[Array, " B"],
        new: int,
        fits: Bool[Array, " B"],
    ) -> tuple[Any, Bool[Array, " B"]]:
        """Reserve room for `counts[b]` of `new` tokens per row.

        Args:
            layers: of the cache.
            start: tokens in each row.
            counts: new tokens of each row.
            new: T.
            fits: rows that have room as far as is known.

        Returns:
            What `begin` is to be given, and the rows of `fits` that have room here too.
        """
        del layers, start, counts, new
        return None, fits

    def end(self, hidden: Float[Array, "B T *D"], step: Step) -> Float[Array, "B T *D"]:
        """Return the hidden states of the new tokens.

        Args:
            hidden: of the tokens that `begin` returned.
            step: of the new tokens.
        """
        del step
        return hidden

    def fit(self, layers: Layers, sizes: tuple[int, ...] | None = None) -> tuple[Layers, Self]:
        """Return layers and state with as much storage as the rows may need, or of `sizes`."""
        del sizes
        return layers, self

    def fork_sizes(self, layers: Layers, lengths: np.ndarray, times: int) -> tuple[int, ...]:
        """Return sizes for `fit` that are enough for rows which go on `times` ways each."""
        del layers, lengths, times
        return ()

    @property
    def refusal(self) -> str:
        """Why a row may have been refused, besides being full; "" where there is no reason."""
        return ""

    @property
    def grows(self) -> bool:
        """Whether a loop gives it slots as it goes, and not all at the start."""
        return False

    @property
    def recomputes(self) -> bool:
        """Whether each pass runs over all tokens."""
        return False
