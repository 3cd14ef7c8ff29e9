"""What cannot be loaded: each thing says what it is and what to do about it."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from huggingface_hub import constants

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


# Directories and files ----------------------------------------------------------------------------


def _folder(copy, *names: str) -> None:
    for path in copy.path.iterdir():
        path.unlink()
    for name in names:
        (copy.path / name).parent.mkdir(parents=True, exist_ok=True)
        (copy.path / name).write_text("{}")


def _adapter(copy):
    _folder(copy, "adapter_config.json", "adapter_model.safetensors")
    copy.json("adapter_config.json", base_model_name_or_path="team/base")


def _hub_cache(copy):
    _folder(copy, "refs/main", "snapshots/abc/config.json", "snapshots/def/config.json")
    (copy.path / "refs" / "main").write_text("abc\n")


FOLDERS = {
    "lora": (_adapter, "it is a LoRA adapter of 'team/base'", "merge_and_unload"),
    "hub cache": (_hub_cache, "a repository in the hub's cache: load ", "snapshots/abc"),
    "trainer": (
        lambda copy: _folder(copy, *(f"checkpoint-{i}/config.json" for i in (500, 1000, 90))),
        "it is the output of a trainer",
        "checkpoint-1000'",
    ),
    "one within": (lambda copy: _folder(copy, "final/config.json"), "load ", "final"),
    "gguf": (lambda copy: _folder(copy, "x.Q4_0.gguf"), "GGUF", "gguf_file"),
    "adapters within": (
        lambda copy: _folder(copy, *(f"checkpoint-{i}/adapter_config.json" for i in (9, 10))),
        "it is the output of a trainer",
        "checkpoint-10'",
    ),
    "all of the hub's cache": (
        lambda copy: _folder(copy, "models--team--tiny/refs/main"),
        "it is the hub's cache",
        "by the id",
    ),
    "empty": (_folder, "config.json is missing: it is empty", ""),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_that_are_no_checkpoint(what, checkpoint):
    """One line that says what the folder is, and what to do."""
    make, *parts = FOLDERS[what]
    copy = checkpoint()
    make(copy)
    assert _refused(copy, *parts).count("\n  - ") == 1
    for read in (jkv.models.read_config, jkv.models.outline):
        with pytest.raises(CheckpointError, match=re.escape(parts[0])):
            read(copy.path)


WEIGHTS = {
    "flax_model.msgpack": "the weights are Flax's",
    "tf_model.h5": "the weights are TensorFlow's",
    "pytorch_model.bin": "would run code when opened",
    "pytorch_model.bin.index.json": "would run code when opened",
    "model-00001-of-00002.safetensors": "without the index",
    "adapter_config.json": "a LoRA adapter",
    "checkpoint-500/config.json": "checkpoint-500",
    "x.gguf": "GGUF",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_other_weights_beside_a_configuration(name, checkpoint):
    copy = checkpoint()
    copy.weights.unlink()
    (copy.path / name).parent.mkdir(exist_ok=True)
    (copy.path / name).write_text("{}")
    text = _refused(copy, "model.safetensors or ", WEIGHTS[name])
    assert text.count("\n  - ") == 1


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.gguf", b"GGUF123", "in GGUF, the format of llama.cpp"),
        ("x", b"GGUF123", "in GGUF, the format of llama.cpp"),
        ("model.tar.gz", b"", "an archive: unpack it"),
        ("model.safetensors", b"", "load "),
        ("notes.txt", b"", "expected the directory of a checkpoint: load "),
    ],
)
def test_files_instead_of_a_directory(name, data, message, checkpoint):
    copy = checkpoint()
    (copy.path / name).write_bytes(data)
    for source in (copy.path / name, str(copy.path / name)):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            jkv.load(source)
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        jkv.load("/dev/zero")


def test_weights_that_are_no_file(checkpoint):
    copy = checkpoint()
    copy.weights.unlink()
    os.mkfifo(copy.weights)
    _refused(copy, "model.safetensors: cannot be read: it is a pipe")


def test_a_home_directory(checkpoint, monkeypatch):
    copy = checkpoint()
    monkeypatch.setenv("HOME", str(copy.path.parent))
    assert jkv.models.read_config(f"~/{copy.path.name}").layers == 3
    with pytest.raises(CheckpointError, match="neither a directory nor a hub id"):
        jkv.load("~/nowhere/at/all")


def test_no_tokenizer(checkpoint):
    copy = checkpoint()
    (copy.path / "tokenizer.model").write_bytes(b"")
    lm = jkv.models.outline(copy.path)
    with pytest.raises(
        jkv.errors.UnsupportedError, match=r"it has tokenizer\.model.*AutoTokenizer"
    ):
        lm.encode("a")


# Typing errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("shakespear", "did you mean 'shakespeare'"),
        ("Shakespeare", "did you mean 'shakespeare'"),
        ("./checkpont-0", "did you mean './checkpoint-0'"),
        ("checkpont-0", "did you mean 'checkpoint-0'"),
        ("https://huggingface.co/openai-community/gpt2", "give the id, 'openai-community/gpt2'"),
    ],
)
def test_names_that_lead_nowhere(typed, meant, checkpoint, monkeypatch):
    copy = checkpoint()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copy.path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(copy.path.parent)
    with pytest.raises(CheckpointError, match=re.escape(meant)):
        jkv.load(typed)


@pytest.mark.parametrize(("typed", "meant"), [("bf16", "bfloat16"), ("float31", "float32")])
def test_dtypes_that_are_none(typed, meant, checkpoint):
    with pytest.raises(ValueError, match=f"expected one of .*did you mean '{meant}'"):
        jkv.load(checkpoint().path, dtype=typed)
