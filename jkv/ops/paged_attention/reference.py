"""What attention over pages means: the pages in order, and attention over them."""

import jax.numpy as jnp
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv.ops.attention import reference
from jkv.ops.encoded import Encoded
from jkv.ops.pages import Tiled, taken
from jkv.ops.partial import Partial


def gathered(
    pages: Float[Array, "P K page H"] | Encoded | Tiled, block_table: Int[Array, "B M"]
) -> Float[Array, "B K S H"]:
    """Each row's pages in order, decoded, S = M * page; anything where there is no page."""
    batch, columns = block_table.shape
    numbers = jnp.maximum(block_table, 0).reshape(-1)
    found = taken(pages, numbers)
    found = found.decode() if isinstance(found, Encoded) else found
    _, heads, page, dim = found.shape
    found = jnp.swapaxes(found.reshape(batch, columns, heads, page, dim), 1, 2)
    return found.reshape(batch, heads, columns * page, dim)


def slot_positions(block_table: Int[Array, "B M"], page: int) -> Int[Array, "B S"]:
    """Positions in the slots of `gathered`, -1 where there is no page."""
    there = jnp.repeat(block_table >= 0, page, axis=1)
    return jnp.where(there, jnp.arange(there.shape[1], dtype=jnp.int32)[None], -1)


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P K page H"] | Encoded | Tiled,
    v_pages: Float[Array, "P K page H"] | Encoded | Tiled,
    block_table: Int[Array, "B M"],
    *,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
) -> Partial:
    """Softmax attention of each query over the tokens that it sees, in float32 or wider."""
    return reference.attention(
        q,
        gathered(k_pages, block_table),
        gathered(v_pages, block_table),
        positions=positions,
        slot_positions=slot_positions(block_table, k_pages.shape[2]),
        lengths=lengths,
        scale=scale,
        window=window,
        sinks=sinks,
        softcap=softcap,
    )
