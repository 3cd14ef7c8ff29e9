"""The finished directory, in the layout that Hugging Face's libraries read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer

from jkv import Config, Decoder
from training.corpus import END
from training.state import write_bytes

# A conversation as a play: the user is a citizen, the model answers as Romeo.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'CITIZEN:\\n' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ 'ROMEO:\\n' }}"
    "{%- elif message['role'] != 'system' -%}"
    "{{ raise_exception('a play has system, user and assistant, not ' + message['role']) }}"
    "{%- endif -%}"
    "{{ message['content'] | trim }}{{ '\\n\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ROMEO:\\n' }}{%- endif -%}"
)


def llama_tensors(model: Decoder) -> dict[str, np.ndarray]:
    """The weights under their Llama names, linear maps as ``[outputs, inputs]``."""
    tensors = {
        "model.embed_tokens.weight": model.embedding[...],
        "model.norm.weight": model.norm.scale[...],
    }
    for i, block in enumerate(model.blocks):
        name = f"model.layers.{i}"
        tensors[f"{name}.input_layernorm.weight"] = block.attention_norm.scale[...]
        tensors[f"{name}.post_attention_layernorm.weight"] = block.mlp_norm.scale[...]
        for letter in "qkvo":
            linear = getattr(block.attention, letter)
            tensors[f"{name}.self_attn.{letter}_proj.weight"] = linear.kernel[...]
        for part in ("gate", "up", "down"):
            linear = getattr(block.mlp, part)
            tensors[f"{name}.mlp.{part}_proj.weight"] = linear.kernel[...]
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def llama_config(config: Config) -> dict[str, Any]:
    """`config.json` as transformers 4 and 5 both read it."""
    rope = config.rope
    if rope is None or rope.rule != "default" or not config.tied:
        raise ValueError("only a tied Llama with plain rotary positions can be written")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.02,
        "use_cache": True,
        # The file holds bfloat16 to be small; these ask that it be read as float32.
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def tokenizer_config(context: int) -> dict[str, Any]:
    """`tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        # transformers 4 would also make token_type_ids, which a Llama refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }


def rounded(tensor: np.ndarray) -> np.ndarray:
    """As it is stored."""
    return tensor.astype(ml_dtypes.bfloat16)


def write_directory(out: Path, model: Decoder, tokenizer: Tokenizer, card: str) -> int:
    """Write a checkpoint that `jkv.load` and `transformers` read, and return its bytes.

    Weights are rounded to bfloat16. Files of other names in `out` are left alone.
    """
    tensors = {name: rounded(tensor) for name, tensor in llama_tensors(model).items()}
    files = {
        "config.json": _json(llama_config(model.config)),
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": _json(tokenizer_config(model.config.context)),
        "README.md": card.encode(),
        # transformers refuses a file that does not say which framework's layout it is.
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
    }
    for name, data in files.items():
        write_bytes(out / name, data)
    return sum(map(len, files.values()))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
