"""The words of the library: axis letters, terms of the field, and array aliases.

Axes, the same letters in shapes, einsums and docstrings everywhere:

====== =====================================================================
``B``  batch row: one sequence
``T``  new token of this pass
``S``  cache slot
``N``  query head
``K``  key/value head
``G``  query heads per key/value head, ``N // K``
``H``  head dimension, its channels
``D``  model width
``F``  feed-forward width
``V``  vocabulary
``L``  layer
``P``  page
``M``  entry of a row's block table
``Z``  row and key/value head as one axis, ``B * K``
====== =====================================================================

Keys and values are ``[B, K, S, H]`` to the outside: one contiguous stream per row and head, which
is what a decode step reads. Queries and new keys arrive as the model makes them, ``[B, T, N, H]``
and ``[B, T, K, H]``. Masks come from positions alone: every slot knows the position of the token
in it, ``-1`` when it is empty, and a padding query has position ``-1`` too.

Terms:

================== =================================================================================
sequence           the tokens of one prompt and its continuation
row                a sequence in a batch; rows of a cache have lengths of their own
slot               the place of one token in a row's cache
position           a token's number in its sequence, from 0
page               a fixed number of slots that sequences may share
block table        the pages of a row, in the order of its tokens; -1 where there is none
copy on write      a shared page is copied before one of its sequences writes to it
lane               a row of the engine's decode batch, which running sequences take turns to use
prefill, decode    the pass over a prompt, in chunks; the passes of one new token per row
prefix hash        a hash of all tokens up to the end of a page, by which pages are found again
codec              how tokens are stored in fewer bits; a block is what it encodes together
scale, zero point  a code c stands for ``(c + zero point) * scale``
residual           the latest tokens, kept exact beside older ones that are encoded
ring               a buffer of slots of which the oldest is overwritten
sliding window     a query sees only the last tokens before it
attention sinks    first tokens that every query sees, whatever the window
lse                log of the sum of exp of the scores: what partial results merge by
m, l, alpha        online softmax: running maximum, sum of weights, and what rescales both
draft              tokens proposed before the model is asked, accepted where it agrees
tier               one place of a store, such as memory or disk; entries move between them
evict, promote     remove what a policy chooses; move an entry to a faster tier
pin                keep an entry or page from eviction while it is used
fingerprint        32 bytes over all that keys and values depend on: weights, configuration, kind
================== =================================================================================
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
