"""The protocol of a sampling transform, and what its implementations share."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Float, Int, PyTree

from jkv._axes import Array
from jkv._checks import check_number, is_integer
from jkv._pytree import pytree
from jkv._text import brief

# A parameter: a number, or an array (traced or not) of one for all rows, or of one per row [B].
# At run time anything: what is none of these gets a message of its own, not one of a type checker.
if TYPE_CHECKING:
    Parameter = float | np.generic | Array | np.ndarray
else:
    Parameter = Any


@runtime_checkable
class Transform(Protocol):
    """One step from the model's logits to those that are drawn from.

    Its state is to follow from the tokens alone: an engine computes it anew after a preemption, by
    `init` with the prompt and one `update` for each generated token, with logits of zeros.

    Example:
        >>> logits = jnp.log(jnp.array([[0.1, 0.2, 0.7]]))
        >>> transform = jkv.sampling.top_k(2)
        >>> state = transform.init(jnp.array([[2]]), vocab=3)
        >>> changed, state = transform.update(logits, state, jnp.array([-1]))
        >>> changed[0].round(1).tolist()
        [-inf, -1.6..., -0.4...]
    """

    def init(self, tokens: Int[Array, "B T"], vocab: int) -> Any:
        """Make the state after the prompts (-1 is padding), wide enough for the new tokens."""
        ...

    def update(
        self, logits: Float[Array, "B V"], state: PyTree, token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Any]:
        """Return the changed logits, and the state after `token` (-1: none since `init`)."""
        ...


class Stateless(abc.ABC):
    """A transform that looks at the logits alone."""

    def init(self, tokens: Int[Array, "B T"], vocab: int) -> tuple[()]:
        """Remember nothing."""
        del tokens, vocab
        return ()

    def update(
        self, logits: Float[Array, "B V"], state: PyTree, token: Int[Array, " B"]
    ) -> tuple[Any, Any]:  # a user's function may return anything: `apply` looks at it
        """Change the logits."""
        del token
        return self.apply(logits), state

    @abc.abstractmethod
    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Return the changed logits."""


@pytree
class Function(Stateless):
    """A function of the logits ``[B, V]``, which returns as many."""

    function: Any  # a pytree that can be called

    @property
    def name(self) -> str:
        """What the user calls it."""
        function = self.function
        if isinstance(function, jax.tree_util.Partial):
            function = function.func
        return getattr(function, "__name__", type(function).__name__)

    def apply(self, logits: Float[Array, "B V"]) -> Any:
        """Return what the function returns."""
        return self.function(logits)


def number(
    name: str, value: object, expected: str, holds: Callable[[float], bool], *, whole: bool = False
) -> Parameter:
    """Check a parameter: a number, or an array of one for all rows, or of one per row ``[B]``.

    Traced values are taken as they are. An array of one concrete number is that number.

    Args:
        name: of the transform, for messages.
        value: as the user gave it.
        expected: what is, for messages.
        holds: whether a number is in range.
        whole: integers alone.

    Raises:
        ValueError: something else, or a number out of range.
    """
    if isinstance(value, jax.Array | np.ndarray):
        real = jnp.issubdtype(value.dtype, np.integer)
        real = real or (not whole and jnp.issubdtype(value.dtype, np.floating))
        fits = value.ndim <= 1 and real
        if not fits:
            raise ValueError(
                f"{name} got {value.dtype}{list(value.shape)}; expected {expected}, or an array "
                "[B] with one such number per row"
            )
        if isinstance(value, Tracer):
            return value
        array = np.asarray(jax.device_get(value))
        if array.ndim:
            for one in array.tolist():
                if not math.isfinite(one) or not holds(one):
                    raise ValueError(f"{name} got {one!r} for a row; expected {expected}")
            return array.astype(np.int32 if whole else np.float32)
        value = array.item()
    if whole and not is_integer(value):
        raise ValueError(f"{name} got {brief(value)}; expected {expected}")
    number = check_number(name, value, expected, holds)
    return int(number) if whole else number


def per_row(
    name: str, value: Parameter, logits: Float[Array, "B V"], dtype: DTypeLike | None = None
) -> Array:
    """Bring a parameter into a form that goes with the logits: ``[]``, or ``[B, 1]`` from ``[B]``.

    Raises:
        ValueError: another number of rows.
    """
    array = jnp.asarray(value, logits.dtype if dtype is None else dtype)
    if array.ndim != 1:
        return array
    if array.shape[0] not in (1, logits.shape[0]):
        raise ValueError(
            f"{name} got {array.shape[0]} numbers for {logits.shape[0]} rows; expected one, or one "
            "per row"
        )
    return array[:, None]
