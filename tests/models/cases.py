"""The tiny models that jkv and transformers are compared on: awkward on purpose.

Heads do not divide the width, key/value heads are one, some or all, windows are shorter than the
prompts, and rotary scaling starts within them. `old` lists keys to rewrite as transformers 4 did.
"""

from __future__ import annotations

from typing import Any

_LLAMA = {
    "vocab_size": 19,
    "hidden_size": 12,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GLM = _LLAMA | {"head_dim": 8, "rms_norm_eps": 1e-5, "eos_token_id": [2, 3]}


def _case(kind: str, base: dict[str, Any], old: bool = False, **config: Any) -> dict[str, Any]:
    return {"model_type": kind, "config": base | config, "old": old}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0} | values}


_GPT2 = {
    "vocab_size": 19,
    "n_embd": 15,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GEMMA2 = _LLAMA | {
    "num_hidden_layers": 3,
    "sliding_window": 5,
    "query_pre_attn_scalar": 10,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 7.0,
    "pad_token_id": 0,
}

CASES: dict[str, dict[str, Any]] = {
    "gpt2": _case("gpt2", _GPT2),
    "gpt2-old": _case(
        "gpt2",
        _GPT2,
        old=True,
        n_inner=14,
        activation_function="relu",
        scale_attn_weights=False,
        tie_word_embeddings=False,
    ),
    "llama-mha": _case("llama", _LLAMA, num_key_value_heads=4, tie_word_embeddings=True),
    "llama-gqa-old": _case(
        "llama", _LLAMA, old=True, attention_bias=True, mlp_bias=True, hidden_act="gelu"
    ),
    "llama-mqa": _case("llama", _LLAMA, num_key_value_heads=1, num_hidden_layers=3),
    "llama3": _case("llama", _LLAMA, **_rope("llama3", **_LLAMA3)),
    "llama3-old": _case("llama", _LLAMA, old=True, **_rope("llama3", **_LLAMA3)),
    "llama-linear-old": _case("llama", _LLAMA, old=True, **_rope("linear", factor=3.0)),
    "llama-yarn": _case(
        "llama",
        _LLAMA,
        **_rope(
            "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=0.5
        ),
    ),
    "mistral-window": _case("mistral", _LLAMA, sliding_window=5),
    "mistral-mqa-old": _case(
        "mistral", _LLAMA, old=True, sliding_window=None, num_key_value_heads=1
    ),
    "mistral-mha": _case("mistral", _LLAMA, sliding_window=4, num_key_value_heads=4),
    "qwen2-gqa": _case("qwen2", _LLAMA | {"hidden_size": 24}, head_dim=None),
    "qwen2-windows-old": _case(
        "qwen2",
        _LLAMA | {"hidden_size": 24},
        old=True,
        head_dim=None,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
    "qwen2-mqa": _case(
        "qwen2",
        _LLAMA | {"hidden_size": 24},
        head_dim=None,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen3-gqa": _case("qwen3", _LLAMA, **_rope("yarn", factor=2.0)),
    "qwen3-mha-old": _case(
        "qwen3", _LLAMA, old=True, num_key_value_heads=4, tie_word_embeddings=True
    ),
    "qwen3-mqa": _case("qwen3", _LLAMA, num_key_value_heads=1, attention_bias=True),
    "glm-gqa": _case("glm", _GLM),
    "glm-mqa-old": _case("glm", _GLM, old=True, num_key_value_heads=1, attention_bias=False),
    "glm4-gqa": _case("glm4", _GLM),
    "glm4-mha-old": _case(
        "glm4",
        _GLM,
        old=True,
        num_key_value_heads=4,
        **_rope("default", partial_rotary_factor=0.25),
    ),
    "glm4-mqa": _case("glm4", _GLM, num_key_value_heads=1, tie_word_embeddings=True),
    "gemma2-gqa": _case("gemma2", _GEMMA2),
    "gemma2-mqa-old": _case("gemma2", _GEMMA2, old=True, num_key_value_heads=1),
    "gemma2-mha": _case(
        "gemma2",
        _GEMMA2,
        num_key_value_heads=4,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    ),
}

STORIES_PROMPTS = [
    "Once upon a time",
    "The cat sat",
    "Lily and Tom",
    "One day, a little boy named Tim went to the park",
    "There was a big red ball",
    "The dog was very happy because",
    "Mom said",
    "In the forest there lived a bear who liked to",
    "She looked at the sky and saw",
    "A",
    "Ben had a toy car. He",
    "It was a sunny day and the birds were singing in the trees. Anna wanted to",
    "The end",
    '"Can I have a cookie?" asked',
    "zebra quickly jumped 42 times!",
    "",
]


def as_version_4(values: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 4 would have written it."""
    values = dict(values)
    values["torch_dtype"] = values.pop("dtype")
    values["transformers_version"] = "4.45.0"
    values.pop("layer_types", None)
    if values["model_type"] == "gemma2":
        values.pop("tie_word_embeddings")
    rope = values.pop("rope_parameters", None)
    if rope is None:
        return values
    rope = dict(rope)
    values["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        values["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    name = "type" if kind == "linear" else "rope_type"
    values["rope_scaling"] = None if kind == "default" else {name: kind, **rope}
    return values
