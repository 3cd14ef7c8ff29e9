"""An entry as one blob of bytes, and back: a header that says all, then the arrays as they are.

A blob, numbers little-endian:

===========  =================================================================================
bytes        what
===========  =================================================================================
0 to 8       ``jkvblob`` and a newline
8 to 12      version of this format, 1
12 to 16     length of the JSON
16 to 24     length of the payload
24 to 40     checksum of the payload, as it lies there
40 to 56     SHA-256 of bytes 0 to 40 and of 56 to the payload, the first sixteen bytes
56 to 64     version of the put, as ``meta`` says it in hexadecimals; zero where it says none
64 on        JSON: ``key``, ``arrays`` (name, dtype, shape), ``meta``, ``compression``, ``nbytes``
payload      at the next multiple of 64, as is each array in it; zeros in between
===========  =================================================================================

Nothing in it is executed, and nothing is believed: sizes must add up to what is there before any
memory is taken, the JSON may not be longer than the payload and 1 MiB (tokens take six bytes each
in it), name a thing twice or nest deeper than 100, and what a store wrote into ``meta`` must be
what a store writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jkv._text import brief
from jkv.errors import CorruptError, UnsupportedError
from jkv.store import zstd
from jkv.store.checksum import SIZE, checksum
from jkv.store.entry import Entry
from jkv.store.schema import META, put_meta

VERSION = 1
PREFIX = 64  # bytes before the JSON
_MAGIC = b"jkvblob\n"
_FIXED = struct.Struct("<8sIIQ16s")
_MAX_JSON = 1 << 20  # bytes, and as many more as the payload has
_MAX_AXES = 32
_MAX_DEPTH = 100  # of the JSON; that of a cache's description takes 20
SUFFIX = ".jkv"
# Lower case only: some file systems take "A" for "a". Names keep room for what others append.
_SPECIAL = re.compile(r"[^a-z0-9-]")
_LONGEST_NAME = 180
# What must not be escaped is not: a key has one name.
_SPELLED = re.compile(r"k((?:[a-z0-9-]|_(?!2d|3\d|6[1-9a-f]|7[0-9a])[0-9a-f]{2})*)\.jkv")
_HASHED = re.compile(r"h[0-9a-f]{64}\.jkv")
_STAMP = re.compile("[0-9a-f]{16}")
_as_json = json.JSONEncoder(separators=(",", ":")).encode

_PLAIN = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
_DTYPES = {name: np.dtype(name) for name in [*_PLAIN.split(), "complex64", "complex128"]} | {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in dir(ml_dtypes)
    if name.startswith(("bfloat", "float", "int", "uint"))
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}  # a dtype takes 5 µs to say its own


@dataclasses.dataclass(frozen=True)
class Header:
    """What a blob says of itself."""

    key: str
    arrays: tuple[tuple[str, np.dtype, tuple[int, ...], int], ...]  # name, dtype, shape, offset
    meta: Mapping[str, Any]
    compression: str | None
    nbytes: int  # of the payload, once it is not compressed
    start: int  # of the payload
    stored: int  # bytes of the payload, as it lies there
    checksum: bytes

    def check(self, key: str) -> None:
        """Check that it was written for this key.

        Raises:
            CorruptError: it was not.
        """
        if self.key != key:
            raise CorruptError(f"it holds the key {brief(self.key[:80])} and not {brief(key[:80])}")


def _aligned(offset: int) -> int:
    return -(-offset // 64) * 64


def encode(value: Entry, key: str = "", *, compression: str | None = None) -> list[memoryview]:
    """Encode an entry into pieces to be written one after the other; see `prepare`."""
    _, payload, header = prepare(value, key, compression=compression)
    return [header(), *payload]


def prepare(
    value: Entry, key: str = "", *, compression: str | None = None
) -> tuple[int, list[memoryview], Callable[[], memoryview]]:
    """Return where a blob's payload begins, its pieces, and a function that makes the header.

    The payload can be on its way while it is summed up for the header. Arrays are not copied.

    Args:
        compression: None, or "zstd": lossless; kept only where it makes the payload smaller.

    Raises:
        UnsupportedError: a dtype or a meta that a blob cannot say, or no zstd is installed.
    """
    pieces, arrays, end = [], [], 0
    for name, array in value.arrays.items():
        if (dtype := _NAMES.get(array.dtype)) is None:
            raise UnsupportedError(
                f"array {brief(name)} is of dtype {array.dtype.str}, which blobs do not hold; "
                "they hold numbers and bools, little-endian"
            )
        if gap := _aligned(end) - end:
            pieces.append(memoryview(bytes(gap)))
        end += gap + array.nbytes
        arrays.append([name, dtype, array.shape])
        if array.nbytes:
            flat = np.ascontiguousarray(array).reshape(-1)
            pieces.append(flat.view(np.uint8).data)
    nbytes, stored, packed = end, end, None
    if compression is not None:
        smaller = memoryview(zstd.compress(b"".join(pieces), compression))
        if len(smaller) < nbytes <= zstd.largest(len(smaller)):
            pieces, stored, packed = [smaller], len(smaller), compression
    said = {
        "key": key,
        "arrays": arrays,
        "meta": dict(value.meta),
        "compression": packed,
        "nbytes": nbytes,
    }
    try:
        text = _as_json(said).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedError(f"an entry's meta must be what JSON can say: {error}") from error
    if len(text) > _MAX_JSON + stored:
        raise UnsupportedError(
            f"an entry of {stored} bytes with {len(text)} of meta and names; expected at most "
            f"{_MAX_JSON} more than the arrays take: put large values into arrays"
        )
    start = _aligned(PREFIX + len(text))

    def header() -> memoryview:
        fixed = _FIXED.pack(_MAGIC, VERSION, len(text), stored, checksum(pieces))
        rest = _stamp(value.meta) + text + bytes(start - PREFIX - len(text))
        return memoryview(fixed + hashlib.sha256(fixed + rest).digest()[:SIZE] + rest)

    return start, pieces, header


def _stamp(meta: Mapping[str, Any]) -> bytes:
    put = meta.get(META)
    version = put.get("version") if isinstance(put, dict) else None
    if isinstance(version, str) and _STAMP.fullmatch(version):
        return bytes.fromhex(version)
    return bytes(8)


def version_of(prefix: bytes | memoryview) -> str | None:
    """Return the version of the put, from a blob's first 64 bytes; None where they have none."""
    stamp = bytes(prefix[56:64])
    return stamp.hex() if len(stamp) == 8 and any(stamp) else None


