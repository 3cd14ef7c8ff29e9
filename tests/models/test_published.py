"""Configurations as people publish them: each loads, or is refused for what changes the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import jkv
from jkv.errors import CheckpointError
from jkv.models import families
from jkv.models.hf_keys import CONSTANTS, IRRELEVANT, check_ignore

# Of `shared/configs`; the rest are of families that are not known.
LOADS = """
DeepSeek-R1-Distill-Qwen-1.5B DeepSeek-R1-Distill-Qwen-1.5B-automap Falcon3-1B-Base
GLM-4-9B-0414 Llama-2-7b-hf Llama-3.2-1B-Instruct Meta-Llama-3.1-8B Mistral-7B-v0.1
Mistral-Nemo-2407 Qwen1.5-0.5B Qwen2.5-0.5B-Instruct Qwen2.5-7B-Instruct-yarn Qwen3-0.6B
SmolLM2-135M-Instruct deepseek-coder-1.3b gemma-2-2b gemma-2-9b-it glm-4-9b-chat-hf gpt2
gpt2-medium
""".split()  # noqa: SIM905
QUANTIZED = {"DeepSeek-V3", "MiniMax-M2.5", "gpt-oss-20b"}
REFUSED = {
    "Qwen3-32B-FP8": ["quantized with fp8"],
    "stanford-crfm-gpt2": ["scale_attn_by_inverse_layer_idx is True"],
}
# One configuration of each family, as it stands in the golden checkpoints.
FAMILIES = (
    "gpt2",
    "llama-mha",
    "mistral-window",
    "qwen2-gqa",
    "qwen3-gqa",
    "glm-gqa",
    "glm4-gqa",
    "gemma2-gqa",
)


def _read(values: dict[str, Any], **options: Any) -> tuple[jkv.Config | None, list[str]]:
    problems: list[str] = []
    family = families.find(values, problems)
    assert family is not None
    return families.read_config(values, family, problems, **options), problems


def _golden(name: str) -> dict[str, Any]:
    path = Path(__file__).resolve().parent.parent / "golden" / name / "config.json"
    return json.loads(path.read_text())


def test_every_published_configuration(shared):
    """What loads and what is refused, and for which reasons: no other."""
    paths = sorted(path.parent for path in (shared / "configs").glob("*/config.json"))
    assert len(paths) >= 67
    for path in paths:
        kind = json.loads((path / "config.json").read_text())["model_type"]
        if path.name in LOADS:
            assert jkv.models.read_config(path).family == kind
            continue
        reasons = REFUSED.get(path.name, [f"model_type is '{kind}'"])
        if path.name in QUANTIZED:
            reasons = [*reasons, "the weights are quantized with "]
        try:
            jkv.models.read_config(path)
        except CheckpointError as error:
            text = str(error)
        else:
            pytest.fail(f"{path.name} loads; expected it in LOADS")
        assert text.count("\n  - ") == len(reasons), text
        assert all(reason in text for reason in reasons), text


# What trainers and their launchers leave behind.
LEFT_BEHIND = {
    "activation_dropout": 0.1,
    "classifier_dropout_prob": 0.1,
    "device_map": "auto",
    "ffn_dropout": 0.1,
    "low_cpu_mem_usage": True,
    "model_parallel": False,
    "seed": 42,
    "trust_remote_code": True,
}


def test_what_trainers_leave_behind():
    values = _golden("llama-mha")
    again, problems = _read(LEFT_BEHIND | values)
    assert problems == []
    assert again == _read(values)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_without_effect(name):
    """Names, training, generation, and nulls: the same model as without them."""
    values = _golden(name)
    plain, problems = _read(values)
    assert problems == []
    idle = {key: {"any": ["thing", 1.5, True]} for key in IRRELEVANT} | {"mystery": None}
    constant = {key: allowed[0] for key, allowed in CONSTANTS.items()}
    for more in (idle, dict.fromkeys(CONSTANTS), constant):
        again, problems = _read(more | values)
        assert problems == []
        assert again == plain


# Keys that the family does not read: a value that says what the model does, and one that does not.
SAME = {
    "gpt2": {
        "hidden_size": (15, 16),
        "head_dim": (5, 6),
        "num_key_value_heads": (3, 1),
        "sliding_window": (None, 64),
        "use_bias": (True, False),
        "layer_types": (["full_attention"] * 2, ["full_attention", "sliding_attention"]),
        "position_embedding_type": ("absolute", "rope"),
        "layer_norm_eps": (1e-5, 1e-6),
    },
    "llama-mha": {
        "activation": ("swiglu", "geglu"),
        "layer_types": (["full_attention"] * 2, ["full_attention", "linear_attention"]),
        "use_sliding_window": (False, True),
        "num_key_value_groups": (1, 2),
        "multi_query_attention": (False, True),
        "bias": (False, True),
        "add_qkv_bias": (False, True),
        "lm_head_bias": (False, True),
        "num_experts_per_tok": (0, 2),
        "mlp_only_layers": ([], [0]),
        "qk_norm": (False, True),
        "embedding_multiplier": (1, 12),
        "rotary_pct": (1.0, 0.5),
        "attn_logit_softcapping": (None, 50.0),
        "rope_interleaved": (False, True),
        "is_causal": (True, False),
        "use_bidirectional_attention": (False, True),
    },
    "mistral-window": {
        "attention_bias": (False, True),
        "use_sliding_window": (True, False),
        "sliding_window_size": (5, 4),
        "mlp_bias": (False, True),
    },
    "qwen2-gqa": {
        "attention_bias": (True, False),
        "qk_layernorm": (False, True),
        "use_mrope": (False, True),
    },
    "qwen3-gqa": {
        "qk_norm": (True, False),
        "mlp_bias": (False, True),
        "rotary_emb_base": (500, 10000),
        "rotary_dim": (6, 3),
    },
    "glm-gqa": {
        "layer_types": (["full_attention"] * 2, ["sliding_attention"] * 2),
        "rope_interleaved": (True, False),
        "mlp_bias": (False, True),
    },
    "glm4-gqa": {"use_post_norm": (True, False), "residual_multiplier": (1.0, 0.22)},
    "gemma2-gqa": {
        "sliding_window_size": (5, 6),
        "use_sliding_window": (True, False),
        "is_causal": (True, False),
        "logits_scaling": (1, 8.0),
    },
}


@pytest.mark.parametrize(("name", "key"), [(n, key) for n in FAMILIES for key in SAME[n]])
def test_what_the_model_does_anyway(name, key):
    values = _golden(name)
    same, other = SAME[name][key]
    again, problems = _read(values | {key: same})
    assert problems == []
    assert again == _read(values)[0]
    _, problems = _read(values | {key: other})
    assert len(problems) == 1
    assert key in problems[0]
    again, problems = _read(values | {key: other}, ignore=(key,))
    assert problems == []
    assert again == _read(values)[0]


def test_a_width_that_is_off():
    """Where a checkpoint says that nothing slides, how wide a window would be says nothing."""
    values = _golden("llama-mha") | {"use_sliding_window": False}
    assert _read(values | {"sliding_window": 4, "max_window_layers": 1})[1] == []
    values = _golden("mistral-mha") | {"use_sliding_window": False, "sliding_window": 4}
    assert len(_read(values)[1]) == 1  # there it slides all the same


def test_absent_heads_are_those_of_transformers():
    heads = {"mistral-mha": 8, "qwen2-gqa": 32, "qwen3-gqa": 32, "glm-gqa": 2, "gemma2-gqa": 4}
    for name, count in heads.items():
        values = _golden(name) | {"num_attention_heads": 32, "head_dim": 8}
        del values["num_key_value_heads"]
        config, problems = _read(values)
        assert problems == []
        assert config is not None
        assert config.kv_heads == count


def test_gpt2_in_the_names_of_the_others():
    values = _golden("gpt2")
    for name, other in (
        ("n_embd", "hidden_size"),
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
        ("n_positions", "max_position_embeddings"),
    ):
        values[other] = values.pop(name)
    config, problems = _read(values)
    assert problems == []
    assert config == _read(_golden("gpt2"))[0]


# Keys to ignore -----------------------------------------------------------------------------------


def test_ignore(checkpoint):
    """The message names the keyword for each key, and it is as if the keys were absent."""
    copy = checkpoint("llama-mha")
    scaling = {"rope_type": "linear", "factor": 2.0, "wobble": 3}
    copy.config(mystery=1, residual_multiplier=2.0, rope_parameters=..., rope_scaling=scaling)
    keys = ("mystery", "residual_multiplier", "rope_scaling.wobble")
    with pytest.raises(CheckpointError) as error:
        jkv.load(copy.path)
    for key in keys:
        assert f"ignore=('{key}',)" in str(error.value)
    assert str(error.value).count("\n  - ") == 3
    lm = jkv.load(copy.path, ignore=keys)
    assert lm.config.rope is not None
    assert lm.config.rope.factor == 2.0
    assert jkv.models.read_config(copy.path, ignore=keys) == lm.config
    assert jkv.models.outline(copy.path, ignore=keys).config == lm.config
    copy.config(residual_multiplier=...)
    with pytest.raises(CheckpointError, match="no key 'residual_multiplier', which ignore="):
        jkv.load(copy.path, ignore=keys)


def test_one_key_to_ignore_as_a_text(checkpoint):
    copy = checkpoint("llama-mha")
    copy.config(mystery=1)
    assert jkv.load(copy.path, ignore="mystery").config.layers == 2


@pytest.mark.parametrize("ignore", [3, None, [1], ("a", None), {"a": 1}, b"a", b""])
def test_ignore_of_another_kind(ignore):
    with pytest.raises(ValueError, match=r"load got ignore=.*expected names of keys"):
        check_ignore(ignore)


def test_a_broken_configuration_hides_no_unknown_key():
    values = _golden("llama-mha") | {"hidden_size": "x", "mystery": 1, "layer_types": [1]}
    problems = _read(values)[1]
    assert len(problems) == 2
    assert "hidden_size is 'x'" in problems[0]
    assert "mystery" in problems[1]


def test_values_however_large_or_deep_make_short_errors():
    deep: Any = 1
    for _ in range(600):
        deep = {"a": [deep]}
    values = _golden("llama-mha") | {
        "x" * 10**6: "y" * 10**6,
        "deep": deep,
        "eos_token_id": ["z"] * 10**6,
        "torch_dtype": "w" * 10**6,
        "rope_scaling": deep,
        "architectures": ["v" * 10**6],
    }
    problems = _read(values)[1]
    assert len(problems) >= 5
    assert max(map(len, problems)) < 500
