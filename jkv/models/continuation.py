"""Texts that go on from other texts: the same tokenizer, less what it does at a beginning."""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from jkv.models.token_bytes import state_of

_PARTS = ("normalizer", "pre_tokenizer")


class Continuation:
    """Encodes texts that are no beginnings.

    Many tokenizers treat the first character of a text in a way of its own: SentencePiece's put a
    space before it (a `Prepend` normalizer, or Metaspace), some byte-level ones too, some strip it.
    In the middle of a text that would add or lose a space.

    Args:
        tokenizer: whose ids are wanted.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._whole = tokenizer
        self._inner = self._added = None
        parts = {name: state_of(getattr(tokenizer, name)) for name in _PARTS}
        plain = {name: _strip_prefix(part) for name, part in parts.items()}
        if plain != parts:
            # Its parts cannot be changed in place: other threads may be encoding with them.
            self._inner = tokenizers.Tokenizer.from_str(
                json.dumps(json.loads(tokenizer.to_str()) | plain)
            )
            self._added = {
                i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()
            }

    def encode(self, text: str) -> list[int]:
        """Encode a text without special tokens and without a prefix."""
        if self._inner is None or self._added is None:
            return self._whole.encode(text, add_special_tokens=False).ids
        encoding = self._inner.encode(text, add_special_tokens=False)
        for i, (token, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            # From the first added token on, as ever; an unknown character has the id of one too.
            if self._added.get(token, "\0") in text[start:end]:
                rest = self._whole.encode(text[start:], add_special_tokens=False)
                return encoding.ids[:i] + rest.ids
        return encoding.ids


def _strip_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer that does not treat the start of a text specially."""
    if not isinstance(part, dict):
        return part
    match part.get("type"):
        case "Prepend":
            return None
        case "Metaspace":
            return part | {"prepend_scheme": "never"}
        case "ByteLevel" if "add_prefix_space" in part:
            return part | {"add_prefix_space": False}
        case "Strip":
            return part | {"strip_left": False}
        case "Sequence":
            name = "normalizers" if "normalizers" in part else "pretokenizers"
            if any(p["type"] == "WhitespaceSplit" for p in part[name]):
                return part  # the spaces put before words stand for those that were split away
            inner = [_strip_prefix(p) for p in part[name]]
            return part | {name: [p for p in inner if p is not None]}
    return part
