"""Fingerprints: 32 bytes over all that keys and values depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jkv._axes import Array
from jkv._stored_names import written_fields, written_name
from jkv._transfer import transfers
from jkv.cache.protocol import CacheKind

# Arrays never change, so what was computed of the very same ones still holds.
_known: list[tuple[tuple[Any, ...], bytes]] = []
_KEPT = 8  # models


@runtime_checkable
class Configured(Protocol):
    """A model with a configuration."""

    @property
    def config(self) -> object:
        """Its shape and mathematics."""
        ...


@transfers
def fingerprint(model: object, kind: CacheKind | None = None) -> bytes:
    """SHA-256 over the weights' checksums, the configuration and a kind of cache.

    A weight's checksum has 64 bits and is computed where it lies, at the speed of the memory: it
    tells other weights from these, but does not protect against deliberate collisions.

    Args:
        model: a pytree of weights: a decoder, or a model or parameters of one's own. What has no
            `config`, a frozen dataclass, is told from others by its weights alone.
        kind: of cache, such as `jkv.dense()`.
    """
    config = model.config if isinstance(model, Configured) else None
    if not dataclasses.is_dataclass(config):  # its repr may be another in each process
        config = None
    return fingerprint_of(tuple(jax.tree.leaves(model)), config, kind)


@transfers
def fingerprint_of(
    weights: tuple[Any, ...], config: object, kind: CacheKind | None = None
) -> bytes:
    """Return the fingerprint of a model that has these weights and this configuration."""
    whole = hashlib.sha256(checksum(weights))
    for part in (config, kind):
        text = describe(part).encode()
        whole.update(len(text).to_bytes(8, "big") + text)
    return whole.digest()


def describe(value: object) -> str:
    """Describe a value as every process and version does: functions by name, not by address."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [
            f"{written}={describe(getattr(value, name))}"
            for name, written in written_fields(type(value))
        ]
        return f"{written_name(type(value)).partition(':')[2]}({', '.join(parts)})"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(describe, value))}]"
    if callable(value) and hasattr(value, "__qualname__"):
        return written_name(value)
    return repr(value)


def checksum(leaves: tuple[Any, ...]) -> bytes:
    """SHA-256 over the weights' checksums, dtypes and shapes."""
    for refs, digest in _known:
        if len(refs) == len(leaves) and all(r() is x for r, x in zip(refs, leaves, strict=True)):
            return digest
    sums = np.stack(jax.device_get([_checksum(jnp.asarray(leaf)) for leaf in leaves]))
    shapes = repr([(leaf.shape, str(leaf.dtype)) for leaf in leaves]).encode()
    digest = hashlib.sha256(sums.tobytes() + shapes).digest()
    if all(isinstance(leaf, jax.Array) for leaf in leaves):
        _known.append((tuple(map(weakref.ref, leaves)), digest))
        del _known[:-_KEPT]
    return digest


@jax.jit
def _checksum(x: Array) -> Array:
    """Sum hashes of bits and place to ``[2]`` uint32 (MurmurHash3's finalizer)."""
    width = 8 * x.dtype.itemsize
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(width, 32)}")).reshape(-1)
    place = lax.iota(jnp.uint32, bits.shape[0])
    sums = []
    for seed in (0x9E3779B9, 0x85EBCA77):
        h = bits.astype(jnp.uint32) ^ (place * jnp.uint32(seed) + jnp.uint32(seed))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = (h ^ (h >> shift)) * jnp.uint32(factor)
        sums.append(jnp.sum(h ^ (h >> 16), dtype=jnp.uint32))
    return jnp.stack(sums)
