"""What cannot be loaded: each thing says what it is and what to do about it."""

from __future__ import annotations

import re

import numpy as np
import pytest

import jkv
from jkv.errors import CheckpointError


def _refused(copy, *parts: str) -> str:
    with pytest.raises(CheckpointError) as error:
        jkv.load(copy.path)
    for part in parts:
        assert part in str(error.value)
    return str(error.value)


QUANTIZED = {
    "fp8": (
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
        {"weight": "F8_E4M3", "weight_scale_inv": np.ones((1, 1), np.float32)},
        "quantized with fp8 (quantization_config of config.json)",
    ),
    "bitsandbytes": (
        {"quantization_config": {"load_in_4bit": True}},
        {"weight": np.ones((144, 1), np.uint8), "weight.absmax": np.ones(3, np.float32)},
        "quantized with bitsandbytes",
    ),
    "gptq": (
        {},
        {"qweight": np.ones((2, 24), np.int32), "scales": np.ones((1, 24), np.float16)},
        "quantized with GPTQ",
    ),
    "awq": (
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"qweight": np.ones((2, 24), np.int32), "scales": np.ones((1, 24), np.float16)},
        "quantized with awq",
    ),
    "mlx": (
        {"quantization": {"group_size": 64, "bits": 4}},
        {"weight": np.ones((24, 2), np.uint32), "scales": np.ones((24, 1), np.float16)},
        "quantized with MLX",
    ),
    "compressed": (
        {"compression_config": {"format": "pack-quantized"}},
        {"weight_packed": np.ones((24, 2), np.int32)},
        "quantized with compressed-tensors",
    ),
    "no word of it": ({}, {"weight": np.ones((24, 12), np.int8)}, "are quantized: tensor"),
}


@pytest.mark.parametrize("what", QUANTIZED)
def test_quantized_weights_are_one_problem(what, checkpoint):
    """Not a line per tensor, and beside it whatever else the configuration says."""
    config, layout, message = QUANTIZED[what]
    copy = checkpoint()
    copy.config(**config)

    def quantize(tensors):
        for name in [name for name in tensors if "proj" in name]:
            stem = name.removesuffix("weight")
            weight = tensors.pop(name)
            for end, value in layout.items():
                coded = value if not isinstance(value, str) else weight
                tensors[stem + end] = np.array(coded)

    copy.tensors(quantize)
    text = _refused(copy, message)
    assert text.count("\n  - ") == 1
    copy.config(mystery=1)
    assert _refused(copy, message, "mystery").count("\n  - ") == 2
    if config:
        with pytest.raises(CheckpointError, match=re.escape(message)):
            jkv.models.outline(copy.path, ignore=("mystery",))


def test_plain_weights_that_are_said_to_be_quantized(checkpoint):
    copy = checkpoint()
    copy.config(quantization_config={"quant_method": "bitsandbytes"})
    _refused(copy, "If they are plain after all", "ignore=('quantization_config',)")
    jkv.load(copy.path, ignore=("quantization_config",))
    copy.config(quantization_config={})
    jkv.load(copy.path)


def test_a_message_is_short_however_much_is_wrong(checkpoint):
    copy = checkpoint()

    def spoil(tensors):
        for i in range(500):
            tensors[f"{chr(97 + i % 26) * 500}_{i}"] = np.zeros(1, np.float32)

    copy.tensors(spoil)
    text = _refused(copy, "and 400 more problems")
    assert len(text) < 20_000
