"""A cache as one safetensors file: written whole or not at all, checked before it is believed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jkv._axes import Array
from jkv._description import is_own, names_in
from jkv._tensorfile import WORDS, Tensor, read_tensors, write_file
from jkv._text import brief, printable
from jkv._transfer import transfers
from jkv._version import __version__
from jkv.cache.base import Cache, on_device
from jkv.cache.fingerprint import fingerprint
from jkv.cache.serialized import ERRORS, describe_cache, portable, rebuild_cache
from jkv.errors import CheckpointError, StaleError, UnsupportedError

FORMAT = 1
_HEADER, _SEAL = "jkv", "jkv.sha256"  # texts of the file's metadata
PathLike = str | os.PathLike[str]
Known = Iterable[type | Callable[..., Any]]  # classes and functions


@runtime_checkable
class Loaded(Protocol):
    """What `jkv.load` returns, as far as a cache's file cares: a model beside its tokenizer."""

    @property
    def model(self) -> Any: ...  # noqa: D102
    @property
    def tokenizer(self) -> object: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class CacheFile:
    """What a file holds.

    Attributes:
        cache: the cache.
        arrays: others beside it, by name, on the host.
        details: what else the header says, as JSON has it.
    """

    cache: Cache
    arrays: Mapping[str, np.ndarray]
    details: Mapping[str, Any]


def save_cache(path: PathLike, cache: Cache, model: object = None) -> None:
    """See `Cache.save`."""
    write_cache_file(path, cache, None if model is None else model_fingerprint("save", model))


@transfers
def load_cache(path: PathLike, model: object = None, *, known: Known = ()) -> Cache:
    """Load a cache that `Cache.save` has written, the same to the bit.

    It lies on the default device, in memory of its own: the file is read, not mapped. (A loop
    writes into the cache that it is given, which would need a copy of what is mapped, and a mapped
    file that is truncated ends the process.)

    Args:
        path: of the file.
        model: what will run on it: what `jkv.load` returns, a decoder, or a pytree of weights. The
            file must name this model. None: whatever model it is of.
        known: layers, kinds and scores of your own that may be in it; no code comes from a file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is truncated, damaged, of another version, or no cache.
        StaleError: it was saved with another model or other weights, or without one.
        UnsupportedError: a layer or a score that is not jkv's and not `known`.

    Example:
        >>> cache = jkv.init_cache(lm.config, batch=1, slots=8)
        >>> logits, cache = jkv.prefill(lm.model, jnp.array([[5, 6, 7]]), cache)
        >>> cache.save("prompt.safetensors", lm)
        >>> jkv.load_cache("prompt.safetensors", lm).lengths.tolist()
        [3]
    """
    found = None if model is None else model_fingerprint("load_cache", model)
    return read_cache_file(path, found, known).cache


def model_fingerprint(name: str, model: object) -> bytes:
    """Return the fingerprint of a model, or of what `jkv.load` returns.

    Args:
        name: of the function that was given it, for the message.
        model: what it was given.

    Raises:
        TypeError: nothing that holds weights.
    """
    decoder = model.model if isinstance(model, Loaded) else model
    leaves = jax.tree.leaves(decoder)
    if not leaves or not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves):
        raise TypeError(
            f"{name} got {brief(model)} as a model; expected what jkv.load returns, a decoder, or "
            "a pytree of weights"
        )
    return fingerprint(decoder)


