"""Text to ids and back, and a conversation to text, as the checkpoint's own files say."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias

import jax
import numpy as np
import tokenizers

from jkv._text import brief
from jkv.errors import UnsupportedError
from jkv.models import template as _template
from jkv.models import tokenizer_files
from jkv.models.continuation import Continuation
from jkv.models.files import TEMPLATE_LIMIT, TOKENIZER_LIMIT, parse_json, read_json, read_text
from jkv.models.token_bytes import TokenBytes

_MOST_TEMPLATES = 100


class Tokenizer:
    """A `tokenizer.json` with the special tokens and chat templates that lie beside it.

    Attributes:
        special: names to special tokens ("bos_token": "<s>"), as templates call them.
        templates: names to chat templates; the usual one is "default".
        directory: where its files lie; None where it was made from other things than files.

    Example:
        >>> ids = lm.tokenizer.encode("ROMEO: Ay")
        >>> lm.tokenizer.decode(ids), lm.tokenizer.vocab
        ('ROMEO: Ay', 1024)
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        special: Mapping[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ):
        # Saved for training: a prompt must be neither cut nor filled up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.special = dict(special or {})
        self.templates = dict(templates or {})
        self.directory = directory

    def __repr__(self) -> str:
        chat = ", ".join(self.templates) or "none"
        return f"Tokenizer({self.vocab} tokens, chat templates: {chat})"

    def to_json(self) -> str:
        """Return what a `tokenizer.json` holds."""
        return self._tokenizer.to_str(pretty=True)

    @property
    def vocab(self) -> int:
        """Tokens, added ones included; a model's own V may be larger."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token as it is written in the vocabulary."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Encode a text that begins a row.

        A text that already begins with what the checkpoint puts first, as a rendered chat template
        mostly does, does not get it twice.

        Args:
            text: any.
            special: add what the checkpoint puts around a text, mostly a start token.

        Raises:
            ValueError: something else than a text, or one that is not valid Unicode.
        """
        _check_text(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=special)
        ids, added = encoding.ids, encoding.special_tokens_mask
        first = added.index(0) if 0 in added else 0
        if first and ids[first : 2 * first] == ids[:first]:
            return ids[first:]
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Encode a text that goes on from another one.

        No special tokens are added, and none of the spaces that a tokenizer puts before a text:
        what comes before, decoded together with these ids, goes on with exactly this text. From a
        token that is written out in the text ("</s>") on, it is encoded as in any other text.

        Args:
            text: any; "" has no ids.

        Raises:
            ValueError: something else than a text, or one that is not valid Unicode.
        """
        _check_text(text)
        return self._continuation.encode(text)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token, special or not, adds to the middle of a text."""
        return self._bytes[token]

    def is_special(self, token: int) -> bool:
        """Return whether `decode` omits a token."""
        return token in self._special_texts

    def without_special(self, text: str) -> str:
        """Remove the texts of special tokens, as `decode` does."""
        texts = sorted(self._special_texts.values(), key=len, reverse=True)
        return re.sub("|".join(map(re.escape, texts)), "", text) if texts else text

    @functools.cached_property
    def _continuation(self) -> Continuation:
        return Continuation(self._tokenizer)

    @functools.cached_property
    def _bytes(self) -> TokenBytes:
        return TokenBytes(self._tokenizer)

    @functools.cached_property
    def _special_texts(self) -> dict[int, str]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {i: token.content for i, token in added.items() if token.special}

    def decode(self, ids: Ids, *, skip_special: bool = True) -> str:
        """Decode a row of ids; -1 (padding) is skipped.

        Args:
            ids: a list or array of integers ``[T]``.
            skip_special: leave special tokens out.

        Raises:
            ValueError: something else than ids.
        """
        return self._tokenizer.decode(_ids(ids), skip_special_tokens=skip_special)

    def chat(
        self,
        messages: object,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        template: str | None = None,
        **values: Any,
    ) -> str:
        """Write a conversation as the model was trained to read it.

        Args:
            messages: a list of mappings, each with a "role" and a "content"; dataclasses and
                pydantic models do as well. Fields that are None are left out.
            add_generation_prompt: end where the assistant's next words begin; the default, unless
                the last message is to be continued.
            continue_final_message: end within the last message, for the model to go on with; a
                text names the field to go on with instead of "content".
            template: which, where the checkpoint has several: by default "tool_use" if there are
                tools and such a template, else "default".
            values: what else its template takes, such as `enable_thinking`, or `tools`: JSON
                schemas, or functions with annotations and docstrings, which become schemas.

        Raises:
            UnsupportedError: there is no such template, or it refuses these messages, or takes too
                much work or memory.
            ValueError: messages of another form, a message that cannot be continued, or both
                `add_generation_prompt` and `continue_final_message`.

        Example:
            >>> messages = [{"role": "user", "content": "Hello"}]
            >>> lm.tokenizer.chat(messages, enable_thinking=False).split()
            ['CITIZEN:', 'Hello', 'ROMEO:']
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "got add_generation_prompt and continue_final_message; expected one: the model "
                "either begins a message or continues the last one"
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        source = self.template_source(template, tools=values.get("tools") is not None)
        given: dict[str, Any] = {"tools": None, "documents": None} | self.special | values
        return _template.render(
            source,
            messages,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **given,
        )

    def template_source(self, template: str | None = None, *, tools: bool = False) -> str:
        """Return the chat template that `chat` renders.

        Args:
            template: its name; by default "tool_use" if there are tools and such a template, else
                "default".
            tools: whether there are tools.

        Raises:
            UnsupportedError: there is no such template.
        """
        if template is None:
            template = "tool_use" if tools and "tool_use" in self.templates else "default"
        if template not in self.templates:
            have = f"it has {', '.join(self.templates)}" if self.templates else "it has none"
            raise UnsupportedError(
                f"the checkpoint has no chat template {brief(template)} ({have}): write the "
                "prompt as a text, or load a checkpoint made for chat"
            )
        return self.templates[template]

    def chat_ids(self, messages: object, **options: Any) -> list[int]:
        """Encode `chat`'s text, in which the template has written all special tokens itself.

        Args:
            messages: as of `chat`.
            options: as of `chat`.
        """
        return self.encode(self.chat(messages, **options), special=False)


Ids: TypeAlias = Sequence[SupportsIndex] | np.ndarray | jax.Array  # a row of ids, [T]


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"encode got {type(text).__name__}; expected a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"encode got a text that is not valid Unicode: {error}") from error


def _ids(values: Ids) -> list[int]:
    if isinstance(values, str | bytes | Mapping):
        raise ValueError(f"decode got {type(values).__name__}; expected a row of ids")
    if hasattr(values, "ndim"):
        array = np.asarray(values)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"decode got an array of shape {array.shape} and dtype {array.dtype}; expected "
                "a row of ids, integers [T] (lm.decode takes several rows)"
            )
        values = array.tolist()
    try:
        ids = [operator.index(value) for value in values]
    except TypeError as error:
        raise ValueError(
            f"decode got {brief(values)}; expected a row of ids, integers [T] (lm.decode takes "
            "several rows)"
        ) from error
    if ids and not -1 <= min(ids) <= max(ids) < 2**32:
        raise ValueError(
            f"decode got ids from {min(ids)} to {max(ids)}; expected 0 upwards, or -1 for padding"
        )
    return [i for i in ids if i >= 0]


def read_tokenizer(directory: Path, problems: list[str]) -> Tokenizer | None:
    """Read the tokenizer of a checkpoint, None where it has no `tokenizer.json`.

    Args:
        directory: of the checkpoint.
        problems: what is wrong is added here.
    """
    text = read_text(directory / "tokenizer.json", problems, limit=TOKENIZER_LIMIT, optional=True)
    values = None if text is None else parse_json(text, "tokenizer.json", problems)
    if values is None:
        return None
    special, added, config = (
        read_json(directory / name, problems, limit=TOKENIZER_LIMIT, optional=True) or {}
        for name in ("special_tokens_map.json", "added_tokens.json", "tokenizer_config.json")
    )
    # Problems of config.json are reported where all of it is read.
    model_type = (read_json(directory / "config.json", []) or {}).get("model_type")
    tokenizer = tokenizer_files.build(values, config, model_type, problems)
    if tokenizer is None:
        return None
    names = tokenizer_files.add_tokens(tokenizer, config, special, added, problems)
    templates = _templates(special.get("chat_template"), problems)
    templates |= _templates(config.get("chat_template"), problems)
    templates |= _template_files(directory, problems)
    return Tokenizer(tokenizer, names, templates, directory)


def _template_files(directory: Path, problems: list[str]) -> dict[str, str]:
    """Templates in files of their own, which count more than those in tokenizer_config.json."""
    paths = {"default": directory / "chat_template.jinja"}
    folder = directory / "additional_chat_templates"
    if folder.is_dir():
        more = sorted(path for path in folder.iterdir() if path.suffix == ".jinja")
        if len(more) > _MOST_TEMPLATES:
            problems.append(
                f"{folder.name}: holds {len(more)} templates; expected at most {_MOST_TEMPLATES}"
            )
        paths |= {path.stem: path for path in more[:_MOST_TEMPLATES]}
    texts = {
        name: read_text(path, problems, limit=TEMPLATE_LIMIT, optional=True)
        for name, path in paths.items()
    }
    return {name: text for name, text in texts.items() if text is not None}


def _templates(value: object, problems: list[str]) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    named = value if isinstance(value, list) else [value]
    pairs: list[Any] = [(v.get("name"), v.get("template")) for v in named if isinstance(v, dict)]
    if len(pairs) == len(named) and all(isinstance(x, str) for pair in pairs for x in pair):
        return dict(pairs)
    problems.append("tokenizer_config.json: chat_template is no text and no list of named ones")
    return {}
