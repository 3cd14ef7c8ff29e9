"""What a `config.json` may say, and how it is told that it may not."""

from __future__ import annotations

import re

import pytest

import jkv
from jkv.errors import CheckpointError
from jkv.models import families

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
        "the weights are quantized with gptq (quantization_config of config.json)",
    ),
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


# As published on the hub, in the versions of transformers that wrote them.
PUBLISHED = {
    "gpt2": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "Llama 3.2 1B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "SmolLM2": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 49152,
    },
    "Mistral 7B v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Qwen2.5 0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Gemma 2 2B": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 107],
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.4",
        "use_cache": True,
        "vocab_size": 256000,
    },
    "GLM-4 9B 0414": {
        "architectures": ["Glm4ForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 13696,
        "max_position_embeddings": 32768,
        "model_type": "glm4",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "pad_token_id": 151329,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.0.dev0",
        "use_cache": True,
        "vocab_size": 151552,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    """Nothing in them is unknown, and every key matters or is known not to."""
    values, problems = PUBLISHED[name], []
    family = families.find(values, problems)
    assert family is not None
    config = families.read_config(values, family, problems)
    assert problems == []
    assert config is not None
    assert config.tied == (
        name in ("gpt2", "Llama 3.2 1B", "SmolLM2", "Qwen2.5 0.5B", "Gemma 2 2B")
    )
    stop = values["eos_token_id"]
    assert config.end_ids == (tuple(stop) if isinstance(stop, list) else (stop,))
    assert config.layers == values.get("num_hidden_layers", 12)
    assert config.dtype == values.get("torch_dtype", "")
    assert set(config.windows) == {
        "Mistral 7B v0.1": {4096},
        "Gemma 2 2B": {4096, None},
        "Qwen2.5 0.5B": {None},
    }.get(name, set())
