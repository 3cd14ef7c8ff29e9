"""The published shapes of well-known models, to plan with before anything is downloaded."""

from __future__ import annotations

import re
from typing import Any

from jkv.models.config import Config, Rope


def _gpt2(layers: int, width: int, heads: int) -> Config:
    """Radford et al. 2019; positions in a table, biases everywhere, heads of 64."""
    return Config(
        family="gpt2",
        vocab=50257,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        feed_forward=4 * width,
        context=1024,
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=True,
        end_ids=(50256,),
        dtype="float32",
    )


def _llama(
    family: str,
    shape: tuple[int, int, int, int, int],
    vocab: int,
    context: int,
    theta: float = 1e4,
    *,
    head_dim: int | None = None,
    rope: dict[str, Any] | None = None,
    **more: Any,
) -> Config:
    """Everything since: rotary positions, RMSNorm, a gated feed-forward layer.

    Args:
        family: name for people.
        shape: layers, width, query heads, key/value heads, feed-forward width.
        vocab: tokens.
        context: tokens that the model was made for.
        theta: base of the rotary wavelengths.
        head_dim: where it is not width / heads.
        rope: more about the rotary positions.
        more: fields of `Config`.
    """
    layers, width, heads, kv_heads, feed_forward = shape
    head_dim = head_dim or width // heads
    turns: dict[str, Any] = {"theta": theta, "dims": head_dim}
    more.setdefault("dtype", "bfloat16")
    return Config(
        family=family,
        vocab=vocab,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward=feed_forward,
        context=context,
        rope=Rope(**(turns | (rope or {}))),
        **more,
    )


def _llama3(
    shape: tuple[int, int, int, int, int], factor: float | None = None, **more: Any
) -> Config:
    """Llama 3 (arXiv:2407.21783); with a factor its successors, of 128K tokens."""
    scaled = {"rule": "llama3", "factor": factor, "original_context": 8192}
    return _llama(
        "llama",
        shape,
        vocab=128256,
        context=8192 if factor is None else 131072,
        theta=5e5,
        rope=None if factor is None else scaled,
        **more,
    )


def _qwen2(shape: tuple[int, int, int, int, int], vocab: int, **more: Any) -> Config:
    """Qwen2.5 (arXiv:2412.15115): biases on queries, keys and values."""
    return _llama("qwen2", shape, vocab, 32768, 1e6, norm_eps=1e-6, qkv_bias=True, **more)


def _qwen3(shape: tuple[int, int, int, int, int], **more: Any) -> Config:
    """Qwen3 (arXiv:2505.09388): heads of 128 whatever the width, their queries and keys normed."""
    return _llama(
        "qwen3", shape, 151936, 40960, 1e6, head_dim=128, norm_eps=1e-6, qk_norm=True, **more
    )


def _glm(family: str, **more: Any) -> Config:
    """GLM-4 (arXiv:2406.12793): half of each head turns, and two key/value heads."""
    return _llama(
        family,
        (40, 4096, 32, 2, 13696),
        151552,
        qkv_bias=True,
        rope={"dims": 64, "interleaved": True},
        **more,
    )


def _gemma2(
    shape: tuple[int, int, int, int, int], head_dim: int, attention_scale: float = 1 / 16
) -> Config:
    """Gemma 2 (arXiv:2408.00118): every other layer sees 4096 tokens."""
    return _llama(
        "gemma2",
        shape,
        256000,
        8192,
        head_dim=head_dim,
        norm_eps=1e-6,
        norm_offset=1.0,
        activation="gelu_tanh",
        post_norms=True,
        tied=True,
        embed_scale=shape[1] ** 0.5,
        windows=tuple(None if i % 2 else 4096 for i in range(shape[0])),
        attention_scale=attention_scale,
        attention_softcap=50.0,
        logit_softcap=30.0,
    )


_70B = (80, 8192, 64, 8, 28672)
_8B = (32, 4096, 32, 8, 14336)

# Layers, width, query heads, key/value heads, feed-forward width; the rest is the family's.
PRESETS: dict[str, Config] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "llama-2-7b": _llama("llama", (32, 4096, 32, 32, 11008), 32000, 4096, dtype="float16"),
    "llama-2-13b": _llama("llama", (40, 5120, 40, 40, 13824), 32000, 4096, dtype="float16"),
    "llama-2-70b": _llama("llama", _70B, 32000, 4096, dtype="float16"),
    "llama-3-8b": _llama3(_8B),
    "llama-3-70b": _llama3(_70B),
    "llama-3.1-8b": _llama3(_8B, 8.0),
    "llama-3.1-70b": _llama3(_70B, 8.0),
    "llama-3.1-405b": _llama3((126, 16384, 128, 8, 53248), 8.0),
    "llama-3.2-1b": _llama3((16, 2048, 32, 8, 8192), 32.0, tied=True),
    "llama-3.2-3b": _llama3((28, 3072, 24, 8, 8192), 32.0, tied=True),
    "mistral-7b-v0.1": _llama("mistral", _8B, 32000, 32768, windows=(4096,) * 32),
    "mistral-7b-v0.3": _llama("mistral", _8B, 32768, 32768, 1e6),
    "qwen2.5-0.5b": _qwen2((24, 896, 14, 2, 4864), 151936, tied=True),
    "qwen2.5-1.5b": _qwen2((28, 1536, 12, 2, 8960), 151936, tied=True),
    "qwen2.5-3b": _qwen2((36, 2048, 16, 2, 11008), 151936, tied=True),
    "qwen2.5-7b": _qwen2((28, 3584, 28, 4, 18944), 152064),
    "qwen2.5-14b": _qwen2((48, 5120, 40, 8, 13824), 152064),
    "qwen2.5-32b": _qwen2((64, 5120, 40, 8, 27648), 152064),
    "qwen2.5-72b": _qwen2((80, 8192, 64, 8, 29568), 152064),
    "qwen3-0.6b": _qwen3((28, 1024, 16, 8, 3072), tied=True),
    "qwen3-1.7b": _qwen3((28, 2048, 16, 8, 6144), tied=True),
    "qwen3-4b": _qwen3((36, 2560, 32, 8, 9728), tied=True),
    "qwen3-8b": _qwen3((36, 4096, 32, 8, 12288)),
    "qwen3-14b": _qwen3((40, 5120, 40, 8, 17408)),
    "qwen3-32b": _qwen3((64, 5120, 64, 8, 25600)),
    "glm-4-9b": _glm("glm", context=131072, norm_eps=1.5625e-7),
    "glm-4-9b-0414": _glm("glm4", context=32768, post_norms=True),
    "gemma-2-2b": _gemma2((26, 2304, 8, 4, 9216), 256),
    "gemma-2-9b": _gemma2((42, 3584, 16, 8, 14336), 256),
    "gemma-2-27b": _gemma2((46, 4608, 32, 16, 36864), 128, attention_scale=1 / 12),
}
"""The published models that `jkv.plan` knows by name, and the configuration of each."""


def preset(name: str) -> Config | None:
    """Return the shape of that name, None for none; case and punctuation do not count."""
    return _PLAIN.get(_plain(name))


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


_PLAIN = {_plain(name): config for name, config in PRESETS.items()}
