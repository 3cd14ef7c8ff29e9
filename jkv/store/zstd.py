"""Zstandard, from where it is installed: Python 3.14's library, or the `zstandard` package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jkv._text import brief
from jkv.errors import CorruptError, UnsupportedError

# Keys and values become a tenth smaller, empty slots vanish. A frame that grows more than this is
# nothing that a store needs, and takes memory out of proportion to what it cost its author.
_LARGEST_RATIO = 256
_ALWAYS = 1 << 20  # bytes that any frame may become


class _Zstd(NamedTuple):
    compress: Callable[[bytes], bytes]
    decompress: Callable[[Any], bytes]  # of one frame that nothing follows
    size: Callable[[Any], int | None]
    error: type[Exception]


@functools.cache
def _zstd() -> _Zstd:
    try:
        from compression import zstd  # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:

        def one_frame(data: Any) -> bytes:
            # Theirs goes on with the frames that follow, whose sizes were not looked at.
            decompressor = zstd.ZstdDecompressor()
            out = decompressor.decompress(data)
            if not decompressor.eof or decompressor.unused_data:
                raise zstd.ZstdError("it ends within its frame, or goes on after it")
            return out

        return _Zstd(
            zstd.compress,
            one_frame,
            lambda data: zstd.get_frame_info(data).decompressed_size,
            zstd.ZstdError,
        )
    try:
        import zstandard
    except ImportError as error:
        raise UnsupportedError(
            "zstd needs Python 3.14 or the package zstandard: pip install 'jkv-jax[zstd]'"
        ) from error
    # One object each time: theirs must not be shared by threads.
    return _Zstd(
        lambda data: zstandard.ZstdCompressor().compress(data),
        lambda data: zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False),
        zstandard.frame_content_size,
        zstandard.ZstdError,
    )


def compress(data: bytes, method: str) -> bytes:
    """Compress into one frame, with its size in it.

    Raises:
        UnsupportedError: another method than "zstd", or zstd is not installed.
    """
    check(method)
    return _zstd().compress(data)


def decompress(data: memoryview, nbytes: int, method: str) -> bytes:
    """Decompress what must have been so many bytes.

    Raises:
        CorruptError: it is no such frame.
        UnsupportedError: another method than "zstd", or zstd is not installed.
    """
    check(method)
    library = _zstd()
    try:
        size = library.size(data)
        if size != nbytes:
            raise CorruptError(f"a frame of {size} bytes where {nbytes} were compressed")
        if nbytes > (most := largest(len(data))):
            raise CorruptError(f"{len(data)} bytes that would become {nbytes}, of {most} at most")
        out = library.decompress(data)
    except (library.error, MemoryError) as error:
        raise CorruptError(f"not to be decompressed: {error}") from error
    if len(out) != nbytes:
        raise CorruptError(f"{nbytes} bytes were compressed and {len(out)} came out")
    return out


def largest(nbytes: int) -> int:
    """Return the bytes that a frame of so many may become."""
    return max(_LARGEST_RATIO * nbytes, _ALWAYS)


def check(method: str | None) -> None:
    """Raise at once what `compress` would raise later.

    Raises:
        UnsupportedError: another method than "zstd", or zstd is not installed.
    """
    if method is None:
        return
    if method != "zstd":
        raise UnsupportedError(f"compression is None or 'zstd', not {brief(method)}")
    _zstd()
