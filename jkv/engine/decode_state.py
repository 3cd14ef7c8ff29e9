"""The device's side of the engine: lanes that requests run in, and the two programs over them.

A lane is a row of the decode step. What belongs to it lives on the device (its block table, its
last token, its sampler's state), so that the next step can be dispatched before the last one's
tokens have been read. The pages have no rows: any lanes may share a pass.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jkv._axes import Array
from jkv._pytree import pytree, replace
from jkv.cache import heads
from jkv.cache.base import Cache
from jkv.decoding import loop, sampling
from jkv.decoding.apply import apply, init_state
from jkv.decoding.faults import undrawable
from jkv.decoding.prompts import PAD


@pytree
class DecodeState:
    """What the device knows of W lanes."""

    tables: tuple[Array, ...]  # per group of layers [W, M] int32
    lengths: Array  # [W] int32, tokens in the cache
    token: Array  # [W] int32, generated last, PAD before the first
    active: Array  # [W] bool, says tokens
    left: Array  # [W] int32, tokens that it may still say
    ends: Array  # [W, E] int32, tokens at which it ends
    keys: Array  # [W, 2] uint32, data of threefry keys: typed ones would count as drawn from twice
    group: Array  # [W] int32, its sampler's place in `samplers`, -1 for the likeliest token
    samplers: tuple[Any, ...] = ()  # one for each structure in use, its leaves [W, ...]
    states: tuple[Any, ...] = ()  # their states as for a batch of one, leaves [W, ...]


# What the last column of a pass's result says of a row, together: that it is not active any more;
# that it had no page for its token, which its keeper should have seen to; that its pages were
# given NaN or infinity that they cannot hold; and that there was nothing to draw its next token
# from, by the model's logits or by what its sampler made of them.
ENDED, REFUSED, BROKEN, NONFINITE, MASKED = 1, 2, 4, 8, 16


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty(width: int, columns: tuple[int, ...], ends: int, mesh: Any) -> DecodeState:
    """Lanes without requests, with tables of so many columns."""
    lanes = DecodeState(
        tables=tuple(jnp.full((width, m), -1, jnp.int32) for m in columns),
        lengths=jnp.zeros((width,), jnp.int32),
        token=jnp.zeros((width,), jnp.int32),
        active=jnp.zeros((width,), bool),
        left=jnp.zeros((width,), jnp.int32),
        ends=jnp.full((width, ends), -2, jnp.int32),
        keys=jnp.zeros((width, 2), jnp.uint32),
        group=jnp.full((width,), -1, jnp.int32),
    )
    return everywhere(lanes, mesh)


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def with_sampler(lanes: DecodeState, sampler: Any, vocab: int, context: int) -> DecodeState:
    """Lanes that know one more structure of samplers, for rows of at most `context` tokens."""
    width = lanes.lengths.shape[0]
    nothing = jnp.full((1, context), PAD, jnp.int32)

    def wide(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        return jnp.broadcast_to(leaf, (width, *leaf.shape)).copy()

    return replace(
        lanes,
        samplers=(*lanes.samplers, jax.tree.map(wide, sampler)),
        states=(*lanes.states, jax.tree.map(wide, init_state(sampler, nothing, vocab))),
    )


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=0)
def install_jit(
    lanes: DecodeState, group: int, vocab: int, at: Array, what: dict[str, Any]
) -> DecodeState:
    """Lanes with a request in lane `at`.

    Args:
        lanes: donated.
        group: its sampler's place in `lanes.samplers`, -1 for the likeliest token.
        vocab: V.
        at: the lane, int32.
        what: the lane's values of the fields of `DecodeState` up to `keys`; with a sampler,
            `sampler`, `prompt` [T], `generated` [T], -1 after each, and how many `updates` the
            sampler had.
    """

    def put(old: Array, new: Any) -> Array:
        return old.at[at].set(new)

    plain = ("lengths", "token", "active", "left", "ends", "keys")
    changes: dict[str, Any] = {name: put(getattr(lanes, name), what[name]) for name in plain}
    changes["tables"] = tuple(map(put, lanes.tables, what["tables"]))
    changes["group"] = put(lanes.group, group)
    if group >= 0:
        sampler = what["sampler"]
        state = _state_after(sampler, what["prompt"], what["generated"], what["updates"], vocab)
        changes["samplers"] = _with(lanes.samplers, group, put, sampler)
        changes["states"] = _with(lanes.states, group, put, state)
    return replace(lanes, **changes)


def _state_after(sampler: Any, prompt: Array, generated: Array, updates: Array, vocab: int) -> Any:
    """A sampler's state after a prompt [T] and so many updates, the first of which has no token."""
    nothing = jnp.zeros((1, vocab), jnp.float32)
    after = jnp.concatenate([jnp.full((1,), PAD, generated.dtype), generated])

    def body(i: Array, state: Any) -> Any:
        return apply(sampler, nothing, state, after[i][None])[1]

    return lax.fori_loop(0, updates, body, init_state(sampler, prompt[None], vocab))