@transfers
def write_cache_file(
    path: PathLike,
    cache: Cache,
    model: bytes | None,
    arrays: Mapping[str, np.ndarray] | None = None,
    **details: object,
) -> None:
    """Write a file in the place of what was there, which stays if anything fails.

    Args:
        path: of the file.
        cache: of any kind.
        model: its fingerprint.
        arrays: others beside it, by names that no array of a cache has.
        details: what else to say, as JSON has it.

    Raises:
        TypeError: the cache is being traced.
        UnsupportedError: arrays or a kind that a file cannot hold.
        OSError: the file cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"save got the directory {target}; expected the path of a file")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(cache)):
        raise TypeError(
            "save is traced by jit, vmap or grad, and writes on the host; call it there"
        )
    held: dict[str, Any] = {}
    words = describe_cache(portable(on_device(cache)), held, own=True)
    host = {name: _to_host(name, array) for name, array in {**held, **(arrays or {})}.items()}
    tensors = {name: (WORDS[array.dtype], array.shape) for name, array in host.items()}
    text = json.dumps(
        {
            "format": FORMAT,
            "jkv": __version__,
            "model": None if model is None else model.hex(),
            "lengths": host["lengths"].tolist(),
            "cache": words,
            "details": details,
            "crc32": {name: _crc(array) for name, array in host.items()},
        },
        separators=(",", ":"),
    )
    metadata = {_HEADER: text, _SEAL: _seal(text, tensors)}
    stage = target.with_name(f".{target.name}-{secrets.token_hex(4)}.tmp")
    try:
        write_file(stage, tensors, metadata, host.__getitem__)
        os.replace(stage, target)
    finally:
        stage.unlink(missing_ok=True)


@transfers
def read_cache_file(path: PathLike, model: bytes | None, known: Known = ()) -> CacheFile:
    """Read a file that `write_cache_file` has written.

    Args:
        path: of the file.
        model: the fingerprint that it must have, None for any.
        known: see `load_cache`.

    Raises:
        FileNotFoundError, CheckpointError, StaleError, UnsupportedError: see `load_cache`.
    """
    source, known = Path(path), tuple(known)
    if not source.exists():
        raise FileNotFoundError(f"load got {source}, where there is no file")
    problems: list[str] = []
    tensors, metadata = read_tensors(source, problems)
    if problems:
        raise CheckpointError(
            f"{'; '.join(problems)}. Expected a whole file that cache.save has written"
        )
    header = _read_header(source, tensors, metadata)
    _check_model(source, header["model"], model)
    _check_known(source, header["cache"], known)
    of_cache = set(names_in(header["cache"], "array"))
    if not of_cache <= set(tensors) or set(header["crc32"]) != set(tensors):
        raise CheckpointError(f"{source.name}: its header names other arrays than it holds")
    host = {name: _read(tensor, header["crc32"][name]) for name, tensor in tensors.items()}
    try:
        cache = rebuild_cache(
            header["cache"], {name: _to_device(host.pop(name)) for name in of_cache}, known
        )
        _check_rows(cache)
    except UnsupportedError:
        raise
    except ERRORS as error:
        raise CheckpointError(f"{source.name}: it holds no cache: {brief(error)}") from error
    return CacheFile(cache, host, header["details"])


def _read_header(
    source: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Return what a file's header says, once it is known to be what was written.

    Raises:
        CheckpointError: it is not.
    """
    if _HEADER not in metadata:
        raise CheckpointError(
            f"{source.name}: a safetensors file, but of no cache; expected one that cache.save has "
            "written"
        )
    try:
        header = json.loads(metadata[_HEADER])
        written = header["format"], str(header["jkv"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{source.name}: its header makes no sense: {brief(error)}") from None
    if written[0] != FORMAT:
        raise CheckpointError(
            f"{source.name}: written in format {brief(written[0])} by jkv {printable(written[1])}; "
            f"this one, {__version__}, reads {FORMAT}"
        )
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if metadata.get(_SEAL) != _seal(metadata[_HEADER], shapes):
        raise CheckpointError(
            f"{source.name}: its header is not the one that was written with it; it is damaged or "
            "has been changed"
        )
    if set(header) != {"format", "jkv", "model", "lengths", "cache", "details", "crc32"}:
        raise CheckpointError(f"{source.name}: its header says {brief(sorted(header))}")
    return header


def _check_model(source: Path, written: object, model: bytes | None) -> None:
    if model is None or written == model.hex():
        return
    if written is None:
        raise StaleError(
            f"{source.name} was saved without a model, so whether it is of this one is unknown; "
            "save it with cache.save(path, model), or load it without one"
        )
    raise StaleError(
        f"{source.name} was saved with another model, or with other weights: its keys and values "
        "are not this one's. Load the model that it was saved with"
    )


def _check_known(source: Path, words: object, known: Known) -> None:
    names = {f"{what.__module__}:{what.__qualname__}" for what in known}
    told = {*names_in(words, "class"), *names_in(words, "function")}
    unknown = sorted(name for name in told - names if is_own(name))
    if unknown:
        raise UnsupportedError(
            f"{source.name} holds {', '.join(map(printable, unknown))}, which are not jkv's; pass "
            "them as known=, imported from where they were: no code comes from a file"
        )


def _check_rows(cache: Cache) -> None:
    """Check that all arrays of a cache are of as many rows as it has lengths.

    Raises:
        ValueError: they are not.
    """
    rows = np.arange(cache.batch)
    taken = jax.eval_shape(lambda cache: cache.take(rows), cache)
    before, after = jax.tree.flatten(cache), jax.tree.flatten(taken)
    shapes = [[(x.shape, x.dtype) for x in leaves] for leaves in (before[0], after[0])]
    if shapes[0] != shapes[1] or before[1] != after[1]:
        raise ValueError(f"its arrays are not of {cache.batch} rows")


def _seal(text: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """Hash what the header says: the texts, and each array's name, dtype and shape."""
    listed = sorted((name, word, list(shape)) for name, (word, shape) in tensors.items())
    return hashlib.sha256(json.dumps([text, listed]).encode()).hexdigest()


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _to_host(name: str, array: Array | np.ndarray) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise UnsupportedError(
            f"array {name} lies on devices of several processes; each can only save its own"
        )
    if jnp.issubdtype(array.dtype, jax.dtypes.extended) or np.dtype(array.dtype) not in WORDS:
        raise UnsupportedError(
            f"array {name} is of dtype {array.dtype}, which safetensors files do not hold, only "
            f"{', '.join(str(dtype) for dtype in WORDS)}"
        )
    return np.asarray(array)


def _read(tensor: Tensor, crc: object) -> np.ndarray:
    array = tensor.read()
    if _crc(array) != crc:
        raise CheckpointError(
            f"{tensor.path.name}: array {printable(tensor.name)} is damaged; its checksum differs"
        )
    return array


def _to_device(array: np.ndarray) -> Array:
    copy = jnp.array(array)  # of its own: an alias of numpy's memory could not be donated
    if copy.dtype != array.dtype:
        raise UnsupportedError(
            f"the cache holds {array.dtype}, which JAX has only with jax_enable_x64"
        )
    return copy
