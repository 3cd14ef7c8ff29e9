"""Call a sampling transform and check what it returns, while it is traced: free of cost later."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from jkv._axes import Array
from jkv._text import brief
from jkv.decoding.transform import Function, Transform

_NUMBERS = (jax.Array, np.ndarray, np.generic, int, float)


def init_state(transform: Transform, tokens: Int[Array, "B T"], vocab: int) -> PyTree:
    """Make a transform's state from the tokens so far.

    Raises:
        ValueError: the state is no pytree of numbers and arrays.
    """
    state = transform.init(tokens, vocab)
    _shapes(transform, "init", state)
    return state


def apply(
    transform: Transform, logits: Float[Array, "B V"], state: PyTree, token: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], PyTree]:
    """Change the logits and update the state.

    Logits in another float dtype are converted: a token is drawn from float32.

    Raises:
        TypeError: `update` did not return a pair.
        ValueError: logits of another shape or no floats, or a state of another structure, shape or
            dtype than the one it was given, which `init` made.
    """
    name, found = _name(transform), transform.update(logits, state, token)
    if not isinstance(found, tuple | list) or len(found) != 2:
        got = f"{len(found)} values" if isinstance(found, tuple | list) else _describe(found)
        raise TypeError(
            f"the transform {name} returned {got} from update; expected a pair: the changed logits "
            f"{_describe(logits)} and the next state"
        )
    changed, after = found
    shape = getattr(changed, "shape", None)
    if shape != logits.shape or not jnp.issubdtype(changed.dtype, jnp.floating):
        raise ValueError(
            f"the transform {name} made {_describe(changed)} of the logits; expected "
            f"{_describe(logits)}, a score for each token of the vocabulary"
        )
    expected, got = _shapes(transform, "init", state), _shapes(transform, "update", after)
    if got != expected:
        raise ValueError(
            f"the transform {name} returned the state {_list_shapes(after)} from update; expected "
            f"{_list_shapes(state)} as it was given, and as init made it: the loop carries it"
        )
    return changed.astype(logits.dtype), after


def check_updates(transform: Transform | None, batch: int, vocab: int, tokens: int = 1) -> None:
    """Trace one step of a transform, before any work is done with it.

    Args:
        transform: None is fine.
        batch: B.
        vocab: V.
        tokens: T, what `init` is given of each row.

    Raises:
        TypeError: see `apply`, as for all that it raises.
        ValueError: likewise.
    """
    if transform is not None:
        _step.eval_shape(batch, vocab, tokens, transform)


# Compiled never; `jit` remembers what it has traced.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(batch: int, vocab: int, tokens: int, transform: Transform) -> tuple[Array, PyTree]:
    state = init_state(transform, jnp.full((batch, tokens), -1, jnp.int32), vocab)
    logits, token = jnp.zeros((batch, vocab), jnp.float32), jnp.full((batch,), -1, jnp.int32)
    return apply(transform, logits, state, token)


def _shapes(transform: Transform, method: str, state: PyTree) -> tuple[Any, ...]:
    """Describe the structure, shapes and dtypes of a state."""
    leaves, tree = jax.tree.flatten(state)
    if not all(isinstance(leaf, _NUMBERS) for leaf in leaves):
        raise ValueError(
            f"the transform {_name(transform)} returned the state {brief(state)} from "
            f"{method}; expected a pytree of numbers and arrays"
        )
    return tree, *((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _name(transform: Transform) -> str:
    """Name the transform's class, or the user's function."""
    return transform.name if isinstance(transform, Function) else type(transform).__name__


def _list_shapes(state: PyTree) -> str:
    """Describe a state by the shapes of its arrays."""
    return str(jax.tree.map(lambda leaf: f"{_describe(leaf)}", state)).replace("'", "")


def _describe(value: object) -> str:
    """Describe an array as ``float32[2, 11]``, anything else as it is."""
    if isinstance(value, _NUMBERS):
        return f"{jnp.result_type(value)}{list(jnp.shape(value))}"
    return brief(value)
