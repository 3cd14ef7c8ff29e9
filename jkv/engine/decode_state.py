"""The device's side of the engine: the state of the lanes, and the compiled steps over it.

A lane is a row of the decode step. What belongs to it lives on the device (its block tables, its
last token, its sampler's state), so that the next step can be dispatched before the tokens of the
last one have been read. Pages have no rows: any lanes may share a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jkv._axes import Array
from jkv._pytree import pytree, replace
from jkv.cache import sharding
from jkv.cache.base import Cache
from jkv.cache.block_table import BlockTables
from jkv.decoding import loop, sampling
from jkv.decoding.apply import apply, init_state
from jkv.decoding.arguments import DecoderLike
from jkv.decoding.faults import undrawable
from jkv.decoding.prompts import PAD
from jkv.decoding.transform import Transform
from jkv.engine.page_transfer import Layers

Given = Array | np.ndarray | np.generic  # on the device, or given to it by the host


@pytree
class DecodeState:
    """The state of W lanes."""

    tables: tuple[Array, ...]  # per group of layers [W, M] int32
    lengths: Array  # [W] int32, tokens in the cache
    token: Array  # [W] int32, generated last, PAD before the first
    active: Array  # [W] bool, generates
    remaining: Array  # [W] int32, tokens that it may still generate
    stop_ids: Array  # [W, E] int32, tokens at which it ends
    keys: Array  # [W, 2] uint32, data of threefry keys: typed ones would count as drawn from twice
    group: Array  # [W] int32, its sampler's place in `samplers`, -1 for the likeliest token
    samplers: tuple[Transform, ...] = ()  # one for each structure in use, its leaves [W, ...]
    sampler_states: tuple[PyTree, ...] = ()  # as for a batch of one, leaves [W, ...]


@pytree
class SamplerStart:
    """A request's sampler, and what its state follows from."""

    sampler: Transform
    prompt: Array | np.ndarray  # [T] int32, PAD after it
    generated: Array | np.ndarray  # [T] int32, PAD after them
    updates: Given  # int32, updates that the state had


@pytree
class LaneStart:
    """The state of one lane when a request gets it: as in `DecodeState`, without the first axis."""

    tables: tuple[Given, ...]
    lengths: Given
    token: Given
    active: Given
    remaining: Given
    stop_ids: Given
    keys: Given
    sampler: SamplerStart | None  # None for the likeliest token


# Flags of a row in the last column of a step's output, added up: the row does not generate any
# more; it had no page for a token; NaN or infinity was given to pages that cannot hold them; its
# next token could not be drawn because of the model's logits, or of what the sampler made of them.
ENDED, NO_PAGE, NONFINITE_PAGE, NONFINITE_LOGITS, NONE_ALLOWED = 1, 2, 4, 8, 16


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_state_jit(
    width: int, columns: tuple[int, ...], stop_ids: int, mesh: Mesh | None
) -> DecodeState:
    """Make lanes without requests.

    Args:
        width: W.
        columns: of each group's block table.
        stop_ids: E.
        mesh: of the model's devices.
    """
    state = DecodeState(
        tables=tuple(jnp.full((width, m), -1, jnp.int32) for m in columns),
        lengths=jnp.zeros((width,), jnp.int32),
        token=jnp.zeros((width,), jnp.int32),
        active=jnp.zeros((width,), bool),
        remaining=jnp.zeros((width,), jnp.int32),
        stop_ids=jnp.full((width, stop_ids), -2, jnp.int32),
        keys=jnp.zeros((width, 2), jnp.uint32),
        group=jnp.full((width,), -1, jnp.int32),
    )
    return replicate(state, mesh)


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def add_sampler_jit(
    state: DecodeState, sampler: Transform, vocab: int, context: int
) -> DecodeState:
    """Add a structure of samplers, for rows of at most `context` tokens."""
    width = state.lengths.shape[0]
    no_tokens = jnp.full((1, context), PAD, jnp.int32)

    def repeat(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        return jnp.broadcast_to(leaf, (width, *leaf.shape)).copy()

    first = init_state(sampler, no_tokens, vocab)
    return replace(
        state,
        samplers=(*state.samplers, jax.tree.map(repeat, sampler)),
        sampler_states=(*state.sampler_states, jax.tree.map(repeat, first)),
    )


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=0)
def install_jit(
    state: DecodeState, group: int, vocab: int, lane: Array, start: LaneStart
) -> DecodeState:
    """Put a request into a lane.

    Args:
        state: donated.
        group: its sampler's place in `state.samplers`, -1 for the likeliest token.
        vocab: V.
        lane: int32; W changes nothing.
        start: the lane's values.
    """

    def put(old: Array, new: Any) -> Array:
        return old.at[lane].set(new)

    samplers, sampler_states = state.samplers, state.sampler_states
    if start.sampler is not None:
        new = start.sampler.sampler
        samplers = _put_at(samplers, group, put, new)
        sampler_states = _put_at(sampler_states, group, put, _state_after(start.sampler, vocab))
    return replace(
        state,
        tables=tuple(map(put, state.tables, start.tables)),
        lengths=put(state.lengths, start.lengths),
        token=put(state.token, start.token),
        active=put(state.active, start.active),
        remaining=put(state.remaining, start.remaining),
        stop_ids=put(state.stop_ids, start.stop_ids),
        keys=put(state.keys, start.keys),
        group=put(state.group, group),
        samplers=samplers,
        sampler_states=sampler_states,
    )


