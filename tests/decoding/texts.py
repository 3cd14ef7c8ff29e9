"""Tokenizers in miniature, and a language model that speaks in them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Inner

import jkv
from jkv._pytree import pytree
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


BOS, EOS, BYTES, SPACE = 1, 2, 3, 259  # of `sentencepiece`: ids, the first byte's, a space's
PREFIXES = ("prepend", "metaspace", "first")


def sentencepiece(prefix: str = "prepend", *, eos: bool = False, template: Any = None) -> Tokenizer:
    """Llama's way as a whole: <s> first, a space before each text that is stripped in decoding.

    Args:
        prefix: how the space comes there: a normalizer's, or Metaspace's "always" or "first".
        eos: whether </s> comes last.
        template: for chat.
    """
    vocab = {"<unk>": 0, "<s>": BOS, "</s>": EOS} | {f"<0x{b:02X}>": b + BYTES for b in range(256)}
    for piece in ("▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "#"):
        vocab[piece] = len(vocab)
    inner = Inner(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
    if prefix == "prepend":
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        scheme = {"metaspace": "always"}.get(prefix, prefix)
        inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if eos else "<s> $A",
        pair="<s> $A $B",
        special_tokens=[("<s>", BOS), ("</s>", EOS)],
    )
    return Tokenizer(inner, {}, {} if template is None else {"default": template})


@pytree
class Script:
    """A sampler that says given tokens whatever the logits."""

    tokens: Any  # [T]

    def init(self, tokens: Any, vocab: int) -> Any:
        del tokens, vocab
        return jnp.int32(0)

    def update(self, logits: Any, state: Any, token: Any) -> tuple[Any, Any]:
        del token
        want = self.tokens[state]
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        return jnp.where(ids == want, 1e9, logits), state + 1


def noise(config: Any, tokenizer: Tokenizer | None = None, **changes: Any) -> jkv.LM:
    """A decoder of random weights, with the byte-level tokenizer where no other is given."""
    own: dict[str, Any] = {"vocab": VOCAB, "end_ids": (END,)}
    if tokenizer is not None:
        own = {"vocab": tokenizer.vocab, "end_ids": ()}
    config = dataclasses.replace(config, **(own | changes))
    model = jkv.Decoder(config, rngs=nnx.Rngs(1))
    model.embedding[...] = model.embedding[...] * 50
    tokenizer = byte_level() if tokenizer is None else tokenizer
    return jkv.LM(model=model, config=config, tokenizer=tokenizer, source="noise")
