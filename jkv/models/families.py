"""The families of decoders: one row each of `FAMILIES`, which has all that differs between them.

Nothing else in the library knows a family by name. A row has a function from the keys of
`config.json` to the fields of `Config`, the keys that are written when such a model is saved, and a
table from the names of tensors to places in `Decoder`. In a tensor's name, ``*`` is the number of a
layer. An entry of that table applies if the configured model has that place (a bias, an untied
head), and the tensor is then required.

To add a family, write its row, and the function and tables that no other family shares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jkv._text import brief, plural
from jkv.models import tensor_names
from jkv.models.config import Config
from jkv.models.hf_config import HFConfig
from jkv.models.hf_keys import CONSTANTS, IRRELEVANT, QUANTIZATION, STATED, stated
from jkv.models.rope_config import read_rope
from jkv.models.tensor_names import Place

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
class Family:
    """One family of models.

    Attributes:
        architecture: its name in `config.json`.
        configure: reads the fields of `Config`, except those that every family shares.
        keys: keys of `config.json` that a saved model has, after `SHARED_KEYS`.
        tensors: name on disk to place in the decoder.
        harmless: regular expressions of tensors that old versions saved and no model uses.
        prefix: of every tensor's name, present or not.
    """

    architecture: str
    configure: Callable[[HFConfig], dict[str, Any]]
    keys: tuple[str, ...]
    tensors: Mapping[str, Place]
    harmless: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    prefix: str = ""


# Configurations -----------------------------------------------------------------------------------


def _gpt2(s: HFConfig) -> dict[str, Any]:
    # transformers accepts these names too.
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
    s: HFConfig,
    *,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    tied: bool = False,
    partial: float | None = None,
    interleaved: bool = False,
) -> dict[str, Any]:
    """Read the fields that Llama and its descendants share.

    Args:
        s: the keys.
        head_dim: where the configuration names none; None divides the width by the heads.
        kv_heads: where the configuration names none; None means as many as query heads.
        activation: the key's name and its default.
        eps: the key's name and its default, of the norms.
        tied: default of the output projection's.
        partial: default share of each head that is rotated, None where all of it always is.
        interleaved: how the rotated dimensions are paired.
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
        "norm_eps": s.number(*eps),
        "activation": s.choice(activation[0], _ACTIVATIONS, activation[1]),
        "rope": rope,
        "tied": s.flag("tie_word_embeddings", tied),
    }


def _llama(s: HFConfig) -> dict[str, Any]:
    bias = s.flag("attention_bias", False)
    return _rotary(s) | {
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": s.flag("mlp_bias", False),
    }


def _mistral(s: HFConfig) -> dict[str, Any]:
    shape = _rotary(s, kv_heads=8)
    window = s.integer("sliding_window", 4096, null=None)
    every = "full_attention" if window is None else "sliding_attention"
    s.words("layer_types", (every,), shape["layers"])
    return shape | {"windows": () if window is None else (window,) * shape["layers"]}


def _qwen_windows(s: HFConfig, layers: int) -> tuple[int | None, ...]:
    """Read the windows of Qwen: layers from `max_window_layers` on, if windows are enabled."""
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


def _qwen2(s: HFConfig) -> dict[str, Any]:
    shape = _rotary(s, kv_heads=32)
    s.expect("attention_bias", True)
    return shape | {"qkv_bias": True, "windows": _qwen_windows(s, shape["layers"])}


def _qwen3(s: HFConfig) -> dict[str, Any]:
    shape = _rotary(s, head_dim=128, kv_heads=32)
    bias = s.flag("attention_bias", False)
    return shape | {
        "qkv_bias": bias,
        "out_bias": bias,
        "qk_norm": True,
        "windows": _qwen_windows(s, shape["layers"]),
    }


def _glm(s: HFConfig) -> dict[str, Any]:
    eps = ("rms_norm_eps", 1.5625e-7)
    shape = _rotary(s, head_dim=128, kv_heads=2, eps=eps, partial=0.5, interleaved=True)
    return shape | {"qkv_bias": s.flag("attention_bias", True)}


