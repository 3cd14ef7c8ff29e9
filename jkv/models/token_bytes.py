"""What each token adds to a text, by itself."""

from __future__ import annotations

import json
import re
from typing import Any, Protocol, runtime_checkable

import tokenizers

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes that a token adds to a text that has begun; special tokens as they are written.

    Joined over a row they are the row's whole text, so that a text can be searched without being
    decoded. A token that is a part of a character is its bytes, which no text could be: those of
    byte-level vocabularies and of byte fallback, told apart by the decoder as `transformers` does.

    Args:
        tokenizer: of the vocabulary.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        kinds = _kinds(state_of(tokenizer.decoder))
        self._fallback = "ByteFallback" in kinds
        self._letters = byte_letters() if "ByteLevel" in kinds and not self._fallback else {}

    def __getitem__(self, token: int) -> bytes:
        """Return the bytes of an id, empty where the vocabulary has no such token."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._look_up(token)
        return known

    def _look_up(self, token: int) -> bytes:
        written = self._tokenizer.id_to_token(token)
        if written is None:
            return b""
        if self._fallback and (byte := _BYTE.fullmatch(written)):
            return bytes([int(byte[1], 16)])
        if self._letters and all(letter in self._letters for letter in written):
            return bytes(self._letters[letter] for letter in written)
        # Twice, less once: decoders treat the first token of a text in a way of its own.
        once, twice = self._text([written]), self._text([written, written])
        return (twice[len(once) :] if twice.startswith(once) else once).encode()

    def _text(self, written: list[str]) -> str:
        decoder = self._tokenizer.decoder
        return " ".join(written) if decoder is None else decoder.decode(written)


@runtime_checkable
class _Part(Protocol):
    """A part of a tokenizer, which tokenizers gives no class for."""

    def __getstate__(self) -> Any:
        """Its JSON, as bytes or a text."""
        ...


def byte_letters() -> dict[str, int]:
    """Return the printable character with which byte-level vocabularies write each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    plain += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def state_of(part: _Part | None) -> dict[str, Any] | None:
    """Return a part of a tokenizer as in `tokenizer.json`, None where there is none."""
    return None if part is None else json.loads(part.__getstate__())


def _kinds(state: object) -> set[str]:
    """Return the types of a part and of its own parts."""
    if isinstance(state, dict):
        found = {state["type"]} if isinstance(state.get("type"), str) else set()
        return found.union(*map(_kinds, state.values()))
    return set().union(*map(_kinds, state)) if isinstance(state, list) else set()
