"""What else a file or a directory may be that cannot be loaded, and what to do about it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jkv._tensorfile import DTYPES, Tensor
from jkv._text import brief, printable
from jkv.models.files import read_json
from jkv.models.hf_keys import QUANTIZATION

# Quantization ------------------------------------------------------------------------------------

# Files beside `config.json` that say that weights are quantized, and by what.
_QUANTIZATION_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
# Endings of the tensors that each method adds.
_QUANTIZATION_TENSORS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or int8",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".scales": "MLX",
}


def quantization(
    values: Mapping[str, Any], directory: Path, tensors: Mapping[str, Tensor]
) -> str | None:
    """Say in one line that, and how, a checkpoint's weights are quantized; None if they are not.

    Args:
        values: of `config.json`, without the keys that are to be ignored.
        directory: of the checkpoint.
        tensors: of the checkpoint, if they were looked for, without those that do not matter.
    """
    found = next((key for key in QUANTIZATION if values.get(key)), None)
    coded = next((t for t in tensors.values() if t.dtype not in DTYPES), None)
    if found is None and coded is None:
        return None
    if found is not None:
        how = f" with {_method(found, values[found])} ({found} of config.json)"
    else:
        names = [name for name in _QUANTIZATION_FILES if (directory / name).is_file()]
        ends = [end for end in _QUANTIZATION_TENSORS if any(n.endswith(end) for n in tensors)]
        methods = [_QUANTIZATION_FILES[n] for n in names] + [_QUANTIZATION_TENSORS[e] for e in ends]
        how = f" with {methods[0]}" if methods else ""
    plain = tensors and coded is None
    which = "" if coded is None else f": tensor {printable(coded.name)} is {coded.dtype}"
    return (
        f"the weights are quantized{how}{which}; expected {', '.join(DTYPES)}. Load the model that "
        "they were made from, or let transformers write it: model.dequantize() and "
        "model.save_pretrained(directory)"
        + (f". If they are plain after all, as the files say: ignore=({found!r},)" if plain else "")
    )


def _method(key: str, value: object) -> str:
    if QUANTIZATION[key] or not isinstance(value, dict):
        return QUANTIZATION[key] or brief(value)
    if isinstance(value.get("quant_method"), str):
        return printable(value["quant_method"])
    bits = any(value.get(name) for name in ("load_in_4bit", "load_in_8bit"))
    return "bitsandbytes" if bits else brief(value)


# Files and directories ---------------------------------------------------------------------------

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z")
_GGUF = (
    "GGUF, the format of llama.cpp, which is not read: load the checkpoint that it was made from, "
    "or let transformers convert it: AutoModelForCausalLM.from_pretrained(directory, "
    "gguf_file=name) and save_pretrained(other)"
)
# Weights of other libraries: how their files are called, and what they are.
_OTHERS = {
    "flax_model.msgpack": "Flax's (transformers 4: from_pretrained(directory, from_flax=True))",
    "tf_model.h5": "TensorFlow's (transformers 4: from_pretrained(directory, from_tf=True))",
    "rust_model.ot": "those of rust-bert",
    "params.json": "in their authors' own layout (look for the same model with '-hf' in its name)",
}


def file(path: Path) -> str:
    """Say why a file is no checkpoint, and what to load instead."""
    what = f"{path} is a file"
    if not path.is_file():
        return f"{path} is a pipe or a device; expected the directory of a checkpoint"
    with path.open("rb") as opened:
        start = opened.read(4)
    if start == b"GGUF" or path.suffix == ".gguf":
        return f"{what} in {_GGUF}"
    if path.suffix in _ARCHIVES:
        return f"{what}, an archive: unpack it and load the directory"
    if (path.parent / "config.json").is_file():
        return f"{what}; expected the directory of a checkpoint: load {str(path.parent)!r}"
    return f"{what}; expected a directory with config.json and model.safetensors"


def directory(path: Path) -> str | None:
    """Say what a directory is that lacks the configuration or the weights of a model.

    Returns:
        What it is and what to do; None where it is nothing that is known.
    """
    names = _names(path)
    if "adapter_config.json" in names:
        values = read_json(path / "adapter_config.json", [], optional=True) or {}
        base = values.get("base_model_name_or_path")
        of = f" of {brief(base)}" if isinstance(base, str) else ""
        return (
            f"it is a LoRA adapter{of}, no model: merge it (with peft: "
            "AutoPeftModelForCausalLM.from_pretrained(directory).merge_and_unload(), then "
            "save_pretrained(other)) and load what that writes"
        )
    if "snapshots" in names and ("refs" in names or "blobs" in names):
        return _hub_cache(path)
    if any(name.endswith(".gguf") for name in names):
        return f"it holds {_GGUF}"
    if any(name.startswith("models--") for name in names):
        return "it is the hub's cache: load one of its models by the id, such as 'team/model'"
    within = [name for name in names if _holds_model(path / name)]
    steps = [name for name in within if re.fullmatch(r"checkpoint-\d{1,12}", name)]
    if steps:
        newest = max(steps, key=lambda name: int(name.partition("-")[2]))
        return (
            f"it is the output of a trainer, with {_few(steps)}: load the one that you want, the "
            f"newest being {str(path / newest)!r}"
        )
    if within:
        return f"there are checkpoints in it: load {_few([str(path / name) for name in within])}"
    if names:
        return None
    return "it is empty; of a hub repository only *.json, *.jinja and *.safetensors are downloaded"


def _holds_model(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def _hub_cache(path: Path) -> str:
    """Describe a repository in the hub's cache: its snapshots are checkpoints."""
    what = "it is a repository in the hub's cache"
    main = path / "refs" / "main"
    snapshots = [str(path / "snapshots" / name) for name in _names(path / "snapshots")]
    if main.is_file() and main.stat().st_size < 100:
        named = path / "snapshots" / main.read_text("utf-8", errors="replace").strip()
        if str(named) in snapshots:
            snapshots = [str(named)]
    _, _, name = path.name.partition("models--")
    by_id = f", or {name.replace('--', '/', 1)!r} by its id" if name else ""
    return f"{what}: load {_few(snapshots) if snapshots else 'a snapshot'}{by_id}"


