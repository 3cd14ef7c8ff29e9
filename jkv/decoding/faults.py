"""Rows that had nothing to draw from: NaN or infinity in the logits of their next token."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jkv._axes import Array
from jkv._pytree import pytree
from jkv.errors import NonFiniteError

MODEL = (
    "the model's logits are NaN or infinite; look for such values in the weights, or for "
    "activations too large for their dtype (load with dtype='float32')"
)
SAMPLER = (
    "the sampler left nothing to draw from: NaN, plus infinity, or minus infinity for every token; "
    "look at its mask, which must leave each row at least one token"
)


@pytree
class Faults:
    """Per row, the first token that could not be drawn, carried by the decode loops."""

    position: Array  # [B] int32, of that token in its row; -1 where there is no fault
    sampler: Array  # [B] bool, the model's logits were finite and those of the sampler were not

    @classmethod
    def none(cls, batch: int) -> Faults:
        """Return the value for rows without a fault."""
        return cls(
            position=jnp.full((batch,), -1, jnp.int32), sampler=jnp.zeros((batch,), jnp.bool_)
        )

    def note(
        self,
        rows: Bool[Array, " B"],
        model: Bool[Array, " B"],
        sampler: Bool[Array, " B"],
        position: Int[Array, " B"],
    ) -> Faults:
        """Record the faults of a step.

        Args:
            rows: that take part and have no fault yet.
            model: whose logits are not finite as the model gives them.
            sampler: whose logits are not finite after the sampler.
            position: of the token that each row was to draw.
        """
        new = rows & (model | sampler)
        return Faults(
            position=jnp.where(new, position, self.position),
            sampler=jnp.where(new, ~model, self.sampler),
        )

    def check(self, steps: np.ndarray) -> None:
        """Raise on the host where a row has a fault.

        Args:
            steps: ``[B]``, new tokens that each row drew before it.

        Raises:
            NonFiniteError: with the rows, the step of each, and the likely cause.
        """
        positions, sampler = np.asarray(self.position), np.asarray(self.sampler)
        raise_faults(
            [(int(b), int(steps[b]), bool(sampler[b])) for b in np.flatnonzero(positions >= 0)]
        )


def raise_faults(found: Sequence[tuple[int, int, bool]]) -> None:
    """Raise for rows with a fault, if there are any.

    Args:
        found: (row, step, whether it is the sampler's) of each.

    Raises:
        NonFiniteError: see `Faults.check`.
    """
    lines = []
    for cause, by_sampler in ((MODEL, False), (SAMPLER, True)):
        rows = [f"row {row} at step {step}" for row, step, s in found if s == by_sampler]
        if rows:
            lines.append(f"{', '.join(rows)}: {cause}")
    if lines:
        raise NonFiniteError(
            f"a token could not be drawn (step 0 is the first new token): {'. '.join(lines)}"
        )


def undrawable(logits: Float[Array, "*rows V"]) -> Bool[Array, "*rows"]:
    """Find rows of logits with NaN or plus infinity, or with minus infinity everywhere.

    The maximum says all three, and drawing a token needs it anyway. Minus infinity for some tokens
    is what masks write.
    """
    return ~jnp.isfinite(jnp.max(logits, axis=-1))