def _glm4(s: HFConfig) -> dict[str, Any]:
    return _glm(s) | {"post_norms": True}


def _gemma2(s: HFConfig) -> dict[str, Any]:
    shape = _rotary(
        s,
        head_dim=256,
        kv_heads=4,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        tied=True,
    )
    s.ignore("hidden_act")  # checkpoints have it too, but only hidden_activation is used
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


# Keys of `config.json` that are written ----------------------------------------------------------

SHARED_KEYS = (
    "architectures",
    "model_type",
    "vocab_size",
    "tie_word_embeddings",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
)
_GPT2_KEYS = (
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "n_positions",
    "layer_norm_epsilon",
    "activation_function",
    "scale_attn_weights",
)
_ROTARY_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
)
_LLAMA_KEYS = (*_ROTARY_KEYS, "attention_bias", "mlp_bias", "hidden_act")
_MISTRAL_KEYS = (*_ROTARY_KEYS, "sliding_window", "hidden_act")
_WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_QWEN2_KEYS = (*_ROTARY_KEYS, *_WINDOW_KEYS, "hidden_act")
_QWEN3_KEYS = (*_ROTARY_KEYS, *_WINDOW_KEYS, "attention_bias", "hidden_act")
_GLM_KEYS = (*_ROTARY_KEYS, "attention_bias", "partial_rotary_factor", "hidden_act")
_GEMMA2_KEYS = (
    *_ROTARY_KEYS,
    "attention_bias",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_activation",
)


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        _gpt2,
        _GPT2_KEYS,
        tensor_names.GPT2,
        harmless=(r"h\.\d+\.attn\.(masked_)?bias",),
        prefix="transformer.",
    ),
    "llama": Family("LlamaForCausalLM", _llama, _LLAMA_KEYS, tensor_names.LLAMA),
    "mistral": Family("MistralForCausalLM", _mistral, _MISTRAL_KEYS, tensor_names.LLAMA),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _QWEN2_KEYS, tensor_names.LLAMA),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _QWEN3_KEYS, tensor_names.LLAMA),
    "glm": Family("GlmForCausalLM", _glm, _GLM_KEYS, tensor_names.GLM),
    "glm4": Family("Glm4ForCausalLM", _glm4, _GLM_KEYS, tensor_names.GLM4),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, _GEMMA2_KEYS, tensor_names.GEMMA2),
}


def find(values: Mapping[str, Any], problems: list[str]) -> Family | None:
    """Return the family of a `config.json`, or None and a problem."""
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
    end_ids: object = None,
    ignore: Iterable[str] = (),
) -> Config | None:
    """Read a `Config` from the keys of `config.json`, or return None and problems.

    Quantized weights are not looked for here, see `jkv.models.diagnose.quantization`.

    Args:
        values: of `config.json`.
        family: as `find` returns it.
        problems: problems are appended to this list.
        end_ids: `eos_token_id` of `generation_config.json`, which overrides that of `config.json`.
        ignore: keys to treat as absent; ``rope_scaling.x`` is the key x of the object rope_scaling.
    """
    ignored = set(ignore)
    s = HFConfig(values, problems, ignored)
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
        s.ignore(*STATED)  # without a Config, what the model does anyway is unknown
    s.finish({} if config is None else stated(config, s.values))
    problems.extend(
        f"config.json: has no key {brief(key)}, which ignore= names" for key in sorted(ignored)
    )
    return config


def _end_ids(s: HFConfig, value: object, vocab: int) -> tuple[int, ...]:
    ids: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        s.problem(f"eos_token_id is {brief(value)}; expected an integer, a list of them, or null")
        return ()
    # An id without a logit is never generated; tiny test models inherit such ids.
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab))


def _dtype(s: HFConfig) -> str:
    """Read the dtype of the weights: "" where the checkpoint does not say."""
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