def _state_after(start: SamplerStart, vocab: int) -> PyTree:
    """Return a sampler's state after its prompt and updates, the first of which has no token."""
    zeros = jnp.zeros((1, vocab), jnp.float32)
    generated = jnp.asarray(start.generated)
    after = jnp.concatenate([jnp.full((1,), PAD, generated.dtype), generated])

    def body(i: Array, state: PyTree) -> PyTree:
        return apply(start.sampler, zeros, state, after[i][None])[1]

    first = init_state(start.sampler, jnp.asarray(start.prompt)[None], vocab)
    return lax.fori_loop(0, start.updates, body, first)


def _put_at(
    trees: tuple[PyTree, ...], i: int, put: Callable[[Array, Any], Array], new: PyTree
) -> tuple[PyTree, ...]:
    return (*trees[:i], jax.tree.map(put, trees[i], new), *trees[i + 1 :])


class GraphDef:
    """A model's structure without its weights, compared by identity: `jit` does that at no cost.

    A step is dispatched in less time than it takes to walk through the model's modules.
    """

    def __init__(self, tree: Any):
        self.tree = tree

    def merge(self, weights: list[Array]) -> Any:  # the model, of the class that was split
        """Return the model with these weights."""
        return jax.tree.unflatten(self.tree, weights)


_graphdef = functools.cache(GraphDef)  # equal models have one, and share programs


