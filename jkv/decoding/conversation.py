"""A stored conversation: read from an entry's meta, and found under its sequence_id."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jkv._text import brief, plural, printable
from jkv.cache.base import Cache
from jkv.cache.fingerprint import describe
from jkv.decoding.prefix_store import PrefixStore
from jkv.errors import CorruptError
from jkv.models.template import says_something
from jkv.store.schema import seconds_of

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a store has of a conversation.

    Attributes:
        messages: of all roles.
        turns: taken so far.
        seconds: that the cache took to make.
        cache: of one row.
        tokens: that the cache holds, ``[T]``.
    """

    messages: tuple[Message, ...]
    turns: int
    seconds: float
    cache: Cache
    tokens: np.ndarray


def words_of(messages: tuple[Message, ...], turns: int, prefixes: PrefixStore) -> dict[str, Any]:
    """Return what to keep of a conversation in an entry's meta."""
    return {"messages": list(messages), "turns": turns, "kind": describe(prefixes.kind)}


def load(prefixes: PrefixStore, key: str, system: tuple[Message, ...]) -> Conversation | None:
    """Load the conversation under a key; None where the store has none.

    Raises:
        ValueError: one is there that cannot go on as asked, and that the next turn would replace:
            of another model or kind of cache, or with another system prompt.
    """
    found = prefixes.known(key)
    if found is None:
        _check_others(prefixes, key)
        return None
    cache, tokens, meta = found
    try:
        messages, turns, seconds = parse(meta)
    except CorruptError:
        prefixes.reject(key)
        return None
    if not messages:
        return None
    if messages[: len(system)] != system:
        first = messages[0]
        has = (
            f"the system prompt {brief(first.get('content'))}"
            if first["role"] == "system"
            else "no system prompt"
        )
        raise _refusal(
            prefixes,
            key,
            messages,
            f"with {has}; got system={brief(system[0]['content'])}",
            "the same system prompt",
        )
    return Conversation(messages, turns, seconds, cache, tokens)


def _check_others(prefixes: PrefixStore, key: str) -> None:
    """Refuse a key under which another model or kind of cache has a conversation.

    Raises:
        ValueError: it has.
    """
    meta = prefixes.known_of_others(key)
    try:
        messages = () if meta is None else parse(meta)[0]
    except CorruptError:
        return
    if meta is None or not messages:
        return
    kind, asked = meta.get("kind"), describe(prefixes.kind)
    if kind == asked:
        what, same = "of another model, or of other weights than this one's", "the same model"
    else:
        stored = printable(kind) if isinstance(kind, str) else brief(kind)
        what = f"kept with the cache {stored}; got {printable(asked)}"
        same = "the same kind as cache="
    raise _refusal(prefixes, key, messages, what, same)


def _refusal(
    prefixes: PrefixStore, key: str, messages: tuple[Message, ...], what: str, same: str
) -> ValueError:
    tenant = f", tenant={brief(prefixes.tenant)}" if prefixes.tenant else ""
    return ValueError(
        f"the store has a conversation of {plural(len(messages), 'message')} under the "
        f"sequence_id {brief(key)}, {what}. Pass {same} to go on with it, or another sequence_id, "
        f"or remove it first: store.remove({brief(key)}{tenant})"
    )


def parse(meta: Mapping[str, Any]) -> tuple[tuple[Message, ...], int, float]:
    """Read messages, turns and seconds of a conversation from an entry's meta.

    Raises:
        CorruptError: it says something else.
    """
    messages, turns = meta.get("messages", []), meta.get("turns", 0)
    whole = isinstance(messages, list | tuple) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and says_something(message)
        and isinstance(message.get("content", ""), str | list | tuple)
        for message in messages
    )
    if not whole or type(turns) is not int or turns < 0:
        raise CorruptError("an entry whose messages are no conversation")
    return tuple(messages), turns, float(seconds_of(meta) or 0)
