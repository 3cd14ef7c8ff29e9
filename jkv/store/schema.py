"""What the store writes into an entry's meta, and the check of what is read back.

Any program may have written what lies in a directory or a bucket: every field is checked before one
is used, and an entry that fails is damaged, as one with a wrong checksum is.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jkv._text import brief
from jkv.errors import CorruptError
from jkv.store.checks import LONGEST
from jkv.store.entry import Entry

META = "store"  # where a stored entry's meta has what the store wrote
LIVENESS_LOCK = "lifeline"  # and in that, of an ephemeral one, what ends with its process
FORMAT = 1
_LATEST = 2.5e11  # seconds since the epoch: the year 9892, and the last that dates can say is 9999
_LONGEST = 256  # characters of a version or of a lock's name


@dataclasses.dataclass(frozen=True, eq=False)
class PutMeta:
    """What is stored of a put.

    Attributes:
        version: of this put, another one for each.
        created, updated, expires: seconds since the epoch.
        seconds: to make it again.
        tokens: int32 [T], whose keys and values it holds.
        liveness_lock: names what ends with the process for which alone it was kept.
    """

    version: str | None
    created: int | float
    updated: int | float
    expires: int | float | None
    seconds: int | float | None
    fingerprint: bytes
    tokens: np.ndarray | None
    whole: bool
    packed: bool
    pinned: bool
    liveness_lock: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as it is written."""
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        said["fingerprint"] = self.fingerprint.hex()
        if self.tokens is not None:
            said["tokens"] = base64.b64encode(self.tokens.astype("<i4").tobytes()).decode()
        if (lock := said.pop("liveness_lock")) is not None:
            said[LIVENESS_LOCK] = lock
        return {"format": FORMAT, **said}


def put_meta(meta: Mapping[str, Any]) -> PutMeta | None:
    """Read what the store wrote into an entry's meta; None where it wrote nothing.

    Raises:
        CorruptError: a field that no store has written.
    """
    said = meta.get(META)
    if said is None:
        return None
    if not isinstance(said, dict):
        raise CorruptError(f"meta of the store is a {type(said).__name__} and no object")
    if said.get("format") != FORMAT:
        raise CorruptError(f"meta of format {brief(said.get('format'))}; this jkv reads {FORMAT}")
    return PutMeta(
        version=_text(said, "version"),
        created=_number(said, "created", _LATEST),
        updated=_number(said, "updated", _LATEST),
        expires=None if said.get("expires") is None else _number(said, "expires", 2 * LONGEST),
        seconds=seconds_of(said),
        fingerprint=_fingerprint(said),
        tokens=_tokens(said.get("tokens")),
        whole=_flag(said, "whole"),
        packed=_flag(said, "packed"),
        pinned=_flag(said, "pinned"),
        liveness_lock=_text(said, LIVENESS_LOCK) if LIVENESS_LOCK in said else None,
    )


def check_entry(entry: Entry) -> PutMeta | None:
    """Check what an entry says of itself beside its arrays; what the store wrote, or None.

    Raises:
        CorruptError: something that neither a store nor `pack` has written.
    """
    if not isinstance(entry.meta.get("form", "exact"), str):
        raise CorruptError(f"a form of {brief(entry.meta['form'])}; expected a text")
    seconds_of(entry.meta)
    return put_meta(entry.meta)


def seconds_of(meta: Mapping[str, Any]) -> int | float | None:
    """Read what an entry cost to make.

    Raises:
        CorruptError: no number from 0.
    """
    return None if meta.get("seconds") is None else _number(meta, "seconds", LONGEST)


def _wrong(said: Mapping[str, Any], name: str) -> CorruptError:
    what = f"{brief(said[name])}" if name in said else "nothing"
    return CorruptError(f"meta has {what} as {brief(name)}, which no store has written")


def _number(said: Mapping[str, Any], name: str, most: float) -> int | float:
    value: Any = said.get(name)
    # False for NaN, and for whole numbers too large to be floats too.
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise _wrong(said, name)
    return value


def _flag(said: Mapping[str, Any], name: str) -> bool:
    if type(said.get(name)) is not bool:
        raise _wrong(said, name)
    return said[name]


def _text(said: Mapping[str, Any], name: str) -> str | None:
    if name not in said:
        raise _wrong(said, name)
    value = said[name]
    if value is not None and not (isinstance(value, str) and len(value) <= _LONGEST):
        raise _wrong(said, name)
    return value


def _fingerprint(said: Mapping[str, Any]) -> bytes:
    value = said.get("fingerprint")
    try:
        if isinstance(value, str) and value == value.lower() and " " not in value:
            return bytes.fromhex(value)
    except ValueError:
        pass
    raise _wrong(said, "fingerprint")


def _tokens(text: Any) -> np.ndarray | None:
    if text is None:
        return None
    try:
        data = base64.b64decode(text, validate=True)
        tokens = np.frombuffer(data, "<i4").astype(np.int32)
    except (TypeError, ValueError, binascii.Error) as error:
        raise CorruptError("meta has tokens that are no int32 in base64") from error
    if len(tokens) and tokens.min() < 0:
        raise CorruptError("meta has tokens below 0")
    tokens.flags.writeable = False
    return tokens
