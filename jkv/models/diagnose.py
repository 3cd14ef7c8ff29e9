"""What else a file or a directory may be that cannot be loaded, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jkv._text import brief
from jkv.models.hf_keys import QUANTIZATION
from jkv.models.settings import bare
from jkv.models.tensorfile import DTYPES, Tensor

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
    which = "" if coded is None else f": tensor {bare(coded.name)} is {coded.dtype}"
    return (
        f"the weights are quantized{how}{which}; expected {', '.join(DTYPES)}. Load the model that "
        "they were made from, or let transformers write it: model.dequantize() and "
        "model.save_pretrained(directory)"
        + (f". If they are plain after all, as the files say: ignore=({found!r},)" if plain else "")
    )


def _method(key: str, value: Any) -> str:
    if QUANTIZATION[key] or not isinstance(value, dict):
        return QUANTIZATION[key] or brief(value)
    if isinstance(value.get("quant_method"), str):
        return bare(value["quant_method"])
    bits = any(value.get(name) for name in ("load_in_4bit", "load_in_8bit"))
    return "bitsandbytes" if bits else brief(value)
