"""The words of the library: axis letters and array aliases.

Axes, the same letters in shapes, einsums and docstrings everywhere:

====== =====================================================================
``B``  batch row: one sequence
``T``  new token of this pass
``S``  cache slot
``N``  query head
``K``  key/value head
``G``  query heads per key/value head, ``N // K``
``H``  head dimension
``D``  model width
``F``  feed-forward width
``V``  vocabulary
``L``  layer
``P``  page
====== =====================================================================

Keys and values are ``[B, K, S, H]`` to the outside: one contiguous stream per row and head, which
is what a decode step reads. Queries and new keys arrive as the model makes them, ``[B, T, N, H]``
and ``[B, T, K, H]``. Masks come from positions alone: every slot knows the position of the token
in it, ``-1`` when it is empty, and a padding query has position ``-1`` too.
"""

from typing import Any, TypeAlias

import jax
from jaxtyping import Bool, Float, Int

Array = jax.Array
Index = jax.Array | int  # a number that may be traced
Shaped = jax.Array | jax.ShapeDtypeStruct  # what is asked for a shape and a dtype alone
Ref: TypeAlias = Any  # memory inside a kernel, for which Pallas has no type

Queries = Float[Array, "B T N H"]
NewKeys = Float[Array, "B T K H"]
Keys = Float[Array, "B K S H"]
Positions = Int[Array, "B T"]
SlotPositions = Int[Array, "B S"]
Lengths = Int[Array, " B"]
Flags = Bool[Array, " B"]
Tokens = Int[Array, "B T"]
Logits = Float[Array, "B V"]
