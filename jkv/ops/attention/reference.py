"""What attention over a cache means, in a few lines; every fast version is compared with this."""

import jax.numpy as jnp
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv.ops.codecs import Encoded
from jkv.ops.kv import KV, ContiguousKV, PagedKV
from jkv.ops.masks import AttentionSpec, visible
from jkv.ops.pages import TpuPages, gather
from jkv.ops.partial import Partial


def attention(
    q: Float[Array, "B T N H"], kv: KV, positions: Int[Array, "B T"], spec: AttentionSpec
) -> Partial:
    """Apply softmax attention of each query over the slots that it sees, in float32 or wider."""
    if isinstance(kv, PagedKV):
        kv = contiguous(kv)
    k, v = (x.decode() if isinstance(x, Encoded) else x for x in (kv.k, kv.v))
    slots = jnp.arange(k.shape[2], dtype=jnp.int32)[None]
    slot_positions = kv.slot_positions
    if slot_positions is None:
        slot_positions = jnp.broadcast_to(slots, (k.shape[0], k.shape[2]))
    if kv.lengths is not None:
        slot_positions = jnp.where(slots < kv.lengths[:, None], slot_positions, -1)
    wide = jnp.promote_types(jnp.float32, q.dtype)
    q, k, v = q.astype(wide), k.astype(wide), v.astype(wide)
    batch, new, heads, _ = q.shape
    grouped = q.reshape(batch, new, k.shape[1], heads // k.shape[1], -1)
    seen = visible(positions, slot_positions, window=spec.window, sinks=spec.sinks)
    seen = seen[:, :, None, None, :]
    # Zero times NaN is NaN: what no query sees must not reach the products, nor their derivatives.
    used = jnp.any(seen, axis=(1, 2, 3))[:, None, :, None]
    k, v = jnp.where(used, k, 0.0), jnp.where(used, v, 0.0)
    scores = jnp.einsum("btkgh,bksh->btkgs", grouped, k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    scores = jnp.where(seen, scores, -jnp.inf)
    m = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(m), 0.0, m))
    l = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("btkgs,bksh->btkgh", weights, v)
    out = out / jnp.where(l == 0, 1.0, l)
    lse = jnp.where(jnp.isneginf(m), -jnp.inf, m + jnp.log(l))
    return Partial(out=out.reshape(q.shape), lse=lse.reshape(q.shape[:3]))


def contiguous(kv: PagedKV) -> ContiguousKV:
    """Gather each row's pages in order; a page that is not there leaves empty slots."""
    return ContiguousKV(
        k=gather_slots(kv.k, kv.block_table),
        v=gather_slots(kv.v, kv.block_table),
        lengths=kv.lengths,
        slot_positions=slot_positions(kv.block_table, kv.page),
    )


def gather_slots(
    pages: Float[Array, "P K page H"] | Encoded | TpuPages, block_table: Int[Array, "B M"]
) -> Float[Array, "B K S H"]:
    """Gather each row's pages in order, decoded, S = M * page; anything where there is no page."""
    batch, columns = block_table.shape
    numbers = jnp.maximum(block_table, 0).reshape(-1)
    found = gather(pages, numbers)
    found = found.decode() if isinstance(found, Encoded) else found
    _, heads, page, dim = found.shape
    found = jnp.swapaxes(found.reshape(batch, columns, heads, page, dim), 1, 2)
    return found.reshape(batch, heads, columns * page, dim)


def slot_positions(block_table: Int[Array, "B M"], page: int) -> Int[Array, "B S"]:
    """Return the positions in the slots of `gather_slots`, -1 where there is no page."""
    there = jnp.repeat(block_table >= 0, page, axis=1)
    return jnp.where(there, jnp.arange(there.shape[1], dtype=jnp.int32)[None], -1)