def weights(path: Path) -> str:
    """Say which weights a directory without `model.safetensors` has, and what to do."""
    names = _names(path)
    known = directory(path)
    if known is not None:
        return known
    found = [name for name in names if name.endswith(".safetensors")]
    shards = [name for name in found if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    if shards:
        return (
            f"found {_few(shards)} without the index: the download is incomplete, or the file "
            "was left out"
        )
    text = f"found {_few(found)}" if found else "found no safetensors file"
    if path.parent.name == "snapshots":
        text += " in the hub's repository, of which no other weights are downloaded"
    pickles = [name for name in names if name.endswith((*_PICKLES, ".bin.index.json"))]
    if pickles:
        text += (
            f". {_few(pickles)} would run code when opened, and never is: convert the weights "
            "to safetensors (with transformers: model.save_pretrained(directory))"
        )
    others = [(name, what) for name, what in _OTHERS.items() if name in names]
    if others and not pickles:
        name, what = others[0]
        text += f". {name} shows that the weights are {what}: convert them to safetensors"
    return text


def tokenizer(path: Path | None) -> str:
    """Say what to do about a checkpoint without `tokenizer.json`."""
    if path is None:
        return "use ids"
    named = re.compile(r"(tokenizer|spiece|sentencepiece.*)\.model|vocab\.(json|txt)|.*\.tiktoken")
    found = [name for name in _names(path) if named.fullmatch(name)]
    has = f" (it has {_few(found)})" if found else ""
    return (
        f"use ids{has}, or let transformers write the file: "
        "AutoTokenizer.from_pretrained(source).save_pretrained(directory)"
    )


def suggestion(name: str, known: Iterable[str]) -> str:
    """Suggest what a name that leads nowhere may have meant: text for the end of a message."""
    where, base = os.path.split(os.path.expanduser(name))
    match = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", name)
    if match is not None:
        return f"; give the id, {match[1]!r}"
    close = [] if where else difflib.get_close_matches(name, list(known), 1, 0.7)
    if not close and base and os.path.isdir(where or "."):
        beside = [other for other in _names(Path(where or ".")) if (Path(where) / other).is_dir()]
        close = [
            os.path.join(where, near) for near in difflib.get_close_matches(base, beside, 1, 0.7)
        ]
    return f"; did you mean {brief(close[0])}?" if close else ""


def _names(path: Path) -> list[str]:
    """List a directory in order; nothing where it cannot be listed."""
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(printable(name) for name in names[:5]) + more
