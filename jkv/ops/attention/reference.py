"""What attention over a cache means, in a few lines; every fast version is compared with this."""

import jax.numpy as jnp
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv.ops.encoded import Encoded
from jkv.ops.masks import visible
from jkv.ops.partial import Partial


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | Encoded,
    v: Float[Array, "B K S H"] | Encoded,
    *,
    positions: Int[Array, "B T"],
    slot_positions: Int[Array, "B S"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    chunk: bool = False,
) -> Partial:
    """Softmax attention of each query over the slots that it sees, in float32 or wider."""
    del chunk
    k, v = (x.decode() if isinstance(x, Encoded) else x for x in (k, v))
    slots = jnp.arange(k.shape[2], dtype=jnp.int32)[None]
    if slot_positions is None:
        slot_positions = jnp.broadcast_to(slots, (k.shape[0], k.shape[2]))
    if lengths is not None:
        slot_positions = jnp.where(slots < lengths[:, None], slot_positions, -1)
    wide = jnp.promote_types(jnp.float32, q.dtype)
    q, k, v = q.astype(wide), k.astype(wide), v.astype(wide)
    batch, new, heads, _ = q.shape
    grouped = q.reshape(batch, new, k.shape[1], heads // k.shape[1], -1)
    seen = visible(positions, slot_positions, window=window, sinks=sinks)[:, :, None, None, :]
    # Zero times NaN is NaN: what no query sees must not reach the products, nor their derivatives.
    used = jnp.any(seen, axis=(1, 2, 3))[:, None, :, None]
    k, v = jnp.where(used, k, 0.0), jnp.where(used, v, 0.0)
    scores = jnp.einsum("btkgh,bksh->btkgs", grouped, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(top), 0.0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("btkgs,bksh->btkgh", weights, v)
    out = out / jnp.where(total == 0, 1.0, total)
    lse = jnp.where(jnp.isneginf(top), -jnp.inf, top + jnp.log(total))
    return Partial(out=out.reshape(q.shape), lse=lse.reshape(q.shape[:3]))
