"""Building a tokenizer from a checkpoint's files, as transformers 5 does.

`tokenizer.json` alone is not what transformers uses. Tokens that stand in other files only are
added, and for some classes of `tokenizer_config.json` parts are made anew: `LlamaTokenizer` puts a
space before the first word of a text only (before each text behind a special token with `legacy`),
where older `tokenizer.json` files do it behind every special token. Two differences to transformers
are meant: an id that a file gives and the tokenizer does not is an error here, and a
`GPT2Tokenizer` keeps how its `tokenizer.json` splits digits, which transformers drops.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import tokenizers

from jkv._text import brief

_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_BYTE_LEVEL_CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer")
_MOST_IDS = 1 << 32  # of tokenizers


def build(
    values: dict[str, Any], config: Mapping[str, Any], model_type: object, problems: list[str]
) -> tokenizers.Tokenizer | None:
    """Build the tokenizer of a `tokenizer.json`.

    Args:
        values: of `tokenizer.json`.
        config: of `tokenizer_config.json`.
        model_type: of `config.json`.
        problems: what is wrong is added here.
    """
    for charsmap in _charsmaps({k: v for k, v in values.items() if k != "model"}):
        if not _is_charsmap(charsmap):
            problems.append(
                "tokenizer.json: its precompiled_charsmap is damaged: it states another size than "
                "it has"
            )
            return None
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(_adapt(values, config, model_type)))
    except BaseException as error:  # the bare class, or that of a panic, is what tokenizers raises
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        problems.append(f"tokenizer.json: {brief(str(error))}")
        return None


def _charsmaps(value: object) -> Iterator[Any]:
    """Yield the compiled character maps of SentencePiece in any part."""
    if isinstance(value, dict):
        if value.get("type") == "Precompiled":
            yield value.get("precompiled_charsmap")
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _charsmaps(item)


def _is_charsmap(text: object) -> bool:
    """Return whether a map has its stated size; tokenizers would allocate up to 8 GB, and abort."""
    if not isinstance(text, str):
        return False
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    size = int.from_bytes(data[:4], "little")
    return len(data) >= 4 and 0 < size <= len(data) - 4 and size % 1024 == 0


# What transformers makes anew ---------------------------------------------------------------------


def _adapt(values: dict[str, Any], config: Mapping[str, Any], model_type: object) -> dict[str, Any]:
    name = config.get("tokenizer_class")
    name = name.removesuffix("Fast") if isinstance(name, str) else None
    name = "GPT2Tokenizer" if name is None and model_type == "gpt2" else name
    splitter, model = values.get("pre_tokenizer"), values.get("model")
    has_bytes = any(part.get("type") == "ByteLevel" for part in _parts(splitter))
    if (
        name in _BYTE_LEVEL_CLASSES
        and isinstance(splitter, dict)
        and has_bytes
        and model_type in ("gpt2", "llama", "qwen2", "qwen3")
    ):
        prefix = config.get("add_prefix_space") is True
        return values | {"pre_tokenizer": _with_prefix(splitter, prefix)}
    is_bpe = isinstance(model, dict) and model.get("type") == "BPE"
    if name == "LlamaTokenizer" and model_type == "llama" and is_bpe and not has_bytes:
        return _llama(values, config)
    return values


def _parts(splitter: object) -> list[dict[str, Any]]:
    """Return the parts of a pre-tokenizer."""
    if not isinstance(splitter, dict):
        return []
    parts = splitter.get("pretokenizers")
    if splitter.get("type") != "Sequence" or not isinstance(parts, list):
        return [splitter]
    return [inner for part in parts for inner in _parts(part)]


def _with_prefix(splitter: dict[str, Any], prefix: bool) -> dict[str, Any]:
    """Set whether a byte-level pre-tokenizer puts a space first."""
    if splitter.get("type") == "ByteLevel":
        return splitter | {"add_prefix_space": prefix}
    if splitter.get("type") == "Sequence":
        parts = [_with_prefix(part, prefix) for part in splitter["pretokenizers"]]
        return splitter | {"pretokenizers": parts}
    return splitter


def _llama(values: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Build what `LlamaTokenizer` makes of a vocabulary and its merges."""
    prefix = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy") else "first") if prefix else "never"
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return values | {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": scheme,
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": values["model"].get("vocab"),
            "merges": values["model"].get("merges"),
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


# Tokens of other files ----------------------------------------------------------------------------


def add_tokens(
    tokenizer: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    special: Mapping[str, Any],
    added: Mapping[str, Any],
    problems: list[str],
) -> dict[str, str]:
    """Add the tokens that stand in other files than `tokenizer.json`.

    Args:
        tokenizer: to add them to.
        config: of `tokenizer_config.json`.
        special: of `special_tokens_map.json`.
        added: of `added_tokens.json`.
        problems: what is wrong is added here.

    Returns:
        The special tokens that have names, as templates call them ("bos_token": "<s>").
    """
    where = "tokenizer_config.json: added_tokens_decoder"
    stated: list[tuple[int, Any]] = []
    if "added_tokens_decoder" in config:
        # Then the two older files do not count.
        special = config
        entries = config["added_tokens_decoder"]
        entries = entries.items() if isinstance(entries, Mapping) else [(None, entries)]
        for key, value in entries:
            if not _is_id(key) or _content(value) is None:
                problems.append(f"{where} holds {brief({key: value})}; expected ids and tokens")
                return {}
            stated.append((int(key), value))
    else:
        special = {**config, **special}
        where = "added_tokens.json"
        marked = set(_named_tokens(special).values()) | {_content(v) for v in _extra(special)}
        for token, i in added.items():
            whole = isinstance(i, int) and not isinstance(i, bool) and 0 <= i < _MOST_IDS
            if not whole or _content(token) is None:
                problems.append(f"{where} holds {brief({token: i})}; expected tokens and ids")
                return {}
            stated.append(
                (
                    i,
                    {
                        "content": token,
                        "special": token in marked,
                        "normalized": token not in marked,
                    },
                )
            )
    stated.sort(key=lambda pair: pair[0])
    names = _named_tokens(special)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known |= {_content(value) for _, value in stated}
    more: list[Any] = [special[name] for name in names if isinstance(special.get(name), str | dict)]
    more += [value for value in _extra(special) if _content(value) is not None]
    tokens = [_token(value, is_special=_content(value) in names.values()) for _, value in stated]
    for value in more:
        if _content(value) not in known:
            known.add(_content(value))
            tokens.append(_token(value, is_special=True))
    tokenizer.add_tokens(tokens)
    for i, value in stated:
        found = tokenizer.token_to_id(str(_content(value)))
        if found != i:
            problems.append(
                f"{where} gives the token {brief(_content(value))} the id {i}; with tokenizer.json "
                f"it has {found}"
            )
    return names


def _is_id(text: object) -> TypeGuard[str]:
    # Python refuses to read thousands of digits.
    return isinstance(text, str) and text.isdecimal() and len(text) <= 10 and int(text) < _MOST_IDS


def _content(value: object) -> str | None:
    """Return the text of a token, a text or an object; None if it is empty or no Unicode."""
    value = value.get("content") if isinstance(value, dict) else value
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        return None
    return value or None


def _named_tokens(values: Mapping[str, Any]) -> dict[str, str]:
    """Return special tokens with names, the usual ones first, then a model's own."""
    found = {f"{word}_token": _content(values.get(f"{word}_token")) for word in _NAMED}
    own = {k: _content(v) for k, v in values.items() if k.endswith("_token") and k not in found}
    extra = values.get("extra_special_tokens")
    if isinstance(extra, dict):
        own |= {name: _content(value) for name, value in extra.items()}
    return {name: token for name, token in (found | own).items() if token is not None}


def _extra(values: Mapping[str, Any]) -> list[Any]:
    """Special tokens without names."""
    extra = values.get("extra_special_tokens")
    if isinstance(extra, dict):
        return list(extra.values())
    extra = extra or values.get("additional_special_tokens")
    return extra if isinstance(extra, list) else []


def _token(value: object, *, is_special: bool) -> tokenizers.AddedToken:
    fields = value if isinstance(value, dict) else {}
    special = is_special or fields.get("special") is True
    flags = {name: fields.get(name) is True for name in ("lstrip", "rstrip", "single_word")}
    normalized = fields.get("normalized", not special) is True
    return tokenizers.AddedToken(
        str(_content(value)), special=special, normalized=normalized, **flags
    )