def split_weights(model: DecoderLike) -> tuple[GraphDef, list[Array]]:
    """Split a model into its structure and its weights."""
    weights, tree = jax.tree.flatten(model)
    return _graphdef(tree), weights


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def decode_jit(
    size: int,
    graphdef: GraphDef,
    weights: list[Array],
    layers: Layers,
    state: DecodeState,
    batch: Array,
) -> tuple[Layers, DecodeState, Array]:
    """Generate at most `size` tokens in each active lane among R.

    What passes between host and device is one array each way: the number of arrays costs more than
    what is in them.

    Args:
        size: tokens at most.
        graphdef: of a decoder.
        weights: of it.
        layers: of the paged cache, donated.
        state: donated.
        batch: ``[R, 1 + G (1 + n)]`` int32: the lanes, W and more for none; and for each of G
            groups the pages that are new since the last step: their first column in the lane's
            block table, and their numbers, -1 for none.

    Returns:
        The layers; the state; and the output, ``[R, size + 1]`` int32: tokens, PAD for none, and
        the flags.
    """
    model, lane_ids, rows = graphdef.merge(weights), batch[:, 0], _gather_rows(state, batch)
    width = lane_ids.shape[0]
    rows = replace(rows, active=rows.active & (lane_ids < state.active.shape[0]))
    tokens = jnp.full((size, width), PAD, jnp.int32)

    def unfinished(carry: Any) -> Array:
        i, _, rows, _, _ = carry
        return (i < size) & jnp.any(rows.active)

    def body(carry: Any) -> Any:
        i, layers, rows, tokens, flags = carry
        cache = _cache(layers, rows)
        logits, cache = loop.decode_step(model, rows.token, cache, rows.active)
        rows = replace(rows, lengths=cache.lengths)
        rows, token, faults = _sample(logits, rows, rows.active, rows.token)
        tokens = lax.dynamic_update_index_in_dim(tokens, token, i, 0)
        flags = flags | faults | jnp.where(cache.overflowed, NO_PAGE, 0)
        return i + 1, cache.layers, rows, tokens, flags

    carry = (jnp.int32(0), layers, rows, tokens, jnp.zeros((width,), jnp.int32))
    _, layers, rows, tokens, flags = lax.while_loop(unfinished, body, carry)
    output = _pack_output(tokens.T, layers, rows, flags)
    return *_place(model, layers, _scatter_rows(state, lane_ids, rows)), output


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def prefill_jit(
    graphdef: GraphDef,
    weights: list[Array],
    layers: Layers,
    state: DecodeState,
    batch: Array,
    tokens: Array,
    counts: Array,
    last: Array,
) -> tuple[Layers, DecodeState, Array]:
    """Prefill one chunk of R prompts, and draw the first token of those that end with it.

    Args:
        graphdef: of a decoder.
        weights: of it.
        layers: of the paged cache, donated.
        state: donated.
        batch: as of `decode_jit`.
        tokens: ``[R, T]`` int32.
        counts: ``[R]`` int32, how many of them are real.
        last: ``[R]`` bool, the prompt ends with them.

    Returns:
        As of `decode_jit`, of one token.
    """
    model, rows = graphdef.merge(weights), _gather_rows(state, batch)
    hidden, cache = model.hidden(tokens, _cache(layers, rows), counts)
    ending = jnp.maximum(counts - 1, 0)[:, None, None]
    logits = model.logits(jnp.take_along_axis(hidden, ending, axis=1)[:, 0])
    rows = replace(rows, lengths=cache.lengths)
    rows, token, flags = _sample(logits, rows, last, rows.token)
    flags = flags | jnp.where(cache.overflowed, NO_PAGE, 0)
    output = _pack_output(token[:, None], cache.layers, rows, flags)
    return *_place(model, cache.layers, _scatter_rows(state, batch[:, 0], rows)), output


def _place(model: DecoderLike, layers: Layers, state: DecodeState) -> tuple[Layers, DecodeState]:
    """Shard a step's results as its arguments are: the next step is then the same program."""
    mesh = sharding.mesh_of(model)
    return sharding.shard_layers(layers, mesh), replicate(state, mesh)


def replicate(state: DecodeState, mesh: Mesh | None) -> DecodeState:
    """Replicate the state on every device of a mesh, if there is one."""
    if mesh is None:
        return state
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, whole), state)


def _gather_rows(state: DecodeState, batch: Array) -> DecodeState:
    """Gather the lanes of a step, with their new pages; a row without a lane gets any values."""
    rows = jax.tree.map(lambda leaf: leaf.at[batch[:, 0]].get(mode="clip"), state)
    new_pages = jnp.split(batch[:, 1:], len(rows.tables), axis=1)
    return replace(rows, tables=tuple(map(_append_pages, rows.tables, new_pages)))


def _scatter_rows(state: DecodeState, lane_ids: Array, rows: DecodeState) -> DecodeState:
    return jax.tree.map(lambda all_, row: all_.at[lane_ids].set(row, mode="drop"), state, rows)


def _cache(layers: Layers, rows: DecodeState) -> Cache:
    return Cache(
        layers=layers,
        lengths=rows.lengths,
        overflowed=jnp.zeros(rows.lengths.shape, bool),
        shared=(BlockTables(rows.tables),),
    )