def measure(prefix: bytes | memoryview) -> tuple[int, int]:
    """Return the bytes of the header and of the whole blob, from its first 64 bytes.

    Raises:
        CorruptError: these are not the first bytes of a blob that this version reads.
    """
    if len(prefix) < PREFIX:
        raise CorruptError(f"{len(prefix)} bytes, which is less than the {PREFIX} of any header")
    magic, version, json_bytes, stored, _ = _FIXED.unpack_from(prefix)
    if magic != _MAGIC:
        raise CorruptError(f"no blob of jkv: it begins with {brief(bytes(magic))}")
    if version > VERSION:
        raise CorruptError(f"written in format {version} by a newer jkv; this one reads {VERSION}")
    if version != VERSION or json_bytes > _MAX_JSON + stored:
        raise CorruptError(f"a damaged header: format {version}, {json_bytes} bytes of JSON")
    start = _aligned(PREFIX + json_bytes)
    return start, start + stored


def read_header(data: bytes | memoryview) -> Header:
    """Read a blob's header, from its beginning; the payload need not be there.

    Raises:
        CorruptError: what is wrong with it.
    """
    start, _ = measure(data)
    _, _, json_bytes, stored, payload = _FIXED.unpack_from(data)
    if len(data) < start:
        raise CorruptError(f"it ends in its header: {len(data)} bytes of {start}")
    head = bytes(data[:start])
    seal = hashlib.sha256(head[:40] + head[56:]).digest()[:SIZE]
    if seal != head[40:56]:
        raise CorruptError("the header is damaged: its checksum is another")
    # Sealed from here on: what is still wrong was written so, by accident or on purpose.
    try:
        said = json.loads(
            str(head[PREFIX : PREFIX + json_bytes], "utf-8"), object_pairs_hook=_object
        )
        _check_depth(said)
        key, meta, packed = said["key"], said["meta"], said["compression"]
        listed = [(name, _DTYPES[dtype], tuple(shape)) for name, dtype, shape in said["arrays"]]
        nbytes = said["nbytes"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(f"the header says nothing that makes sense: {brief(error)}") from None
    arrays, names, end = [], set(), 0
    for name, dtype, shape in listed:
        if type(name) is not str or name in names:
            raise CorruptError("two arrays have one name, or names that are no texts")
        names.add(name)
        if len(shape) > _MAX_AXES:
            raise CorruptError(f"array {brief(name)} has {len(shape)} axes")
        numbers = room = 1
        for size in shape:
            if type(size) is not int or size < 0:
                raise CorruptError(f"array {brief(name)} has the shape {brief(shape)}")
            numbers *= size
            room *= size or 1  # numpy takes no huge axes beside an empty one either
        if room > 1 << 48:
            raise CorruptError(f"array {brief(name)} has the shape {brief(shape)}")
        offset = _aligned(end)
        end = offset + numbers * dtype.itemsize
        arrays.append((name, dtype, shape, offset))
    if not isinstance(key, str) or not isinstance(meta, dict):
        raise CorruptError("the key is no text, or meta no object")
    put_meta(meta)
    if type(nbytes) is not int or nbytes != end:
        raise CorruptError(
            f"the arrays take {end} bytes and the header gives the payload {brief(nbytes)}"
        )
    if packed not in (None, "zstd"):
        raise CorruptError(f"a payload compressed by {brief(packed)}, which there is not")
    if packed is None and stored != nbytes:
        raise CorruptError(f"a payload of {nbytes} bytes is stored in {stored}")
    return Header(key, tuple(arrays), meta, packed, nbytes, start, stored, payload)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON in which no name stands twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return made


def _check_depth(said: object) -> None:
    """Refuse what nests so deep that others' recursion would end at it."""
    level = [said]
    for _ in range(_MAX_DEPTH):
        level = [
            part
            for value in level
            if isinstance(value, dict | list)
            for part in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"it nests deeper than {_MAX_DEPTH}")


def decode(data: bytes | memoryview, key: str | None = None) -> Entry:
    """Decode a blob; arrays are read-only views of ``data``, unless it is compressed.

    Args:
        key: what it must have been written for; None for any.

    Raises:
        CorruptError: what is wrong with it: damaged, cut off, of another key, of a newer version.
        UnsupportedError: it is compressed by what is not installed.
    """
    view = memoryview(data).cast("B").toreadonly()
    start, total = measure(view)
    if len(view) != total:
        raise CorruptError(f"{len(view)} bytes where {total} were written")
    header = read_header(view)
    if key is not None:
        header.check(key)
    return entry(header, view[start:], checksum([view[start:]]))


def entry(header: Header, payload: memoryview, found: bytes) -> Entry:
    """Make the entry of a payload whose checksum was computed while it was read.

    Raises:
        CorruptError: the checksum is another, or it cannot be decompressed.
        UnsupportedError: it is compressed by what is not installed.
    """
    if found != header.checksum:
        raise CorruptError("the payload is damaged: its checksum is another")
    if header.compression is not None:
        payload = memoryview(zstd.decompress(payload, header.nbytes, header.compression))
    size = header.nbytes
    arrays = {
        # Empty ones may begin where the payload ends, which numpy does not take.
        name: np.ndarray(shape, dtype, buffer=payload, offset=offset if offset < size else 0)
        for name, dtype, shape, offset in header.arrays
    }
    return Entry(arrays, header.meta)


def blob_name(key: str) -> str:
    """Return the name of a key's blob, which is harmless whatever the key.

    It is ``k`` and the key, all but a-z, 0-9 and ``-`` written as ``_`` and two digits.

    A name longer than 180 would not fit; such a key's is ``h`` and its SHA-256, and what the key
    was stands in the blob. Two keys never share a name.
    """
    data = key.encode("utf-8", "surrogatepass")
    shown = data[: _LONGEST_NAME + 1].decode("latin-1")
    escaped = _SPECIAL.sub(lambda hit: f"_{ord(hit[0]):02x}", shown)
    if len(escaped) > _LONGEST_NAME:
        return f"h{hashlib.sha256(data).hexdigest()}{SUFFIX}"
    return f"k{escaped}{SUFFIX}"


def is_blob_name(name: str) -> bool:
    """Tell whether `blob_name` may have made it: no other file is the store's."""
    return blob_key(name) is not None or _HASHED.fullmatch(name) is not None


def blob_key(name: str) -> str | None:
    """Return the key that a name spells; None for names of long keys, and for others."""
    spelled = _SPELLED.fullmatch(name)
    if spelled is None or len(spelled[1]) > _LONGEST_NAME:
        return None
    escaped = re.sub(r"_(..)", lambda hit: chr(int(hit[1], 16)), spelled[1])
    try:
        return escaped.encode("latin-1").decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
