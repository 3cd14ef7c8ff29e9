"""Safetensors files: a header that is checked before it is believed, and tensors read one by one.

The file is read, not mapped: a mapped file that is truncated kills the process, its pages
count as this process's memory, and JAX on the CPU would make arrays that alias it. Weights are read
so, and caches, which the decode loop writes into: of these a copy is needed anyway.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from jkv._text import brief, printable
from jkv.errors import CheckpointError

# Bytes per element of what the format knows. Those with a name on the right can be read as weights.
_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
}
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_NUMPY = {
    **{word: np.dtype(name) for word, name in DTYPES.items() if word != "BF16"},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    **{
        f"{word}{n}": np.dtype(f"{name}{n}")
        for word, name in (("I", "int"), ("U", "uint"))
        for n in (8, 16, 32, 64)
    },
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}
WORDS = {dtype: word for word, dtype in _NUMPY.items()}
# Bytes of a header. The format allows 100 MB, which take Python seconds and gigabytes to parse;
# a thousand layers of 14 tensors need 2 MB.
_HEADER_LIMIT = 8 << 20
_CHUNK = 16 << 20  # bytes of a tensor that are compared at once


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        name: in the file.
        dtype: the format's word for it ("BF16").
        shape: row-major.
        path: of the file.
        start: byte in the file.
        nbytes: as long as shape and dtype say.
        listed: the index of a checkpoint in several files lists it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int
    listed: bool = True

    @property
    def numpy_dtype(self) -> np.dtype:
        """Of `read`'s array."""
        return _NUMPY[self.dtype]

    def read(self) -> np.ndarray:
        """Read the tensor into memory of its own.

        Raises:
            CheckpointError: the file has become shorter since its header was read.
        """
        return self._read(0, self.nbytes).reshape(self.shape)

    def chunks(self) -> Iterator[np.ndarray]:
        """Read the tensor flat, in pieces of equally many elements whatever the dtype."""
        step = _CHUNK // 8 * self.numpy_dtype.itemsize
        for start in range(0, self.nbytes, step):
            yield self._read(start, min(step, self.nbytes - start))

    def _read(self, start: int, count: int) -> np.ndarray:
        with self.path.open("rb") as file:
            file.seek(self.start + start)
            raw = np.fromfile(file, np.uint8, count)
        if raw.size != count:
            raise CheckpointError(
                f"{self.path.name} ended inside of {printable(self.name)} while it was read; is "
                "it still being written? Load it again when it is complete"
            )
        return raw.view(self.numpy_dtype)


def read_header(path: Path, problems: list[str]) -> dict[str, Tensor]:
    """Read the tensors of a file by name; problems are appended to `problems`.

    A tensor is only reported when its bytes are inside of the file and its alone.
    """
    return read_tensors(path, problems)[0]


def read_tensors(path: Path, problems: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a file as `read_header` does, and the texts of its metadata."""
    try:
        status = path.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):  # to open a pipe is to wait for its other end
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            problems.append(f"{path.name}: cannot be read: it is {kind}; expected a regular file")
            return {}, {}
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                problems.append(
                    f"{path.name}: its header would end after the file's {size} bytes; it is "
                    "truncated, or no safetensors file"
                )
                return {}, {}
            if length > _HEADER_LIMIT:
                problems.append(
                    f"{path.name}: a header of {length} bytes; expected at most {_HEADER_LIMIT}"
                )
                return {}, {}
            raw = file.read(length)
    except OSError as error:
        problems.append(f"{path.name}: cannot be read: {error.strerror or error}")
        return {}, {}
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name}: its header is not valid: {brief(str(error))}")
        return {}, {}
    if not isinstance(header, dict):
        problems.append(f"{path.name}: its header is not an object")
        return {}, {}
    said = header.pop("__metadata__", None)
    metadata = said if isinstance(said, dict) else {}
    metadata = {key: text for key, text in metadata.items() if isinstance(text, str)}
    tensors = [_tensor(name, entry, path, 8 + length, problems) for name, entry in header.items()]
    if None in tensors:
        return {}, {}
    found = [tensor for tensor in tensors if tensor is not None]
    if not _are_contiguous(found, path, 8 + length, size, problems):
        return {}, {}
    return {t.name: t for t in found}, metadata


def write_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, read: Callable[[str], np.ndarray]
) -> None:
    """Write tensors of one dtype, one after the other.

    Args:
        path: of the file.
        shapes: of the tensors, by name.
        dtype: of all, as jax calls it.
        read: gives a tensor by its name.
    """
    word = next(word for word, name in DTYPES.items() if name == dtype)
    write_file(
        path, {name: (word, shape) for name, shape in shapes.items()}, {"format": "pt"}, read
    )


def write_file(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    read: Callable[[str], np.ndarray],
) -> None:
    """Write a new file of tensors, one after the other, and see it onto the disk.

    Args:
        path: of the file.
        tensors: the format's word for the dtype, see `WORDS`, and the shape, by name.
        metadata: texts of the header.
        read: gives a tensor by its name.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, (word, shape) in tensors.items():
        stop = start + math.prod(shape) * _SIZES[word]
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # so that the tensors are aligned
    with path.open("xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, (word, shape) in tensors.items():
            given = np.asarray(read(name), _NUMPY[word])
            if given.shape != shape:
                raise ValueError(f"{name} has shape {list(given.shape)}; expected {list(shape)}")
            file.write(np.ascontiguousarray(given).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, and refuse repeated keys: readers differ in which of two they use."""
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = sorted(name for name, count in counts.items() if count > 1)
        raise ValueError(f"repeated keys {', '.join(twice[:10])}")
    return result


def _tensor(name: str, entry: object, path: Path, base: int, problems: list[str]) -> Tensor | None:
    """Read one entry of a header, None if it contradicts itself."""

    def are_sizes(values: object) -> TypeGuard[list[int]]:
        return isinstance(values, list) and all(
            isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values
        )

    where = f"{path.name}: {printable(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        problems.append(f"{where}: expected dtype, shape and data_offsets, got {brief(entry)}")
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        problems.append(f"{where}: unknown dtype {brief(dtype)}")
        return None
    if not are_sizes(shape) or not are_sizes(offsets) or len(offsets) != 2:
        problems.append(f"{where}: shape {brief(shape)} and offsets {brief(offsets)} are not valid")
        return None
    start, stop = offsets
    nbytes = math.prod(shape) * _SIZES[dtype]
    if stop - start != nbytes:
        problems.append(
            f"{where}: offsets {offsets} hold {stop - start} bytes; {dtype} {brief(shape)} takes "
            f"{brief(nbytes)}"
        )
        return None
    return Tensor(name, dtype, tuple(shape), path, base + start, nbytes)


def _are_contiguous(
    tensors: list[Tensor], path: Path, base: int, size: int, problems: list[str]
) -> bool:
    """Return whether the tensors fill the file without gaps, as the format demands."""
    at, before = base, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.start, t.nbytes)):
        if tensor.start != at:
            how = "overlaps" if tensor.start < at else "leaves a gap after"
            problems.append(f"{path.name}: {printable(tensor.name)} {how} {printable(before)}")
            return False
        at, before = tensor.start + tensor.nbytes, tensor.name
    if at > size:
        problems.append(
            f"{path.name}: tensors end at byte {at} and the file at {size}; it is truncated"
        )
    elif at < size:
        problems.append(f"{path.name}: {size - at} bytes follow the last tensor; expected none")
    return at == size