def _pack_output(tokens: Array, layers: Layers, rows: DecodeState, flags: Array) -> Array:
    """Pack tokens [R, n] and the rows' flags into one array ``[R, n + 1]``."""
    flags = flags | jnp.where(rows.active, 0, ENDED)
    flags = flags | jnp.where(_has_nonfinite_page(layers, rows), NONFINITE_PAGE, 0)
    return jnp.concatenate([tokens, flags[:, None]], axis=1)


def _has_nonfinite_page(layers: Layers, rows: DecodeState) -> Array:
    """Whether a row has a page that was given NaN or infinity, ``[R]``."""
    found = jnp.zeros(rows.lengths.shape, bool)
    for layer in layers:
        if layer.nonfinite is not None:
            table = rows.tables[layer.group]
            page = layer.k_pages.shape[2]
            first = jnp.arange(table.shape[1], dtype=jnp.int32)[None] * page
            here = (table >= 0) & (first < rows.lengths[:, None])
            found |= jnp.any(here & layer.nonfinite[jnp.maximum(table, 0)], axis=1)
    return found


def _append_pages(table: Array, new_pages: Array) -> Array:
    """Write new pages [R, 1 + n] into a block table [R, M], from the given column on."""
    pages = new_pages[:, 1:]
    rows = jnp.arange(table.shape[0], dtype=jnp.int32)[:, None]
    columns = new_pages[:, :1] + jnp.arange(pages.shape[1], dtype=jnp.int32)[None]
    columns = jnp.where(pages >= 0, columns, table.shape[1])
    return table.at[rows, columns].set(pages, mode="drop")


def _sample(
    logits: Array, rows: DecodeState, drawn: Array, after: Array
) -> tuple[DecodeState, Array, Array]:
    """Draw a token [R] for the rows in `drawn`, each as it would alone; PAD for the others.

    A row that has nothing to draw from ends, with the flag `NONFINITE_LOGITS` or `NONE_ALLOWED`.

    Args:
        logits: ``[R, V]``.
        rows: their lengths are the positions of what is drawn.
        drawn: ``[R]`` bool.
        after: ``[R]``, the generated token that the logits follow, PAD where there is none.

    Returns:
        The rows after it, the tokens, and the flags ``[R]`` int32.
    """
    changed, states = logits, []
    random = jnp.zeros(drawn.shape, bool)
    for i, (sampler, state) in enumerate(zip(rows.samplers, rows.sampler_states, strict=True)):
        mine = drawn & (rows.group == i)
        out, new = jax.vmap(_apply_one)(sampler, logits, state, after)
        changed = jnp.where(mine[:, None], out, changed)
        states.append(jax.tree.map(functools.partial(_select, mine), new, state))
        if sampling.needs_key(sampler):
            random = random | mine
    token = sampling.likeliest(changed)
    if any(map(sampling.needs_key, rows.samplers)):
        keys = jax.random.wrap_key_data(rows.keys, impl=sampling.THREEFRY)
        token = jnp.where(random, sampling.draw(changed, keys, rows.lengths), token)
    remaining = rows.remaining - 1
    goes_on = (remaining > 0) & ~jnp.any(token[:, None] == rows.stop_ids, axis=1)
    masked = jnp.where(undrawable(changed), NONE_ALLOWED, 0)
    flags = jnp.where(undrawable(logits), NONFINITE_LOGITS, masked)
    flags = jnp.where(drawn, flags, 0).astype(jnp.int32)
    valid = drawn & (flags == 0)
    rows = replace(
        rows,
        token=jnp.where(valid, token, rows.token),
        remaining=jnp.where(valid, remaining, rows.remaining),
        active=jnp.where(drawn, goes_on & valid, rows.active),
        sampler_states=tuple(states),
    )
    return rows, jnp.where(valid, token, PAD), flags


def _apply_one(
    sampler: Transform, logits: Array, state: PyTree, token: Array
) -> tuple[Array, PyTree]:
    changed, state = apply(sampler, logits[None], state, token[None])
    return changed[0], state


def _select(rows: Array, new: Array, old: Array) -> Array:
    return jnp.where(rows.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
