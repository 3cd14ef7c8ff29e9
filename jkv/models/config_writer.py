"""The writer of a `Config` as the `config.json` that its family reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jkv.errors import UnsupportedError
from jkv.models import families
from jkv.models.config import Config, Rope

_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}


def write_config(config: Config) -> dict[str, Any]:
    """Return the keys of `config.json` that describe a model.

    Raises:
        UnsupportedError: no family describes it.
    """
    names = [config.family] if config.family in families.FAMILIES else list(families.FAMILIES)
    for name in names:
        values = _values(config, name)
        if reads_as(values, config):
            return values
    what = f"the family {config.family}" if len(names) == 1 else "any family"
    raise UnsupportedError(
        f"save cannot describe this model in the words of {what}: expected a Config as the "
        f"configuration of {', '.join(names)} can state it"
    )


def reads_as(values: Mapping[str, Any], config: Config, end_ids: object = None) -> bool:
    """Return whether `config.json` with these keys describes a model, of any dtype.

    Args:
        values: of `config.json`.
        config: the model.
        end_ids: `eos_token_id` of `generation_config.json`.
    """
    problems: list[str] = []
    family = families.find(values, problems)
    read = None if family is None else families.read_config(values, family, problems, end_ids)
    return read is not None and not problems and _normalise(read) == _normalise(config)


def _normalise(config: Config) -> Config:
    """Normalise fields that can be written in two ways, and drop the family and dtype."""
    windows = tuple(config.window(i) for i in range(config.layers))
    return dataclasses.replace(
        config, family="", dtype="", windows=windows, attention_scale=config.scale
    )


def _values(config: Config, name: str) -> dict[str, Any]:
    """Return the keys that a family writes, for a model that it may or may not describe."""
    family = families.FAMILIES[name]
    windows = [config.window(i) for i in range(config.layers)]
    window = next((w for w in windows if w is not None), None)
    rope = config.rope or Rope()
    scalar = config.scale**-2
    ends = list(config.end_ids)
    values = {
        "architectures": [family.architecture],
        "model_type": name,
        "vocab_size": config.vocab,
        "tie_word_embeddings": config.tied,
        "eos_token_id": None if not ends else ends[0] if len(ends) == 1 else ends,
        "bos_token_id": None,
        "pad_token_id": None,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.feed_forward,
        "n_positions": config.context,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": _ACTIVATIONS[config.activation].replace("_pytorch_tanh", "_new"),
        "scale_attn_weights": config.scale != 1.0,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": _scaling(rope),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": config.layers,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
        "partial_rotary_factor": rope.dims / config.head_dim,
        "query_pre_attn_scalar": (round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "hidden_act": _ACTIVATIONS[config.activation],
        "hidden_activation": _ACTIVATIONS[config.activation],
    }
    return {key: values[key] for key in (*families.SHARED_KEYS, *family.keys)}


def _scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.rule == "default":
        return None
    values: dict[str, Any] = {"rope_type": rope.rule, "factor": rope.factor}
    if rope.rule in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = rope.original_context
    if rope.rule == "llama3":
        values |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    if rope.rule == "yarn":
        values |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.magnitude,
            "truncate": rope.truncate,
        }
    return values
