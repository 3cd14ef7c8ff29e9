"""The names under which stored entries and fingerprints know classes and their fields.

An entry of a store names the classes and fields of the cache that it holds, and a fingerprint is
computed from such names. Whatever is renamed in the code keeps here the name that it was first
written with, so that entries stay readable and fingerprints stay equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

# Classes and functions by their present names; fields of a class likewise.
_WRITTEN: dict[str, str] = {
    "jkv.cache.evicting_layer:Evicting": "jkv.cache.evicting:Evicting",
    "jkv.cache.quantized_layer:QuantizedCache": "jkv.cache.compressed:NearFar",
    "jkv.cache.quantized:QuantizedKind": "jkv.cache.compressed:NearFarKind",
    "jkv.ops.codecs.affine:PerChannelCodes": "jkv.ops.encoded.affine:ByChannel",
    "jkv.ops.codecs.affine:PerTokenCodes": "jkv.ops.encoded.affine:ByToken",
    "jkv.ops.codecs.floats:CastArray": "jkv.ops.encoded.floats:Plain",
    "jkv.ops.codecs.floats:Float8Codes": "jkv.ops.encoded.floats:Floats8",
    "jkv.ops.codecs.sparse:SparseArray": "jkv.ops.encoded.sparse:Some",
}
_WRITTEN_FIELDS: dict[str, dict[str, str]] = {
    "jkv.cache.paged:Paged": {"nonfinite": "broken"},
    "jkv.cache.quantized_layer:QuantizedCache": {"nonfinite": "broken"},
    "jkv.ops.codecs.affine:PerChannelCodes": {"scales": "steps", "zero_points": "zeros"},
    "jkv.ops.codecs.affine:PerTokenCodes": {"scales": "steps", "zero_points": "zeros"},
}
_PRESENT = {written: present for present, written in _WRITTEN.items()}


def written_name(what: type | Callable[..., Any]) -> str:
    """Return ``module:name`` of a class or function, as entries have it."""
    present = f"{what.__module__}:{what.__qualname__}"
    return _WRITTEN.get(present, present)


def present_name(written: str) -> str:
    """Return ``module:name`` in the present code for the name in an entry."""
    return _PRESENT.get(written, written)


def written_fields(cls: type) -> Iterator[tuple[str, str]]:
    """Yield each field of a dataclass, as the class has it and as entries have it."""
    renamed = _WRITTEN_FIELDS.get(f"{cls.__module__}:{cls.__qualname__}", {})
    for field in dataclasses.fields(cls):
        yield field.name, renamed.get(field.name, field.name)
