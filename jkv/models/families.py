"""The families of decoders: how each writes its configuration, and what it calls its tensors.

Two readers per family, and nothing else in the library knows one by name: a function from the keys
of `config.json` to `Config`, and a table from the names of tensors to places in `Decoder`. In a
name, ``*`` is the number of a layer. A row of the table counts when the model that the
configuration describes has that place (a bias, an untied head); it is then required.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from jkv._text import brief, plural
from jkv.models.config import Config
from jkv.models.hf_keys import CONSTANTS, IRRELEVANT, QUANTIZATION, STATED, stated
from jkv.models.positions import read_rope
from jkv.models.settings import Settings

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_LAYERS = 1000  # more is a mistake, and would take minutes to find out


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor goes, and how it lies on disk.

    Attributes:
        kind: "array" is stored as it is; "linear" is a map written ``[outputs, inputs]``;
            "conv1d" is one written ``[inputs, outputs]``; "bias" belongs to such a map.
        targets: paths in the decoder. Several, where the tensor is fused: they follow each other
            along the outputs.
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


@dataclasses.dataclass(frozen=True)
class Family:
    """One line of models.

    Attributes:
        architecture: as `config.json` names it.
        configure: the fields of `Config`, but for those that every family shares.
        tensors: name on disk to place in the decoder.
        harmless: regular expressions of tensors that old versions saved and nobody needs.
        prefix: of every name, present or not.
    """

    architecture: str
    configure: Callable[[Settings], dict[str, Any]]
    tensors: Mapping[str, Place]
    harmless: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    prefix: str = ""


# Names of tensors ---------------------------------------------------------------------------------

_GPT2 = {
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

_LLAMA = _ATTENTION | _GATED | _MLP_NORM
_GLM = _ATTENTION | _FUSED | _MLP_NORM
_GLM4 = _GLM | {
    "model.layers.*.post_self_attn_layernorm.weight": _array("blocks.*.attention_post_norm.scale"),
    "model.layers.*.post_mlp_layernorm.weight": _array("blocks.*.mlp_post_norm.scale"),
}
# Gemma's norm of this name comes after the attention, where Llama's comes before the feed-forward.
_GEMMA2 = (
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


# Configurations -----------------------------------------------------------------------------------


def _gpt2(s: Settings) -> dict[str, Any]:
    # The names that transformers takes for the same.
    for name, other in (
        ("n_embd", "hidden_size"),
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
        ("n_positions", "max_position_embeddings"),
    ):
        s.alias(name, other)
    width, heads = s.integer("n_embd"), s.integer("n_head")
    if width % heads:
        s.problem(f"n_embd is {width} for {plural(heads, 'head')} (n_head); expected a multiple")
    head_dim = max(width // heads, 1)
    return {
        "layers": s.integer("n_layer", most=_LAYERS),
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": head_dim,
        "feed_forward": s.integer("n_inner", 4 * width, null=4 * width),
        "context": s.integer("n_positions"),
        "norm": "layer",
        "norm_eps": s.number("layer_norm_epsilon", 1e-5),
        "activation": s.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "attention_scale": None if s.flag("scale_attn_weights", True) else 1.0,
        "tied": s.flag("tie_word_embeddings", True),
    }


def _rotary(
    s: Settings,
    *,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    eps: float = 1e-6,
    tied: bool = False,
    partial: float | None = None,
    interleaved: bool = False,
) -> dict[str, Any]:
    """What Llama and its descendants share.

    Args:
        s: the keys.
        head_dim: where the configuration names none; None divides the width by the heads.
        kv_heads: where the configuration names none; None means as many as query heads.
        activation: the key's name and its default.
        eps: default of the norm's.
        tied: default of the output projection's.
        partial: default share of each head that turns, None where all of it always does.
        interleaved: how the turning dimensions pair.
    """
    width, heads = s.integer("hidden_size"), s.integer("num_attention_heads")
    default = head_dim or max(width // heads, 1)
    dim = s.integer("head_dim", default, null=default)
    context = s.integer("max_position_embeddings")
    rope, context = read_rope(s, dim, context, partial=partial, interleaved=interleaved)
    return {
        "layers": s.integer("num_hidden_layers", most=_LAYERS),
        "width": width,
        "heads": heads,
        "kv_heads": s.integer("num_key_value_heads", kv_heads or heads, null=heads),
        "head_dim": dim,
        "feed_forward": s.integer("intermediate_size"),
        "context": context,
        "norm_eps": s.number("rms_norm_eps", eps),
        "activation": s.choice(activation[0], _ACTIVATIONS, activation[1]),
        "rope": rope,
        "tied": s.flag("tie_word_embeddings", tied),
    }


def _llama(s: Settings) -> dict[str, Any]:
    bias = s.flag("attention_bias", False)
    return _rotary(s) | {
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": s.flag("mlp_bias", False),
    }


def _mistral(s: Settings) -> dict[str, Any]:
    shape = _rotary(s, kv_heads=8)
    window = s.integer("sliding_window", 4096, null=None)
    every = "full_attention" if window is None else "sliding_attention"
    s.words("layer_types", (every,), shape["layers"])
    return shape | {"windows": () if window is None else (window,) * shape["layers"]}


def _qwen_windows(s: Settings, layers: int) -> tuple[int | None, ...]:
    """Only the layers from `max_window_layers` on slide, and only when told to."""
    slides = s.flag("use_sliding_window", False)
    window = s.integer("sliding_window", 4096, null=None)
    first = s.raw("max_window_layers", 28)
    if slides and (not isinstance(first, int) or isinstance(first, bool) or first < 0):
        s.problem(f"max_window_layers is {brief(first)}; expected an integer of at least 0")
        first = 0
    kinds = s.words("layer_types", ("full_attention", "sliding_attention"), layers)
    if not slides:
        window = None
    if kinds is None:
        return tuple(window if slides and i >= first else None for i in range(layers))
    if window is None and "sliding_attention" in kinds:
        s.problem("layer_types has sliding_attention, and no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _qwen2(s: Settings) -> dict[str, Any]:
    shape = _rotary(s, kv_heads=32)
    s.expect("attention_bias", True)
    return shape | {"qkv_bias": True, "windows": _qwen_windows(s, shape["layers"])}


def _qwen3(s: Settings) -> dict[str, Any]:
    shape = _rotary(s, head_dim=128, kv_heads=32)
    bias = s.flag("attention_bias", False)
    return shape | {
        "qkv_bias": bias,
        "out_bias": bias,
        "qk_norm": True,
        "windows": _qwen_windows(s, shape["layers"]),
    }


def _glm(s: Settings) -> dict[str, Any]:
    shape = _rotary(s, head_dim=128, kv_heads=2, eps=1.5625e-7, partial=0.5, interleaved=True)
    return shape | {"qkv_bias": s.flag("attention_bias", True)}


def _glm4(s: Settings) -> dict[str, Any]:
    return _glm(s) | {"post_norms": True}


def _gemma2(s: Settings) -> dict[str, Any]:
    shape = _rotary(
        s,
        head_dim=256,
        kv_heads=4,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        tied=True,
    )
    s.ignore("hidden_act")  # written beside hidden_activation, which is the one that counts
    bias = s.flag("attention_bias", False)
    layers = shape["layers"]
    window = s.integer("sliding_window", 4096, null=None)
    kinds = s.words("layer_types", ("full_attention", "sliding_attention"), layers)
    if kinds is None:
        kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    return shape | {
        "qkv_bias": bias,
        "out_bias": bias,
        "norm_offset": 1.0,
        "post_norms": True,
        "embed_scale": shape["width"] ** 0.5,
        "windows": tuple(window if kind == "sliding_attention" else None for kind in kinds),
        "attention_scale": s.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "attention_softcap": s.number("attn_logit_softcapping", 50.0, null=None),
        "logit_softcap": s.number("final_logit_softcapping", 30.0, null=None),
    }


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        _gpt2,
        _GPT2,
        harmless=(r"h\.\d+\.attn\.(masked_)?bias",),
        prefix="transformer.",
    ),
    "llama": Family("LlamaForCausalLM", _llama, _LLAMA),
    "mistral": Family("MistralForCausalLM", _mistral, _LLAMA),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _LLAMA),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _LLAMA),
    "glm": Family("GlmForCausalLM", _glm, _GLM),
    "glm4": Family("Glm4ForCausalLM", _glm4, _GLM4),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, _GEMMA2),
}


def find(values: Mapping[str, Any], problems: list[str]) -> Family | None:
    """The family of a `config.json`, or None and a problem."""
    kind = values.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        problems.append(
            f"config.json: model_type is {brief(kind)}; the families known are "
            f"{', '.join(FAMILIES)}"
        )
        return None
    names = values.get("architectures")
    if names not in (None, [], [family.architecture]):
        problems.append(
            f"config.json: architectures is {brief(names)}; expected ['{family.architecture}'], "
            "a model with a language-model head"
        )
    return family


def read_config(
    values: Mapping[str, Any],
    family: Family,
    problems: list[str],
    end_ids: Any = None,
    ignore: Iterable[str] = (),
) -> Config | None:
    """`Config` as the keys of `config.json` describe it, or None and problems.

    Whether weights are quantized is not asked here: see `jkv.models.diagnose.quantization`.

    Args:
        values: of `config.json`.
        family: as `find` tells.
        problems: what is wrong is added here.
        end_ids: `eos_token_id` of `generation_config.json`, which outweighs `config.json`'s.
        ignore: keys to treat as absent; ``rope_scaling.x`` is the key x of the object rope_scaling.
    """
    ignored = set(ignore)
    s = Settings(values, problems, ignored)
    s.ignore("model_type", "architectures", *IRRELEVANT, *QUANTIZATION)
    fields = family.configure(s)
    for key in sorted(CONSTANTS.keys() - s.seen):
        s.expect(key, *CONSTANTS[key])
    vocab = s.integer("vocab_size")
    own = s.raw("eos_token_id")
    stops = _end_ids(s, own if end_ids is None else end_ids, vocab)
    dtype = _dtype(s)
    config = None
    if not s.broken:
        try:
            config = Config(
                family=str(values["model_type"]), vocab=vocab, end_ids=stops, dtype=dtype, **fields
            )
        except ValueError as error:
            problems.append(f"config.json: {error}")
    if config is None:
        s.ignore(*STATED)  # what the model does anyway is not known
    s.finish({} if config is None else stated(config, s.values))
    problems.extend(
        f"config.json: has no key {brief(key)}, which ignore= names" for key in sorted(ignored)
    )
    return config


def _end_ids(s: Settings, value: Any, vocab: int) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        s.problem(f"eos_token_id is {brief(value)}; expected an integer, a list of them, or null")
        return ()
    # An id that the model has no logit for never comes; tiny test models inherit such ids.
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab))


def _dtype(s: Settings) -> str:
    """Of the weights as the checkpoint says: "" where it says nothing."""
    old, new = s.raw("torch_dtype"), s.raw("dtype")
    value = old if new is None else new
    if value is None:
        return ""
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name == "float64":
        return "float32"
    if name not in ("float32", "bfloat16", "float16"):
        s.problem(f"dtype is {brief(value)}; expected float32, bfloat16 or float16")
        return ""
    return name
