"""The keys and values that attention reads, as values: where the tokens are, and which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jkv._axes import Array, Shaped
from jkv._pytree import pytree, replace, static
from jkv.ops.codecs import Encoded
from jkv.ops.dispatch import fold_rows
from jkv.ops.pages import TpuPages

if TYPE_CHECKING:
    Integers = Array
    Slots = Array | Encoded
    Pages = Array | Encoded | TpuPages
else:  # shapes do where an implementation is only chosen
    Integers = Slots = Pages = Any


@pytree
class ContiguousKV:
    """Keys and values of one buffer of slots per row.

    Without `slot_positions` slot s holds position s; without `lengths` all slots are filled. What
    lies in empty slots may be anything, NaN included.

    Example:
        >>> k = v = jnp.ones((1, 2, 16, 4))  # [B, K, S, H]
        >>> kv = jkv.ops.ContiguousKV(k, v, lengths=jnp.array([3]))
        >>> kv.kv_heads, kv.slots
        (2, 16)
    """

    k: Slots  # [B, K, S, H]
    v: Slots  # [B, K, S, H]
    lengths: Integers | None = None  # [B] int32, only the first lengths[b] slots hold anything
    slot_positions: Integers | None = None  # [B, S] int32, of the tokens in the slots, -1 for none
    chunk: bool = static(default=False)  # the slots hold the queries' own tokens, see `chunk`

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.k.shape[1]

    @property
    def slots(self) -> int:
        """S."""
        return self.k.shape[2]

    @classmethod
    def of_chunk(cls, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> ContiguousKV:
        """Return the queries' own tokens as operands: each row's real ones first and in order.

        The queries' positions are those of the slots too. Some implementations can attend to a
        chunk and to nothing else.
        """
        return cls(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), chunk=True)

    def check(self, q: Shaped) -> None:
        """Refuse operands that do not fit together.

        Raises:
            ValueError: a chunk of another length than the queries, or described otherwise.
        """
        described = self.slot_positions is not None or self.lengths is not None
        if self.chunk and (described or self.slots != q.shape[1]):
            raise ValueError(
                f"attention got a chunk of {self.slots} slots for {q.shape[1]} queries"
                f"{', with lengths or slot_positions' if described else ''}; expected as many, "
                "without slot_positions and lengths: the queries' positions are those of the slots"
            )

    def for_queries(self, positions: Integers) -> ContiguousKV:
        """Return the operand with all that depends on the queries' positions filled in."""
        return replace(self, slot_positions=positions) if self.chunk else self

    def fold(self, batched: ContiguousKV, size: int) -> ContiguousKV | None:
        """Return it with a mapped axis as part of the rows, see `dispatch.Fold`."""
        if not all(jax.tree.leaves((batched.k, batched.v))):
            return None  # keys that rows share are not to be repeated for each
        return fold_rows(self, batched, size)


@pytree
class PagedKV:
    """Keys and values in pages that a block table puts in order (arXiv:2309.06180).

    Position p of row b is token ``p % page`` of page ``block_table[b, p // page]``. Rows may share
    pages. Nothing is gathered as a whole: pages that are seen are read where they lie.

    Example:
        >>> pages = jnp.ones((8, 2, 4, 4))  # [P, K, page, H]
        >>> kv = jkv.ops.PagedKV(pages, pages, jnp.array([[5, 0, -1]]), jnp.array([7]))
        >>> kv.page, kv.slots
        (4, 12)
    """

    k: Pages  # [P, K, page, H]
    v: Pages  # [P, K, page, H]
    block_table: Integers  # [B, M] int32, -1 for no page: its tokens are seen by no query
    lengths: Integers  # [B] int32, tokens of each row; what is beyond may be anything

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.k.shape[1]

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.k.shape[2]

    @property
    def slots(self) -> int:
        """Slots of a row, ``M * page``."""
        return self.block_table.shape[1] * self.page

    def check(self, q: Shaped) -> None:
        """Refuse operands that do not fit together.

        Raises:
            ValueError: a block table without columns.
        """
        del q
        if self.block_table.shape[1] < 1:
            raise ValueError("attention got a block table without columns; expected at least one")

    def for_queries(self, positions: Integers) -> PagedKV:
        """Return itself: nothing of it depends on the queries."""
        del positions
        return self

    def fold(self, batched: PagedKV, size: int) -> PagedKV | None:
        """Return it with a mapped axis as part of the rows, see `dispatch.Fold`."""
        if any(jax.tree.leaves((batched.k, batched.v))):
            return None  # each mapped element has pages of its own
        table, lengths = fold_rows(
            (self.block_table, self.lengths), (batched.block_table, batched.lengths), size
        )
        return replace(self, block_table=table, lengths=lengths)


KV: TypeAlias = ContiguousKV | PagedKV
"""Operands of attention: keys and values in one buffer per row, or in pages."""