def _with(parts: tuple[Any, ...], i: int, put: Any, new: Any) -> tuple[Any, ...]:
    return (*parts[:i], jax.tree.map(put, parts[i], new), *parts[i + 1 :])


class GraphDef:
    """A model without its weights, known by itself: for `jit` to compare at no cost.

    A step is dispatched in less time than it takes to walk through the model's modules.
    """

    def __init__(self, tree: Any):
        self.tree = tree

    def model(self, weights: list[Array]) -> Any:
        """The model with these weights."""
        return jax.tree.unflatten(self.tree, weights)


_frame = functools.cache(GraphDef)  # equal models have one, and share programs


def split_weights(model: Any) -> tuple[GraphDef, list[Array]]:
    """A model as its frame and its weights."""
    weights, tree = jax.tree.flatten(model)
    return _frame(tree), weights


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def decode_jit(
    size: int,
    frame: GraphDef,
    weights: list[Array],
    layers: tuple[Any, ...],
    lanes: DecodeState,
    who: Array,
) -> tuple[tuple[Any, ...], DecodeState, Array]:
    """At most `size` tokens of each active lane among R.

    What the host gives and gets is one array each: arrays cost more than what is in them.

    Args:
        size: tokens at most.
        frame: of a decoder.
        weights: of it.
        layers: of the paged cache, donated.
        lanes: donated.
        who: ``[R, 1 + G (1 + n)]`` int32: the lanes, those whose requests still want tokens, W and
            more are nobody; and for each group the pages that they got since the last pass, after
            the column where those begin in the lane's table, -1 for none.

    Returns:
        Layers; lanes; and ``[R, size + 1]`` int32: tokens, -1 where none, and what `ENDED` and
        those beside it say.
    """
    model, at, rows = frame.model(weights), who[:, 0], _rows(lanes, who)
    width = at.shape[0]
    rows = replace(rows, active=rows.active & (at < lanes.active.shape[0]))
    said = jnp.full((size, width), PAD, jnp.int32)

    def going(carry: Any) -> Array:
        i, _, rows, _, _ = carry
        return (i < size) & jnp.any(rows.active)

    def body(carry: Any) -> Any:
        i, layers, rows, said, marks = carry
        cache = _cache(layers, rows)
        logits, cache = loop.decode_step(model, rows.token, cache, rows.active)
        rows = replace(rows, lengths=cache.lengths)
        rows, token, faults = _choose(logits, rows, rows.active, rows.token)
        said = lax.dynamic_update_index_in_dim(said, token, i, 0)
        marks = marks | faults | jnp.where(cache.overflowed, REFUSED, 0)
        return i + 1, cache.layers, rows, said, marks

    carry = (jnp.int32(0), layers, rows, said, jnp.zeros((width,), jnp.int32))
    _, layers, rows, said, marks = lax.while_loop(going, body, carry)
    told = _told(said.T, layers, rows, marks)
    return *_placed(model, layers, _with_rows(lanes, at, rows)), told


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def prefill_jit(
    frame: GraphDef,
    weights: list[Array],
    layers: tuple[Any, ...],
    lanes: DecodeState,
    who: Array,
    tokens: Array,
    counts: Array,
    last: Array,
) -> tuple[tuple[Any, ...], DecodeState, Array]:
    """One chunk of the prompts of R lanes, and the first token of those that are through.

    Args:
        frame: of a decoder.
        weights: of it.
        layers: of the paged cache, donated.
        lanes: donated.
        who: as of `decode_jit`.
        tokens: ``[R, T]`` int32.
        counts: ``[R]`` int32, how many of them are real.
        last: ``[R]`` bool, the prompt ends with them.

    Returns:
        As of `decode_jit`, of one token.
    """
    model, rows = frame.model(weights), _rows(lanes, who)
    hidden, cache = model.hidden(tokens, _cache(layers, rows), counts)
    ending = jnp.maximum(counts - 1, 0)[:, None, None]
    logits = model.logits(jnp.take_along_axis(hidden, ending, axis=1)[:, 0])
    rows = replace(rows, lengths=cache.lengths)
    rows, token, marks = _choose(logits, rows, last, rows.token)
    marks = marks | jnp.where(cache.overflowed, REFUSED, 0)
    told = _told(token[:, None], cache.layers, rows, marks)
    return *_placed(model, cache.layers, _with_rows(lanes, who[:, 0], rows)), told


def _placed(
    model: Any, layers: tuple[Any, ...], lanes: DecodeState
) -> tuple[tuple[Any, ...], DecodeState]:
    """What the next pass is given lies as what this one was given: it is the same program."""
    mesh = heads.mesh_of(model)
    return heads.parted(layers, mesh), everywhere(lanes, mesh)


