"""The keys of `config.json` that change nothing, and the values with which others do not.

A key that no reader knows is accepted if its value is null, if it is in `IRRELEVANT`, or if it
says what the model does anyway: `CONSTANTS` holds for every model, `stated` for one. Whatever
else is unknown may change what the model computes, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from jkv._text import brief
from jkv.models.config import Config, Rope

# What a decoder computes does not depend on these: names and versions, training, the code that
# runs it, other heads than the language model's, and how text is generated (the caller of
# `jkv.generate` says that). `auto_map` names code of the checkpoint's own, which is never run: the
# family says what the model computes.
IRRELEVANT = frozenset(
    # One word per line would be three screens.
    """
    _name_or_path name_or_path model_name base_model license transformers_version _commit_hash
    auto_map tokenizer_class processor_class custom_pipelines transformers.js_config
    is_llama_config unsloth_fixed unsloth_version is_composition is_decoder pretraining_tp

    task_specific_params finetuning_task problem_type id2label label2id num_labels _num_labels
    classifier_dropout classifier_activation summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout predict_special_tokens n_special loss_type
    output_router_logits router_aux_loss_coef keys_to_ignore_at_inference

    initializer_range initializer_cutoff_factor init_std init_method attention_dropout
    attn_dropout attn_pdrop resid_pdrop embd_pdrop resid_dropout residual_dropout hidden_dropout
    hidden_dropout_prob attention_probs_dropout_prob embedding_dropout activation_dropout
    ffn_dropout mlp_dropout mlp_pdrop ffn_pdrop classifier_dropout_prob lora_dropout dropout
    layerdrop gradient_checkpointing neftune_noise_alpha tie_last_hidden_states label_smoothing
    aux_loss_alpha seed ignore_index
    tokenizer_padding_side padding_side tokenizer_model_max_length model_max_length
    max_sequence_length max_seq_length max_seq_len seq_length n_ctx

    torchscript tf_legacy_loss use_bfloat16 fp16 bf16 use_cache return_dict
    return_dict_in_generate output_attentions output_hidden_states output_scores output_past
    output_logits attn_implementation _attn_implementation _attn_implementation_autoset
    _attn_implementation_internal _experts_implementation _flash_attn_2_enabled use_flash_attn
    use_flash_attention use_flash_attention_2 flash_attention use_flash_attn_2
    reorder_and_upcast_attn cache_implementation cache_config chunk_size_feed_forward
    tensor_parallel_size model_parallel device_map low_cpu_mem_usage trust_remote_code

    bos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id
    decoder_start_token_id bos_token eos_token pad_token unk_token prefix max_length min_length
    max_new_tokens min_new_tokens max_time do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_return_sequences remove_invalid_values renormalize_logits
    """.split()  # noqa: SIM905
)

# These would matter: only the values that change nothing are accepted, and null.
CONSTANTS: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "bidirectional": (False,),
    "pruned_heads": ({},),
    "sparsity_config": ({},),
    "per_layer_config": ({},),
    "use_mrope": (False,),
    "alibi": (False,),
    "use_alibi": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "lm_head_bias": (False,),
    "num_experts": (0,),
    "num_experts_per_tok": (0,),
    "mlp_only_layers": ([],),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "use_moe": (False,),
    "num_nextn_predict_layers": (0,),
    "mtp_num_layers": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
}

# They say that weights are quantized, and by what: see `jkv.models.diagnose.quantization`.
QUANTIZATION = {
    "quantization_config": "",
    "quantization": "MLX",
    "compression_config": "compressed-tensors",
}

_ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    "relu": ("relu",),
}
_GATED = {"silu": ("swiglu",), "gelu": ("geglu",), "gelu_tanh": ("geglu",), "relu": ("reglu",)}


def stated(config: Config, values: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the values with which keys of other families say what this model does anyway.

    Args:
        config: the model, as its family's reader understood it.
        values: of `config.json`.

    Returns:
        For each key the values accepted.
    """
    windows = set(config.windows) or {None}
    window = next(iter(windows - {None}), None)
    # Where a checkpoint says that nothing slides, how wide it would be means nothing.
    idle = window is None and values.get("use_sliding_window") is False
    kinds = [_layer_type(config.window(i)) for i in range(config.layers)]
    activation = _ACTIVATIONS[config.activation]
    bias = tuple({config.qkv_bias, config.out_bias, config.mlp_bias})
    bias = bias if len(bias) == 1 else ()
    rope = config.rope
    found: dict[str, tuple[Any, ...]] = {
        "sliding_window": (values.get("sliding_window") if idle else window,),
        "sliding_window_size": (values.get("sliding_window_size") if idle else window,),
        "use_sliding_window": (window is not None,),
        "max_window_layers": (
            values.get("max_window_layers") if window is None else config.layers,
        ),
        "layer_types": (kinds,),
        "hidden_size": (config.width,),
        "num_hidden_layers": (config.layers,),
        "num_attention_heads": (config.heads,),
        "num_key_value_heads": (config.kv_heads,),
        "num_key_value_groups": (config.heads // config.kv_heads,),
        "head_dim": (config.head_dim,),
        "intermediate_size": (config.feed_forward,),
        "max_position_embeddings": (config.context,),
        "multi_query": (config.kv_heads == 1,),
        "multi_query_attention": (config.kv_heads == 1,),
        "rms_norm_eps": (config.norm_eps,) if config.norm == "rms" else (),
        "layer_norm_eps": (config.norm_eps,) if config.norm == "layer" else (),
        "hidden_act": activation,
        "hidden_activation": activation,
        "activation_function": activation,
        "activation": (*activation, *(_GATED[config.activation] if config.gated else ())),
        "attention_bias": (config.qkv_bias,),
        "qkv_bias": (config.qkv_bias,),
        "use_qkv_bias": (config.qkv_bias,),
        "add_qkv_bias": (config.qkv_bias,),
        "attention_out_bias": (config.out_bias,),
        "mlp_bias": (config.mlp_bias,),
        "use_bias": bias,
        "bias": bias,
        "qk_norm": (config.qk_norm,),
        "use_qk_norm": (config.qk_norm,),
        "qk_layernorm": (config.qk_norm,),
        "use_post_norm": (config.post_norms,),
        "embedding_multiplier": (config.embed_scale,),
        "attention_multiplier": (config.scale,),
        "attn_logit_softcapping": (config.attention_softcap,),
        "final_logit_softcapping": (config.logit_softcap,),
        "position_embedding_type": ("absolute",) if rope is None else ("rope", "rotary"),
    }
    if rope is not None:
        share = rope.dims / config.head_dim
        interleaved = (rope.interleaved,)
        found |= {"rope_interleaved": interleaved, "rope_interleave": interleaved}
        found |= dict.fromkeys(("rotary_pct", "rotary_percent", "partial_rotary_factor"), (share,))
        found |= {"rotary_dim": (rope.dims,), "rotary_emb_base": (rope.theta,)}
    return found


def _layer_type(window: int | None) -> str:
    return "full_attention" if window is None else "sliding_attention"


# The keys of `stated`, the same for every model.
STATED = frozenset(stated(Config(1, 1, 2, 1, 1, 2, 1, 1, rope=Rope(dims=2)), {}))


def equal(a: object, b: object) -> bool:
    """Compare two JSON values: 4096 is 4096.0, and neither 0 is false nor 1 true."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def check_ignore(ignore: Any) -> tuple[str, ...]:
    """Return the keys that a user wants ignored.

    Raises:
        ValueError: other things than texts.
    """
    keys = (ignore,) if isinstance(ignore, str) else ignore
    many = isinstance(keys, Sequence | Set) and not isinstance(keys, bytes)
    if not many or not all(isinstance(key, str) for key in keys):
        raise ValueError(
            f"load got ignore={brief(ignore)}; expected names of keys of config.json, such "
            "as ('use_flash_attn',)"
        )
    return tuple(keys)
