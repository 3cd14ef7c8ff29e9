"""One forward pass over new tokens: what the model is given, and what it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv._pytree import replace
from jkv._text import plural
from jkv.cache.base import Cache
from jkv.cache.protocol import LayerCache, Layers, Step
from jkv.cache.shared_state import SharedState


@dataclasses.dataclass(frozen=True)
class Run:
    """One forward pass over new tokens, from `Cache.begin`.

    A plain value within a program: return the cache that `end` makes from a jitted function, and
    not this.

    Attributes:
        cache: before the pass.
        tokens: ``[B, T]``, what the layers run over: the new tokens; of `none()`, the whole
            history.
        step: where these are.
        new: where the new tokens are; the same as `step` but for `none()`.
        overflowed: ``[B]``, rows that refuse their new tokens.
        shared: what the layers share after the pass.

    Example:
        >>> cache = jkv.init_cache(lm.config, batch=1, slots=8)
        >>> run = cache.begin(jnp.array([[5, 6, 7]]))
        >>> run.step.positions.tolist(), len(run.layers) == lm.config.layers
        ([[0, 1, 2]], True)
        >>> run.next_cache(run.layers).lengths.tolist()  # each layer's own, once it has attended
        [3]
    """

    cache: Cache
    tokens: Array
    step: Step
    new: Step
    overflowed: Array
    shared: tuple[SharedState, ...]

    @property
    def layers(self) -> Layers:
        """For each of the model's layers, its cache."""
        return self.cache.layers

    def end(
        self, hidden: Float[Array, "B T *D"], layers: Sequence[LayerCache]
    ) -> tuple[Array, Cache]:
        """Return the new tokens' hidden states, and the cache after the pass.

        Args:
            hidden: of all `tokens`, after the last layer.
            layers: what each layer's `attend` returned.

        Raises:
            ValueError: another number of layers than `layers` of the pass.
        """
        for state in self.shared:
            hidden = state.end(hidden, self.new)
        return hidden, self.next_cache(layers)

    def next_cache(self, layers: Sequence[LayerCache]) -> Cache:
        """Return the cache after the pass, where no hidden states are wanted.

        Args:
            layers: what each layer's `attend` or `append` returned.

        Raises:
            ValueError: another number of layers than `layers` of the pass.
        """
        if len(layers) != len(self.layers):
            raise ValueError(
                f"a pass got {plural(len(layers), 'layer')}; expected {len(self.layers)}, as the "
                f"cache was made with {plural(len(self.layers), 'layer')}: pass what attend of "
                "each of run.layers returned, or make a cache for as many layers as the model has"
            )
        return replace(
            self.cache,
            layers=tuple(layers),
            lengths=self.new.stop,
            overflowed=self.overflowed,
            shared=self.shared,
        )


def begin(cache: Cache, tokens: Int[Array, "B T"], counts: Int[Array, " B"] | None) -> Run:
    """See `Cache.begin`."""
    check_batch(cache, tokens)
    new = tokens.shape[1]
    if counts is None:
        counts = jnp.full((cache.batch,), new, jnp.int32)
    counts = jnp.clip(counts.astype(jnp.int32), 0, new)
    if cache.capacity is None and not cache.shared:
        step = Step.after(cache.lengths, counts, new)
        return Run(cache, tokens, step, step, cache.overflowed, ())
    fits = ~cache.overflowed
    if cache.capacity is not None:
        fits &= cache.lengths + counts <= cache.capacity
    reserved = []
    for state in cache.shared:
        room, fits = state.reserve(cache.layers, cache.lengths, counts, new, fits)
        reserved.append(room)
    step = whole = Step.after(cache.lengths, jnp.where(fits, counts, 0), new)
    shared = []
    for state, room in zip(cache.shared, reserved, strict=True):
        state, tokens, whole = state.begin(room, tokens, whole)
        shared.append(state)
    return Run(cache, tokens, whole, step, ~fits, tuple(shared))


def check_batch(cache: Cache, tokens: Int[Array, "B T"]) -> None:
    """Refuse tokens that are not for the rows of a cache.

    Raises:
        ValueError: another number of rows.
    """
    if tokens.shape[0] != cache.batch:
        raise ValueError(
            f"the cache has {plural(cache.batch, 'row')} and the tokens {tokens.shape[0]}; "
            "expected as many: make another with jkv.init_cache(..., batch=), or choose with "
            "cache.take"
        )