def everywhere(lanes: DecodeState, mesh: Any) -> DecodeState:
    """On every device of a mesh, if there is one."""
    if mesh is None:
        return lanes
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, whole), lanes)


def _rows(lanes: DecodeState, who: Array) -> DecodeState:
    """The lanes of a pass, with the pages that they got; anything for those that are nobody."""
    rows = jax.tree.map(lambda leaf: leaf.at[who[:, 0]].get(mode="clip"), lanes)
    grown = jnp.split(who[:, 1:], len(rows.tables), axis=1)
    return replace(rows, tables=tuple(map(_extended, rows.tables, grown)))


def _with_rows(lanes: DecodeState, at: Array, rows: DecodeState) -> DecodeState:
    return jax.tree.map(lambda whole, part: whole.at[at].set(part, mode="drop"), lanes, rows)


def _cache(layers: tuple[Any, ...], rows: DecodeState) -> Cache:
    return Cache(
        layers=layers,
        lengths=rows.lengths,
        overflowed=jnp.zeros(rows.lengths.shape, bool),
        tables=rows.tables,
    )


def _told(said: Array, layers: tuple[Any, ...], rows: DecodeState, marks: Array) -> Array:
    """Tokens [R, n] and what there is to say of their rows, ``[R, n + 1]``."""
    marks = marks | jnp.where(rows.active, 0, ENDED)
    marks = marks | jnp.where(_broken(layers, rows), BROKEN, 0)
    return jnp.concatenate([said, marks[:, None]], axis=1)


def _broken(layers: tuple[Any, ...], rows: DecodeState) -> Array:
    """Whether a row has a page that was given what no code can hold, ``[R]``."""
    found = jnp.zeros(rows.lengths.shape, bool)
    for layer in layers:
        if layer.broken is not None:
            table = rows.tables[layer.group]
            page = layer.k_pages.shape[2]
            first = jnp.arange(table.shape[1], dtype=jnp.int32)[None] * page
            here = (table >= 0) & (first < rows.lengths[:, None])
            found |= jnp.any(here & layer.broken[jnp.maximum(table, 0)], axis=1)
    return found


def _extended(table: Array, grown: Array) -> Array:
    """A table [R, M] with new pages from a column on, [R, 1 + n]."""
    pages = grown[:, 1:]
    rows = jnp.arange(table.shape[0], dtype=jnp.int32)[:, None]
    columns = grown[:, :1] + jnp.arange(pages.shape[1], dtype=jnp.int32)[None]
    columns = jnp.where(pages >= 0, columns, table.shape[1])
    return table.at[rows, columns].set(pages, mode="drop")


def _choose(
    logits: Array, rows: DecodeState, who: Array, after: Array
) -> tuple[DecodeState, Array, Array]:
    """Draw a token [R] for the lanes in `who`, each as it would alone; PAD for the others.

    A lane that has nothing to draw from ends. The last result says so, ``[R]`` int32: 0, or
    `NONFINITE`, or `MASKED`.

    Args:
        logits: ``[R, V]``.
        rows: their lengths are the positions of what is drawn.
        who: ``[R]`` bool.
        after: ``[R]``, the generated token that the logits follow, PAD where there is none.
    """
    changed, states = logits, []
    random = jnp.zeros(who.shape, bool)
    for i, (sampler, state) in enumerate(zip(rows.samplers, rows.states, strict=True)):
        mine = who & (rows.group == i)
        out, new = jax.vmap(_one)(sampler, logits, state, after)
        changed = jnp.where(mine[:, None], out, changed)
        states.append(jax.tree.map(functools.partial(_where, mine), new, state))
        if sampling.needs_key(sampler):
            random = random | mine
    token = sampling.likeliest(changed)
    if any(map(sampling.needs_key, rows.samplers)):
        keys = jax.random.wrap_key_data(rows.keys, impl=sampling.THREEFRY)
        token = jnp.where(random, sampling.draw(changed, keys, rows.lengths), token)
    left = rows.left - 1
    goes_on = (left > 0) & ~jnp.any(token[:, None] == rows.ends, axis=1)
    marks = jnp.where(undrawable(logits), NONFINITE, jnp.where(undrawable(changed), MASKED, 0))
    marks = jnp.where(who, marks, 0).astype(jnp.int32)
    said = who & (marks == 0)
    rows = replace(
        rows,
        token=jnp.where(said, token, rows.token),
        left=jnp.where(said, left, rows.left),
        active=jnp.where(who, goes_on & said, rows.active),
        states=tuple(states),
    )
    return rows, jnp.where(said, token, PAD), marks


def _one(sampler: Any, logits: Array, state: Any, token: Array) -> tuple[Array, Any]:
    changed, state = apply(sampler, logits[None], state, token[None])
    return changed[0], state


def _where(who: Array, new: Array, old: Array) -> Array:
    return jnp.where(who.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
