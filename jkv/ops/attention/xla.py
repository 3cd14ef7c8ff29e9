"""Attention over the cache for any device that XLA compiles for.

Two forms of the same sum. `_attend_at_once` scores all slots together: it is differentiable and
best where most of the buffer is filled. `_attend_by_blocks` walks over blocks of slots with an
online softmax, from the first block that a window reaches to the last that is filled, so that the
cost follows the filled length and not the buffer. `attend` takes the cheaper of the two at each
step. Derivatives of any order are those of `_attend_at_once`: a loop of traced length cannot be
differentiated in reverse.

Rows and heads are one axis inside, ``Z = B * K``: with two batch axes XLA reshapes between the
cache's update and the product, computes the update twice and copies the cache at every step.
"""

import functools
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from jkv._axes import Array
from jkv.ops.codecs import Encoded
from jkv.ops.codecs.base import PRODUCT
from jkv.ops.kv import ContiguousKV, Slots
from jkv.ops.masks import AttentionSpec, visible
from jkv.ops.partial import Partial

BLOCK = 128  # slots; measured on the CPU against 64, 256, 512 and 1024
FEW = 16  # new tokens up to which the scores over a whole buffer are small beside it

OutAndLse: TypeAlias = tuple[Array, Array]  # [Z, R, H] and [Z, R]


