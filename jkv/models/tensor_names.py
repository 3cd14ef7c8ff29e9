"""The names of tensors in checkpoints, and their places in `Decoder`, as families share them."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor goes, and how it is stored on disk.

    Attributes:
        kind: "array" is stored as it is; "linear" is a map written ``[outputs, inputs]``;
            "conv1d" is one written ``[inputs, outputs]``; "bias" belongs to such a map.
        targets: paths in the decoder; several for a fused tensor, one after another along its
            outputs.
    """

    kind: Literal["array", "linear", "conv1d", "bias"]
    targets: tuple[str, ...]


def _array(target: str) -> Place:
    return Place("array", (target,))


def _linear(*targets: str) -> Place:
    return Place("linear", targets)


def _conv1d(*targets: str) -> Place:
    return Place("conv1d", targets)


def _bias(*targets: str) -> Place:
    return Place("bias", targets)


GPT2 = {
    "wte.weight": _array("embedding"),
    "wpe.weight": _array("positions"),
    "h.*.ln_1.weight": _array("blocks.*.attention_norm.scale"),
    "h.*.ln_1.bias": _array("blocks.*.attention_norm.bias"),
    "h.*.attn.c_attn.weight": _conv1d(
        "blocks.*.attention.q", "blocks.*.attention.k", "blocks.*.attention.v"
    ),
    "h.*.attn.c_attn.bias": _bias(
        "blocks.*.attention.q", "blocks.*.attention.k", "blocks.*.attention.v"
    ),
    "h.*.attn.c_proj.weight": _conv1d("blocks.*.attention.o"),
    "h.*.attn.c_proj.bias": _bias("blocks.*.attention.o"),
    "h.*.ln_2.weight": _array("blocks.*.mlp_norm.scale"),
    "h.*.ln_2.bias": _array("blocks.*.mlp_norm.bias"),
    "h.*.mlp.c_fc.weight": _conv1d("blocks.*.mlp.up"),
    "h.*.mlp.c_fc.bias": _bias("blocks.*.mlp.up"),
    "h.*.mlp.c_proj.weight": _conv1d("blocks.*.mlp.down"),
    "h.*.mlp.c_proj.bias": _bias("blocks.*.mlp.down"),
    "ln_f.weight": _array("norm.scale"),
    "ln_f.bias": _array("norm.bias"),
    "lm_head.weight": _linear("head"),
}

_ATTENTION = {
    "model.embed_tokens.weight": _array("embedding"),
    "model.norm.weight": _array("norm.scale"),
    "lm_head.weight": _linear("head"),
    "model.layers.*.input_layernorm.weight": _array("blocks.*.attention_norm.scale"),
    "model.layers.*.self_attn.q_proj.weight": _linear("blocks.*.attention.q"),
    "model.layers.*.self_attn.q_proj.bias": _bias("blocks.*.attention.q"),
    "model.layers.*.self_attn.k_proj.weight": _linear("blocks.*.attention.k"),
    "model.layers.*.self_attn.k_proj.bias": _bias("blocks.*.attention.k"),
    "model.layers.*.self_attn.v_proj.weight": _linear("blocks.*.attention.v"),
    "model.layers.*.self_attn.v_proj.bias": _bias("blocks.*.attention.v"),
    "model.layers.*.self_attn.o_proj.weight": _linear("blocks.*.attention.o"),
    "model.layers.*.self_attn.o_proj.bias": _bias("blocks.*.attention.o"),
    "model.layers.*.self_attn.q_norm.weight": _array("blocks.*.attention.q_norm.scale"),
    "model.layers.*.self_attn.k_norm.weight": _array("blocks.*.attention.k_norm.scale"),
}

_GATED = {
    "model.layers.*.mlp.gate_proj.weight": _linear("blocks.*.mlp.gate"),
    "model.layers.*.mlp.gate_proj.bias": _bias("blocks.*.mlp.gate"),
    "model.layers.*.mlp.up_proj.weight": _linear("blocks.*.mlp.up"),
    "model.layers.*.mlp.up_proj.bias": _bias("blocks.*.mlp.up"),
    "model.layers.*.mlp.down_proj.weight": _linear("blocks.*.mlp.down"),
    "model.layers.*.mlp.down_proj.bias": _bias("blocks.*.mlp.down"),
}

_FUSED = {
    "model.layers.*.mlp.gate_up_proj.weight": _linear("blocks.*.mlp.gate", "blocks.*.mlp.up"),
    "model.layers.*.mlp.down_proj.weight": _linear("blocks.*.mlp.down"),
}

_MLP_NORM = {"model.layers.*.post_attention_layernorm.weight": _array("blocks.*.mlp_norm.scale")}

LLAMA = _ATTENTION | _GATED | _MLP_NORM
GLM = _ATTENTION | _FUSED | _MLP_NORM
GLM4 = GLM | {
    "model.layers.*.post_self_attn_layernorm.weight": _array("blocks.*.attention_post_norm.scale"),
    "model.layers.*.post_mlp_layernorm.weight": _array("blocks.*.mlp_post_norm.scale"),
}
# Gemma's norm of this name comes after the attention, where Llama's comes before the feed-forward.
GEMMA2 = (
    _ATTENTION
    | _GATED
    | {
        "model.layers.*.post_attention_layernorm.weight": _array(
            "blocks.*.attention_post_norm.scale"
        ),
        "model.layers.*.pre_feedforward_layernorm.weight": _array("blocks.*.mlp_norm.scale"),
        "model.layers.*.post_feedforward_layernorm.weight": _array("blocks.*.mlp_post_norm.scale"),
    }
)
