"""What a turn may be, and what a chat template may be given: checked, as messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from jkv._text import brief
from jkv.decoding.conversation import Message
from jkv.errors import UnsupportedError
from jkv.models.template import plain_message, says_something


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


class _Pydantic(Protocol):
    def model_dump(self) -> dict[str, Any]: ...


Given = Mapping[str, Any] | _Dataclass | _Pydantic  # a message
Turn = str | Given | Sequence[Given]
Tool = Mapping[str, Any] | Callable[..., Any]  # a JSON schema, or a function that becomes one

# What the template reads and `Chat` writes.
_OWN = ("messages", "add_generation_prompt", "continue_final_message")


def text_message(role: str, content: object) -> Message:
    """Return a message of plain text.

    Raises:
        TypeError: another content.
    """
    if not isinstance(content, str):
        raise TypeError(f"the {role}'s message is {brief(content)}; expected a text")
    return {"role": role, "content": content}


def new_messages(turn: object) -> tuple[Message, ...]:
    """Return what a turn adds to the conversation.

    Raises:
        TypeError: neither a text nor messages.
        ValueError: a message without a content, or with what JSON cannot hold.
    """
    if isinstance(turn, str):
        return (text_message("user", turn),)
    given = turn if isinstance(turn, list | tuple) else [turn]
    plain = [plain_message(message) for message in given]
    messages = tuple(message for message in plain if message is not None)
    if not messages or len(messages) < len(plain):
        raise TypeError(
            f"the user's message is {brief(turn)}; expected a text, a message such as "
            "{'role': 'tool', 'content': ...}, or a list of messages"
        )
    for message in messages:
        content = message.get("content", "")
        if not says_something(message) or not isinstance(content, str | list | tuple):
            raise ValueError(
                f"a message is {brief(message)}; expected a content that is a text or a list of "
                "parts, or tool_calls instead"
            )
    return messages


def begins_turn(messages: tuple[Message, ...], i: int) -> bool:
    """Tell whether a user asks something new here, after an answer."""
    return messages[i]["role"] == "user" and messages[i - 1]["role"] == "assistant"


def check_values(source: str, tools: object, values: Mapping[str, object]) -> None:
    """Refuse what the template would not look at, which is mostly an argument misspelt.

    Raises:
        TypeError: a name that the template does not hold, or that is not the user's to give.
        UnsupportedError: tools for a template that holds none.
    """
    if tools and not _reads(source, "tools"):
        raise UnsupportedError(
            "tools were given, but the checkpoint's chat template reads none: describe them in "
            "system=, or load a checkpoint made for tools"
        )
    for name in values:
        if name in _OWN:
            raise TypeError(f"got {name}, which Chat gives the template itself; leave it out")
        if not _reads(source, name):
            raise TypeError(
                f"got {name}, which is no argument of Chat and is not read by the checkpoint's "
                "chat template; leave it out, or correct its name"
            )


def _reads(source: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", source) is not None
