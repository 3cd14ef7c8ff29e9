"""What a `config.json` may say, and how it is told that it may not."""

from __future__ import annotations

import re

import pytest

import jkv
from jkv.errors import CheckpointError

# Case, changes to its config.json (... removes a key), and what the error must say.
REFUSED = {
    "family": ("llama-mqa", {"model_type": "mamba"}, "model_type is 'mamba'"),
    "no family": ("llama-mqa", {"model_type": ...}, "model_type is None"),
    "a list as family": ("llama-mqa", {"model_type": ["llama"]}, "model_type is"),
    "architecture": (
        "llama-mqa",
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures is",
    ),
    "unknown key": ("llama-mqa", {"mystery": 1}, "unknown key mystery = 1"),
    "missing size": ("llama-mqa", {"hidden_size": ...}, "hidden_size is missing"),
    "size as text": ("llama-mqa", {"hidden_size": "12"}, "hidden_size is '12'"),
    "size of zero": ("llama-mqa", {"vocab_size": 0}, "vocab_size is 0"),
    "true as a size": ("llama-mqa", {"num_hidden_layers": True}, "num_hidden_layers is True"),
    "absurd size": ("llama-mqa", {"vocab_size": 10**30}, "vocab_size is 1000"),
    "absurd depth": ("llama-mqa", {"num_hidden_layers": 10**8}, "num_hidden_layers is"),
    "heads": ("llama-mqa", {"num_key_value_heads": 3}, "4 heads over 3 kv_heads"),
    "odd rotation": ("llama-mqa", {"head_dim": 5}, "5 of each head's 5 dimensions"),
    "activation": ("llama-mqa", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
    "epsilon": ("llama-mqa", {"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    "epsilon that is none": ("llama-mqa", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "flag": ("llama-mqa", {"attention_bias": 0}, "attention_bias is 0; expected true or false"),
    "dtype": ("llama-mqa", {"dtype": "float8"}, "dtype is 'float8'"),
    "end": ("llama-mqa", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    "ends": ("llama-mqa", {"eos_token_id": [1, None]}, "eos_token_id is [1, None]"),
    "quantized": (
        "llama-mqa",
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config is {'quant_method': 'gptq'}, which is not implemented",
    ),
    "own code": ("llama-mqa", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map is"),
    "encoder": ("llama-mqa", {"is_encoder_decoder": True}, "is_encoder_decoder is True"),
    "partial rotation": ("llama-mqa", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "qwen without biases": ("qwen2-gqa", {"attention_bias": False}, "attention_bias is False"),
    "layer types": ("qwen2-gqa", {"layer_types": ["full_attention"]}, "layer_types is"),
    "unknown layer type": (
        "qwen2-gqa",
        {"layer_types": ["full_attention", "linear_attention"]},
        "layer_types is",
    ),
    "slides without a window": (
        "qwen2-gqa",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "no sliding_window is in use",
    ),
    "first sliding layer": (
        "qwen2-gqa",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": None},
        "max_window_layers is None",
    ),
    "mixed mistral": (
        "mistral-window",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types is",
    ),
    "window": ("mistral-window", {"sliding_window": 0}, "sliding_window is 0"),
    "softcap": ("gemma2-gqa", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
    "both ways": (
        "gemma2-gqa",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention is True",
    ),
    "scale by layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx is True",
    ),
    "heads of gpt2": ("gpt2", {"n_head": 4}, "n_embd is 15 for 4 heads"),
}

# The same keys with values that mean something known: these load.
ACCEPTED = {
    "no architecture": ("llama-mqa", {"architectures": None}),
    "known but idle": ("llama-mqa", {"use_cache": False, "pretraining_tp": 2, "torchscript": True}),
    "generation": ("llama-mqa", {"temperature": 0.7, "max_length": 20, "do_sample": True}),
    "training": ("gpt2", {"resid_pdrop": 0.3, "summary_type": "last", "n_ctx": 32}),
    "swish": ("llama-mqa", {"hidden_act": "swish"}),
    "nulls": ("llama-mqa", {"quantization_config": None, "auto_map": None, "pruned_heads": {}}),
    "torch's name": ("llama-mqa", {"dtype": "torch.bfloat16"}),
    "no dtype": ("llama-mqa", {"dtype": ...}),
    "whole rotation": ("llama-mqa", {"partial_rotary_factor": 1.0}),
    "no head_dim": ("qwen2-gqa", {"head_dim": None}),
    "qwen with biases": ("qwen2-gqa", {"attention_bias": True}),
    "window that is off": ("qwen2-gqa", {"sliding_window": 3, "layer_types": ...}),
    "mistral's types": ("mistral-window", {"layer_types": ["sliding_attention"] * 2}),
    "gemma's other key": ("gemma2-gqa", {"hidden_act": "gelu"}),
    "integer for a float": ("gemma2-gqa", {"attn_logit_softcapping": 5}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what, checkpoint):
    name, changes, message = REFUSED[what]
    copy = checkpoint(name)
    copy.config(**changes)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        jkv.load(copy.path)


@pytest.mark.parametrize("what", ACCEPTED)
def test_accepted(what, checkpoint):
    name, changes = ACCEPTED[what]
    copy = checkpoint(name)
    copy.config(**changes)
    assert jkv.load(copy.path).config.family == name.split("-")[0]


def test_window_that_is_off(checkpoint):
    copy = checkpoint("qwen2-gqa")
    copy.config(sliding_window=3, layer_types=...)
    assert set(jkv.load(copy.path).config.windows) <= {None}
    copy.config(use_sliding_window=True, max_window_layers=1)
    assert jkv.load(copy.path).config.windows == (None, 3)
    copy.config(max_window_layers=28)
    assert jkv.load(copy.path).config.windows == (None, None)


def test_defaults_of_the_families(checkpoint):
    """Keys that may be absent mean what they mean to transformers."""
    copy = checkpoint("mistral-window")
    copy.config(sliding_window=..., rope_parameters=..., rms_norm_eps=..., eos_token_id=...)
    config = jkv.load(copy.path).config
    assert config.windows == (4096, 4096)
    assert config.rope.theta == 10000.0
    assert (config.norm_eps, config.end_ids) == (1e-6, ())
    copy = checkpoint("llama-mha")
    copy.config(num_key_value_heads=None)
    assert jkv.load(copy.path).config.kv_heads == 4


@pytest.mark.parametrize(
    ("own", "generation", "wanted"),
    [
        (2, ..., (2,)),
        ([2, 3, 2], ..., (2, 3)),
        (None, ..., ()),
        (2, 5, (5,)),
        (2, [5, 6], (5, 6)),
        (None, [5], (5,)),
        (2, None, (2,)),
        (50256, ..., ()),
    ],
)
def test_end_ids(own, generation, wanted, checkpoint):
    """Those of generation_config.json outweigh config.json's; ids that cannot come are dropped."""
    copy = checkpoint()
    copy.config(eos_token_id=own)
    if generation is not ...:
        copy.json("generation_config.json", eos_token_id=generation, temperature=0.5)
    assert jkv.load(copy.path).config.end_ids == wanted


def test_all_problems_at_once(checkpoint):
    """Configuration, weights, tokenizer: one error names everything."""
    copy = checkpoint()
    copy.config(mystery=1, hidden_act="quick_gelu", quantization_config={"bits": 4})
    copy.weights.unlink()
    (copy.path / "tokenizer.json").write_text("{")
    (copy.path / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError) as error:
        jkv.load(copy.path)
    text = str(error.value)
    assert str(copy.path) in text
    for part in ("mystery", "quick_gelu", "quantization_config", "model.safetensors", "tokenizer"):
        assert part in text
    assert "generation_config.json: holds []" in text
    assert text.count("\n  - ") == 6


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": ' * 100_000, "\xff"])
def test_config_that_is_no_json_object(text, checkpoint):
    copy = checkpoint()
    (copy.path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        jkv.load(copy.path)


def test_no_config(checkpoint):
    copy = checkpoint()
    (copy.path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        jkv.load(copy.path)
