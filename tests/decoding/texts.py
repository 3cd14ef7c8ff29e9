"""Tokenizers in miniature, and a language model that speaks in them."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner

import jkv
from jkv.models import Tokenizer

VOCAB = 261
TURN, END = 259, 260
# Roles by their first letters: each token is one more step, each size of a prompt one more program.
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role[0] }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>a\n{% endif %}"
)


def byte_level(template: str | None = TEMPLATE) -> Tokenizer:
    """GPT-2's way: each token is some bytes, written with printable characters."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"he": 256, "Ġw": 257, "\u010a\u010a": 258}
    inner = Inner(models.BPE(vocab=vocab, merges=[("h", "e"), ("Ġ", "w"), ("Ċ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<|turn|>", "<|end|>")])
    return Tokenizer(inner, {}, {} if template is None else {"default": template})


def byte_fallback() -> Tokenizer:
    """Llama's way: pieces, and a token for each byte of what has no piece."""
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
    vocab |= {"▁": 257, "a": 258, "▁the": 259, "é": 260}
    inner = Inner(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(inner)


def noise(config: Any, **changes: Any) -> jkv.LM:
    """A decoder of random weights with the byte-level tokenizer."""
    config = dataclasses.replace(config, vocab=VOCAB, end_ids=(END,), **changes)
    model = jkv.Decoder(config, rngs=nnx.Rngs(1))
    model.embedding[...] = model.embedding[...] * 50
    return jkv.LM(model=model, config=config, tokenizer=byte_level(), source="noise")
