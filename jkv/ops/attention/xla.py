"""Attention over the cache for any device that XLA compiles for.

Two forms of the same sum. `_whole` scores all slots at once: it is differentiable and best where
most of the buffer is filled. `_walk` goes over blocks of slots with an online softmax, from the
first block that a window reaches to the last that is filled, so that the cost follows the filled
length and not the buffer. `_shortest` takes the cheaper of the two at each step. Derivatives of any
order are those of `_whole`: a loop of traced length has no reverse.

Rows and heads are one axis inside, ``Z = B * K``: with two batch axes XLA reshapes between the
cache's update and the product, makes the update twice and copies the cache at every step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkv._axes import Array
from jkv.ops.codecs import Encoded
from jkv.ops.kv import ContiguousKV
from jkv.ops.masks import AttentionSpec, visible
from jkv.ops.partial import Partial

BLOCK = 128  # slots; measured on the CPU against 64, 256, 512 and 1024
FEW = 16  # new tokens up to which the scores over a whole buffer are small beside it

# Products of float32 in float32. By default TPUs round to bfloat16 first, for which XLA converts
# the whole cache at every step, and NVIDIA GPUs to TF32; neither gives the tokens of the CPU.
_PRODUCT: dict[str, Any] = {
    "preferred_element_type": jnp.float32,
    "precision": lax.Precision.HIGHEST,
}


def attention(q: Array, kv: ContiguousKV, positions: Array, spec: AttentionSpec) -> Partial:
    """Attend to one buffer of slots per row, see `jkv.ops.attention`."""
    rows = rows_of(q, kv.kv_heads)
    slot_positions, lengths = kv.slot_positions, kv.lengths
    # Encoded tokens are decoded a block at a time, never all of them.
    encoded = isinstance(kv.k, Encoded) or isinstance(kv.v, Encoded)
    k, v = _merged(kv.k), _merged(kv.v)
    form = _walk if encoded else _shortest

    def plain(q, k, v):
        return form(spec, q, k, v, positions, slot_positions, lengths)

    def in_pairs(q, k, v):
        # One query row makes a vector product, for which XLA copies or converts the whole cache
        # at every step on TPUs and GPUs; two rows make a matrix product, which reads it in place.
        out, lse = plain(jnp.concatenate([q, q], axis=1), k, v)
        return out[:, :1], lse[:, :1]

    if rows.shape[1] > 1:
        out, lse = plain(rows, k, v)
    else:
        out, lse = lax.platform_dependent(rows, k, v, cpu=plain, default=in_pairs)
    return partial_of(out, lse, q)


def rows_of(q: Array, kv_heads: int) -> Array:
    """Queries [B, T, N, H] as [Z, R, H]; R counts groups first, then new tokens."""
    batch, new, heads, dim = q.shape
    groups = heads // kv_heads
    rows = q.reshape(batch, new, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    return rows.reshape(batch * kv_heads, groups * new, dim)


def partial_of(out: Array, lse: Array, q: Array) -> Partial:
    """Back from [Z, R, H] and [Z, R] to the heads of q."""
    batch, new, heads, dim = q.shape
    kv_heads = out.shape[0] // batch
    groups = heads // kv_heads
    out = out.reshape(batch, kv_heads, groups, new, dim).transpose(0, 3, 1, 2, 4)
    lse = lse.reshape(batch, kv_heads, groups, new).transpose(0, 3, 1, 2)
    return Partial(out=out.reshape(q.shape), lse=lse.reshape(batch, new, heads))


def _merged(x: Any) -> Any:
    """Rows and heads as one axis."""
    return x.flatten_heads() if isinstance(x, Encoded) else x.reshape(-1, *x.shape[2:])


def _positions_of(slots: Array, slot_positions: Array | None, lengths: Array | None, batch: int):
    """Positions [B, S'] held by the slots numbered `slots` [S'], -1 where nothing is."""
    if slot_positions is None:
        at = jnp.broadcast_to(slots[None, :], (batch, slots.shape[0]))
    else:
        at = lax.dynamic_slice_in_dim(slot_positions, slots[0], slots.shape[0], axis=1)
    if lengths is None:
        return at
    return jnp.where(slots[None, :] < lengths[:, None], at, -1)


def _scores(spec: AttentionSpec, q: Array, k: Array, positions: Array, at: Array) -> Array:
    """Masked scores [Z, R, S'] in float32; R counts groups first, then new tokens."""
    return _masked(spec, jnp.einsum("zrh,zsh->zrs", q, k, **_PRODUCT), positions, at)


def _masked(spec: AttentionSpec, products: Array, positions: Array, at: Array) -> Array:
    batch, new = positions.shape
    z, r, _ = products.shape
    scores = products * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    seen = visible(positions, at, window=spec.window, sinks=spec.sinks)
    seen = jnp.broadcast_to(seen[:, None, None], (batch, z // batch, r // new, *seen.shape[1:]))
    return jnp.where(seen.reshape(z, r, at.shape[1]), scores, -jnp.inf)


def _zeroed(x: Array, positions: Array, at: Array) -> Array:
    """Keys or values [Z, S', H] with zeros where no query can look: zero times NaN is NaN."""
    used = _used(x.shape[0], positions, at)
    return jnp.where(used[..., None], x, jnp.zeros((), x.dtype))


def _used(lines: int, positions: Array, at: Array) -> Array:
    """Slots [Z, S'] at which some query may look."""
    batch = positions.shape[0]
    used = (at >= 0) & (at <= jnp.max(positions, axis=1)[:, None])
    used = jnp.broadcast_to(used[:, None], (batch, lines // batch, at.shape[1]))
    return used.reshape(lines, at.shape[1])


def _weighted(weights: Array, v: Array) -> Array:
    return jnp.einsum("zrs,zsh->zrh", weights.astype(v.dtype), v, **_PRODUCT)


def _whole(spec, q, k, v, positions, slot_positions, lengths):
    """Output [Z, R, H] and log-sum-exp [Z, R], all slots at once."""
    at = _positions_of(
        jnp.arange(k.shape[1], dtype=jnp.int32), slot_positions, lengths, positions.shape[0]
    )
    weights, l, lse = _softmax(_scores(spec, q, k, positions, at))
    return _weighted(weights, _zeroed(v, positions, at)) / l, lse


def _whole_in_place(spec, q, k, v, positions, slot_positions, lengths):
    """Like `_whole`, reading the values where they lie."""
    at = _positions_of(
        jnp.arange(k.shape[1], dtype=jnp.int32), slot_positions, lengths, positions.shape[0]
    )
    weights, l, lse = _softmax(_scores(spec, q, k, positions, at))
    return _weighted_in_place(weights, v, positions, at) / l, lse


def _weighted_in_place(weights: Array, v: Array, positions: Array, at: Array) -> Array:
    """Like `_weighted` of `_zeroed`, without writing them out.

    Zeroing what no query sees takes a copy of the values, and is needed only where the product
    shows it: a weight of zero makes anything but infinity and NaN vanish by itself.
    """
    out = _weighted(weights, v)

    def zeroed(weights, v, out):
        del out
        lines = v.shape[0]

        # One line after another: for all at once there would be a second cache of values, in
        # memory that is set aside whether this branch is taken or not.
        def line(z):
            row = z * positions.shape[0] // lines
            values = _zeroed(v[z][None], positions[row][None], at[row][None])
            return _weighted(weights[z][None], values)[0]

        return lax.map(line, jnp.arange(lines, dtype=jnp.int32))

    return lax.cond(jnp.any(jnp.isnan(out)), zeroed, lambda w, v, out: out, weights, v, out)


def _softmax(scores: Array) -> tuple[Array, Array, Array]:
    """Weights [Z, R, S], their sum [Z, R, 1] (1 where nothing is seen) and log-sum-exp [Z, R]."""
    m = lax.stop_gradient(jnp.max(scores, axis=-1))
    m = jnp.where(jnp.isneginf(m), 0.0, m)
    weights = jnp.exp(scores - m[..., None])
    l = jnp.sum(weights, axis=-1)
    empty = l == 0
    l = jnp.where(empty, 1.0, l)
    return weights, l[..., None], jnp.where(empty, -jnp.inf, m + jnp.log(l))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _shortest(spec, q, k, v, positions, slot_positions, lengths):
    """Like `_whole`, at the cost of what is filled."""
    if k.shape[1] <= BLOCK:
        return _whole(spec, q, k, v, positions, slot_positions, lengths)

    def walk(q, k, v):
        return _walk(spec, q, k, v, positions, slot_positions, lengths)

    def shorter(q, k, v):
        # A block is sliced out of the cache, which costs as much again as reading it: where
        # about half of the buffer or more is to be read, one pass over all of it is quicker.
        first, last = block_range(spec, positions, slot_positions, lengths, k.shape[1])
        most = (last - first) * (BLOCK * 5) >= k.shape[1] * 2

        def whole(q, k, v):
            return _whole_in_place(spec, q, k, v, positions, slot_positions, lengths)

        return lax.cond(most, whole, walk, q, k, v)

    few = positions.shape[1] <= FEW
    return lax.platform_dependent(q, k, v, cpu=shorter if few else walk, default=walk)


@_shortest.defjvp
def _shortest_jvp(spec, primals, tangents):
    q, k, v, positions, slot_positions, lengths = primals
    at = _positions_of(
        jnp.arange(k.shape[1], dtype=jnp.int32), slot_positions, lengths, positions.shape[0]
    )

    def whole(q, k, v):
        # The scores of slots where no query can look are masked, their derivatives are not: zero
        # times the NaN of an empty slot would be the query's.
        k = _zeroed(k, positions, at)
        return _whole(spec, q, k, v, positions, slot_positions, lengths)

    return jax.jvp(whole, (q, k, v), tangents[:3])


class Slots(NamedTuple):
    """Where `walk` reads: keys and values [Z, S, H], arrays or encoded, a block at a time."""

    q: Array  # [Z, R, H]
    k: Any
    v: Any
    slot_positions: Array | None  # [B, S]
    lengths: Array | None  # [B]

    @property
    def slots(self) -> int:
        """All of them."""
        return self.k.shape[1]

    @property
    def size(self) -> int:
        """Slots of a block."""
        return min(BLOCK, self.slots)

    def at(self, slots: Array, batch: int) -> Array:
        """Positions [B, S'] in the slots of those numbers, -1 where there is none."""
        return _positions_of(slots, self.slot_positions, self.lengths, batch)

    def products(self, start: Array) -> Array:
        """Products [Z, R, S'] of the queries with the keys of a block."""
        if isinstance(self.k, Encoded):
            return self.k.scores(self.q.astype(jnp.float32), start, self.size)
        k = lax.dynamic_slice_in_dim(self.k, start, self.size, 1)
        return jnp.einsum("zrh,zsh->zrs", self.q, k, **_PRODUCT)

    def sums(self, weights: Array, start: Array, positions: Array, at: Array) -> Array:
        """Weighted sums [Z, R, H] of the values of a block."""
        if isinstance(self.v, Encoded):
            return self.v.weighted_sum(weights, start, _used(self.v.shape[0], positions, at))
        v = lax.dynamic_slice_in_dim(self.v, start, self.size, 1)
        return _weighted(weights, _zeroed(v, positions, at))


def walk(spec: AttentionSpec, where: Any, positions: Array, first: Array, last: Array):
    """Output [Z, R, H] and log-sum-exp [Z, R] over the blocks `first` to `last` of `where`."""
    size = where.size

    def block(i, carry):
        out, m, l = carry
        # The last block is moved back to end with the buffer; what it repeats is masked.
        start = jnp.minimum(i * size, where.slots - size)
        numbers = start + jnp.arange(size, dtype=jnp.int32)
        at = where.at(numbers, positions.shape[0])
        at = jnp.where((numbers >= i * size)[None, :], at, -1)
        scores = _masked(spec, where.products(start), positions, at)
        new_m = jnp.maximum(m, jnp.max(scores, axis=-1))
        shift = jnp.where(jnp.isneginf(new_m), 0.0, new_m)
        weights = jnp.exp(scores - shift[..., None])
        alpha = jnp.exp(m - shift)
        out = out * alpha[..., None] + where.sums(weights, start, positions, at)
        return out, new_m, l * alpha + jnp.sum(weights, axis=-1)

    q = where.q
    out = jnp.zeros(q.shape, jnp.float32)
    nothing = jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    out, m, l = lax.fori_loop(
        first, last, block, (out, nothing, jnp.zeros(q.shape[:2], jnp.float32))
    )
    return out / jnp.where(l == 0, 1.0, l)[..., None], m + jnp.log(l)


def _walk(spec, q, k, v, positions, slot_positions, lengths):
    where = Slots(q, k, v, slot_positions, lengths)
    first, last = block_range(
        spec, positions, slot_positions, lengths, where.slots, min(BLOCK, where.slots)
    )
    return walk(spec, where, positions, first, last)


def block_range(spec, positions, slot_positions, lengths, slots, size=BLOCK):
    """First and one past the last block that any query of the pass can see."""
    count = -(-slots // size)  # one that is shorter than a block is one
    if slot_positions is not None:
        filled = slots if lengths is None else jnp.max(lengths)
        return jnp.int32(0), jnp.minimum(-(-filled // size), count).astype(jnp.int32)
    filled = jnp.max(positions) + 1
    if lengths is not None:
        filled = jnp.minimum(filled, jnp.max(lengths))
    last = jnp.minimum(-(-filled // size), count).astype(jnp.int32)
    if spec.window is None or spec.sinks:
        return jnp.int32(0), last
    earliest = jnp.min(jnp.where(positions < 0, slots, positions)) - spec.window + 1
    return jnp.clip(earliest // size, 0, last).astype(jnp.int32), last
