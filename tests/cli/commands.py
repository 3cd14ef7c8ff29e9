"""Checkpoints for the command line, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import jkv
from tests.decoding import texts

KEYS = [
    "model",
    "cache",
    "dtype",
    "outputs",
    "prefill_seconds",
    "decode_seconds",
    "tokens_per_second",
    "cache_bytes",
    "compile_seconds",
    "attention",
]

GENERATE = ("generate", "--model")

NINE = ("--max-new-tokens", "9")

CUTS = ("--top-k", "2", "--top-p", "0.5", "--min-p", "0.9")  # the likeliest is in all of them


def write_checkpoint(directory: Path, template: str | None = texts.TEMPLATE) -> str:
    """A Llama of one layer with random weights and the byte-level tokenizer."""
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": texts.VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": texts.END,
    }
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = texts.byte_level(template)
    (directory / "tokenizer.json").write_text(tokenizer._tokenizer.to_str())
    settings = {} if template is None else {"chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    shapes = {
        "embed_tokens": (texts.VOCAB, 16),
        "norm": (16,),
        "layers.0.input_layernorm": (16,),
        "layers.0.post_attention_layernorm": (16,),
        "layers.0.self_attn.q_proj": (16, 16),
        "layers.0.self_attn.k_proj": (8, 16),
        "layers.0.self_attn.v_proj": (8, 16),
        "layers.0.self_attn.o_proj": (16, 16),
        "layers.0.mlp.gate_proj": (24, 16),
        "layers.0.mlp.up_proj": (24, 16),
        "layers.0.mlp.down_proj": (16, 24),
    }
    rng = np.random.default_rng(1)
    weights = {
        f"model.{name}.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def reference(lm: jkv.LM, prompts: list[str], **asked: Any) -> Any:
    """What `jkv.generate` returns, with the programs that the command has compiled."""
    blocks = jkv.stream(lm, prompts, **asked)
    list(blocks)
    return blocks.result