def attention(q: Array, kv: ContiguousKV, positions: Array, spec: AttentionSpec) -> Partial:
    """Attend to one buffer of slots per row, see `jkv.ops.attention`."""
    rows = rows_of(q, kv.kv_heads)
    slot_positions, lengths = kv.slot_positions, kv.lengths
    # Encoded tokens are decoded a block at a time, never all of them.
    encoded = isinstance(kv.k, Encoded) or isinstance(kv.v, Encoded)
    k, v = _flatten_heads(kv.k), _flatten_heads(kv.v)
    form = _attend_by_blocks if encoded else attend

    def plain(q: Array, k: Slots, v: Slots) -> OutAndLse:
        return form(spec, q, k, v, positions, slot_positions, lengths)

    def in_pairs(q: Array, k: Slots, v: Slots) -> OutAndLse:
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
    """Arrange queries [B, T, N, H] as [Z, R, H]; R counts groups first, then new tokens."""
    batch, new, heads, dim = q.shape
    groups = heads // kv_heads
    rows = q.reshape(batch, new, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    return rows.reshape(batch * kv_heads, groups * new, dim)


def partial_of(out: Array, lse: Array, q: Array) -> Partial:
    """Arrange [Z, R, H] and [Z, R] by the heads of q."""
    batch, new, heads, dim = q.shape
    kv_heads = out.shape[0] // batch
    groups = heads // kv_heads
    out = out.reshape(batch, kv_heads, groups, new, dim).transpose(0, 3, 1, 2, 4)
    lse = lse.reshape(batch, kv_heads, groups, new).transpose(0, 3, 1, 2)
    return Partial(out=out.reshape(q.shape), lse=lse.reshape(batch, new, heads))


def _flatten_heads(x: Slots) -> Slots:
    """Make rows and heads one axis."""
    return x.flatten_heads() if isinstance(x, Encoded) else x.reshape(-1, *x.shape[2:])


def _positions_of(
    slots: Array, slot_positions: Array | None, lengths: Array | None, batch: int
) -> Array:
    """Return the positions [B, S'] in slots of numbers `slots` [S'], -1 where they are empty."""
    if slot_positions is None:
        at = jnp.broadcast_to(slots[None, :], (batch, slots.shape[0]))
    else:
        at = lax.dynamic_slice_in_dim(slot_positions, slots[0], slots.shape[0], axis=1)
    if lengths is None:
        return at
    return jnp.where(slots[None, :] < lengths[:, None], at, -1)


def _scores(spec: AttentionSpec, q: Array, k: Array, positions: Array, at: Array) -> Array:
    """Compute masked scores [Z, R, S'] in float32."""
    return mask_scores(spec, jnp.einsum("zrh,zsh->zrs", q, k, **PRODUCT), positions, at)


def mask_scores(spec: AttentionSpec, products: Array, positions: Array, at: Array) -> Array:
    """Scale products, cap them, and mask what the queries do not see."""
    batch, new = positions.shape
    z, r, _ = products.shape
    scores = products * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    seen = visible(positions, at, window=spec.window, sinks=spec.sinks)
    seen = jnp.broadcast_to(seen[:, None, None], (batch, z // batch, r // new, *seen.shape[1:]))
    return jnp.where(seen.reshape(z, r, at.shape[1]), scores, -jnp.inf)


def zero_unseen(x: Array, positions: Array, at: Array) -> Array:
    """Replace keys or values [Z, S', H] that no query can see by zeros: zero times NaN is NaN."""
    used = used_slots(x.shape[0], positions, at)
    return jnp.where(used[..., None], x, jnp.zeros((), x.dtype))


def used_slots(lines: int, positions: Array, at: Array) -> Array:
    """Return which slots [Z, S'] some query can see."""
    batch = positions.shape[0]
    used = (at >= 0) & (at <= jnp.max(positions, axis=1)[:, None])
    used = jnp.broadcast_to(used[:, None], (batch, lines // batch, at.shape[1]))
    return used.reshape(lines, at.shape[1])


def weighted_sum(weights: Array, v: Array) -> Array:
    """Sum values with weights, rounded to their dtype."""
    return jnp.einsum("zrs,zsh->zrh", weights.astype(v.dtype), v, **PRODUCT)


def _attend_at_once(
    spec: AttentionSpec,
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    slot_positions: Array | None,
    lengths: Array | None,
    in_place: bool = False,
) -> OutAndLse:
    """Attend to all slots at once, reading the values in place where asked to."""
    at = _positions_of(
        jnp.arange(k.shape[1], dtype=jnp.int32), slot_positions, lengths, positions.shape[0]
    )
    weights, l, lse = softmax(_scores(spec, q, k, positions, at))
    if in_place:
        return weighted_sum_in_place(weights, v, positions, at) / l, lse
    return weighted_sum(weights, zero_unseen(v, positions, at)) / l, lse


def weighted_sum_in_place(weights: Array, v: Array, positions: Array, at: Array) -> Array:
    """Sum values with weights as if unseen ones were zero, without writing a copy of them.

    That copy is needed only if the product is NaN: a weight of zero removes any number but infinity
    and NaN by itself.
    """
    out = weighted_sum(weights, v)

    def zeroed(weights: Array, v: Array, out: Array) -> Array:
        del out
        lines = v.shape[0]

        # One line after another: for all at once there would be a second copy of all values, in
        # memory that is reserved whether this branch is taken or not.
        def line(z: Array) -> Array:
            row = z * positions.shape[0] // lines
            values = zero_unseen(v[z][None], positions[row][None], at[row][None])
            return weighted_sum(weights[z][None], values)[0]

        return lax.map(line, jnp.arange(lines, dtype=jnp.int32))

    return lax.cond(jnp.any(jnp.isnan(out)), zeroed, lambda w, v, out: out, weights, v, out)


def softmax(scores: Array) -> tuple[Array, Array, Array]:
    """Return weights [Z, R, S], l [Z, R, 1] (1 where nothing is seen) and log-sum-exp [Z, R]."""
    m = lax.stop_gradient(jnp.max(scores, axis=-1))
    m = jnp.where(jnp.isneginf(m), 0.0, m)
    weights = jnp.exp(scores - m[..., None])
    l = jnp.sum(weights, axis=-1)
    empty = l == 0
    l = jnp.where(empty, 1.0, l)
    return weights, l[..., None], jnp.where(empty, -jnp.inf, m + jnp.log(l))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(
    spec: AttentionSpec,
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    slot_positions: Array | None,
    lengths: Array | None,
) -> OutAndLse:
    """Attend at a cost that follows the filled length."""
    if k.shape[1] <= BLOCK:
        return _attend_at_once(spec, q, k, v, positions, slot_positions, lengths)

    def by_blocks(q: Array, k: Array, v: Array) -> OutAndLse:
        return _attend_by_blocks(spec, q, k, v, positions, slot_positions, lengths)

    def cheaper(q: Array, k: Array, v: Array) -> OutAndLse:
        # A block is sliced out of the cache, which costs as much again as reading it: where
        # about half of the buffer or more is to be read, one pass over all of it is quicker.
        first, last = block_range(spec, positions, slot_positions, lengths, k.shape[1])
        most = (last - first) * (BLOCK * 5) >= k.shape[1] * 2

        def at_once(q: Array, k: Array, v: Array) -> OutAndLse:
            return _attend_at_once(spec, q, k, v, positions, slot_positions, lengths, in_place=True)

        return lax.cond(most, at_once, by_blocks, q, k, v)

    few = positions.shape[1] <= FEW
    return lax.platform_dependent(q, k, v, cpu=cheaper if few else by_blocks, default=by_blocks)


@attend.defjvp
def _attend_jvp(
    spec: AttentionSpec, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[OutAndLse, OutAndLse]:
    q, k, v, positions, slot_positions, lengths = primals
    at = _positions_of(
        jnp.arange(k.shape[1], dtype=jnp.int32), slot_positions, lengths, positions.shape[0]
    )

    def at_once(q: Array, k: Array, v: Array) -> OutAndLse:
        # The scores of slots where no query can look are masked, their derivatives are not: zero
        # times the NaN of an empty slot would be the query's.
        k = zero_unseen(k, positions, at)
        return _attend_at_once(spec, q, k, v, positions, slot_positions, lengths)

    return jax.jvp(at_once, (q, k, v), tangents[:3])


@runtime_checkable
class Blocks(Protocol):
    """Where `walk` reads: keys and values a block at a time, and the queries."""

    @property
    def q(self) -> Array:
        """Queries [Z, R, H]."""
        ...

    @property
    def slots(self) -> int:
        """All slots."""
        ...

    @property
    def size(self) -> int:
        """Slots of a block."""
        ...

    def at(self, slots: Array, batch: int) -> Array:
        """Return the positions [B, S'] in slots of these numbers, -1 where they are empty."""
        ...

    def products(self, start: Array) -> Array:
        """Multiply the queries with the keys of a block to [Z, R, S']."""
        ...

    def sums(self, weights: Array, start: Array, positions: Array, at: Array) -> Array:
        """Sum the values of a block with weights to [Z, R, H]."""
        ...


class ContiguousBlocks(NamedTuple):
    """Keys and values [Z, S, H], arrays or encoded, which `walk` reads a block at a time."""

    q: Array  # [Z, R, H]
    k: Slots
    v: Slots
    slot_positions: Array | None  # [B, S]
    lengths: Array | None  # [B]

    @property
    def slots(self) -> int:
        """All slots."""
        return self.k.shape[1]

    @property
    def size(self) -> int:
        """Slots of a block."""
        return min(BLOCK, self.slots)

    def at(self, slots: Array, batch: int) -> Array:
        """Return the positions [B, S'] in slots of these numbers, -1 where they are empty."""
        return _positions_of(slots, self.slot_positions, self.lengths, batch)

    def products(self, start: Array) -> Array:
        """Multiply the queries with the keys of a block to [Z, R, S']."""
        if isinstance(self.k, Encoded):
            return self.k.scores(self.q.astype(jnp.float32), start, self.size)
        k = lax.dynamic_slice_in_dim(self.k, start, self.size, 1)
        return jnp.einsum("zrh,zsh->zrs", self.q, k, **PRODUCT)

    def sums(self, weights: Array, start: Array, positions: Array, at: Array) -> Array:
        """Sum the values of a block with weights to [Z, R, H]."""
        if isinstance(self.v, Encoded):
            return self.v.weighted_sum(weights, start, used_slots(self.v.shape[0], positions, at))
        v = lax.dynamic_slice_in_dim(self.v, start, self.size, 1)
        return weighted_sum(weights, zero_unseen(v, positions, at))


def walk(
    spec: AttentionSpec, where: Blocks, positions: Array, first: Array, last: Array
) -> OutAndLse:
    """Attend to the blocks `first` to `last` of `where` with an online softmax."""
    size = where.size

    def block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, m, l = carry
        # The last block is moved back to end with the buffer; what it repeats is masked.
        start = jnp.minimum(i * size, where.slots - size)
        numbers = start + jnp.arange(size, dtype=jnp.int32)
        at = where.at(numbers, positions.shape[0])
        at = jnp.where((numbers >= i * size)[None, :], at, -1)
        scores = mask_scores(spec, where.products(start), positions, at)
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


def _attend_by_blocks(
    spec: AttentionSpec,
    q: Array,
    k: Slots,
    v: Slots,
    positions: Array,
    slot_positions: Array | None,
    lengths: Array | None,
) -> OutAndLse:
    where = ContiguousBlocks(q, k, v, slot_positions, lengths)
    first, last = block_range(
        spec, positions, slot_positions, lengths, where.slots, min(BLOCK, where.slots)
    )
    return walk(spec, where, positions, first, last)


def block_range(
    spec: AttentionSpec,
    positions: Array,
    slot_positions: Array | None,
    lengths: Array | None,
    slots: int,
    size: int = BLOCK,
) -> tuple[Array, Array]:
    """Return the first block that any query of the pass can see, and one past the last."""
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
