"""Writing a model as a directory in Hugging Face layout."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jkv import _compat
from jkv._tensorfile import write_tensors
from jkv._text import brief
from jkv.errors import UnsupportedError
from jkv.models.config import Config
from jkv.models.config_writer import reads_as, write_config
from jkv.models.decoder import Decoder
from jkv.models.families import FAMILIES
from jkv.models.files import read_json
from jkv.models.slots import Slot, find_slots, tensor_shapes
from jkv.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jkv.models.lm import LM

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATES = "additional_chat_templates"
_WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"


def save(
    lm: LM,
    directory: str | os.PathLike[str],
    dtype: str | None,
    max_shard_bytes: int,
    overwrite: bool,
) -> None:
    """Write a model to a directory: `LM.save`, with arguments that are checked."""
    if not os.fspath(directory):
        raise ValueError("save got ''; expected a directory to write")
    target = Path(os.path.realpath(os.path.expanduser(directory)))
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"save got {str(path)!r}, which is a file; expected a directory")
    if target.is_dir() and os.listdir(target) and not overwrite:
        raise FileExistsError(
            f"save got {str(target)!r}, which is not empty; give another directory, or "
            "overwrite=True to replace the checkpoint in it"
        )
    model = lm.model
    if not isinstance(model, Decoder):
        raise UnsupportedError(f"save got a model of {type(model).__name__}; expected a Decoder")
    values, generation = _config(lm, model.config)
    family = FAMILIES[values["model_type"]]
    slots = {slot.name: slot for slot in find_slots(model, family)}
    shapes = tensor_shapes(model.config, family)
    _check(model, slots, shapes)
    dtype = dtype or _dtype(slots)
    # Versions of transformers before 4.56 know the older name only, later ones both.
    names = [name for name in ("dtype", "torch_dtype") if name in values]
    values |= dict.fromkeys(names or ["torch_dtype"], dtype)
    with _stage(target) as stage:
        _write_weights(stage, slots, shapes, family.prefix, dtype, max_shard_bytes)
        if lm.tokenizer is not None:
            _write_tokenizer(stage, lm.tokenizer)
        if generation is not None:
            _write_json(stage / "generation_config.json", generation)
        _write_json(stage / "config.json", values)


# The configuration --------------------------------------------------------------------------------


def _config(lm: LM, config: Config) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return `config.json` and `generation_config.json`, the model's own if still right."""
    if lm.directory is not None:
        values = read_json(lm.directory / "config.json", [], optional=True)
        generation = read_json(lm.directory / "generation_config.json", [], optional=True)
        if values is not None:
            # The code that auto_map names is not copied.
            values = _without({k: v for k, v in values.items() if k != "auto_map"}, lm.ignored)
            ends = (generation or {}).get("eos_token_id")
            if reads_as(values, config, ends):
                kind = str(values["model_type"])
                return values | {"architectures": [FAMILIES[kind].architecture]}, generation
    return write_config(config), None


def _without(values: dict[str, Any], ignored: tuple[str, ...], path: str = "") -> dict[str, Any]:
    return {
        key: _without(value, ignored, f"{path}{key}.") if isinstance(value, dict) else value
        for key, value in values.items()
        if path + key not in ignored
    }


# The weights --------------------------------------------------------------------------------------


def _check(
    model: Decoder, slots: Mapping[str, Slot], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a model whose variables are not those of its configuration."""
    known = {id(variable) for slot in slots.values() for variable in slot.variables}
    extra = [
        ".".join(map(str, path))
        for path, variable in nnx.iter_graph(model)
        if isinstance(variable, nnx.Variable) and id(variable) not in known
    ]
    if extra:
        raise UnsupportedError(
            f"save has no place for {', '.join(extra[:5])}: merge what was added to the model, or "
            "remove it"
        )
    for name in sorted(shapes.keys() | slots.keys()):
        got = slots[name].shape if name in slots else None
        if got != shapes.get(name):
            raise UnsupportedError(
                f"save got a model whose {name} has shape {got and list(got)}; its configuration "
                f"says {brief(shapes.get(name))}"
            )


def _dtype(slots: Mapping[str, Slot]) -> str:
    names = {
        jnp.dtype(_compat.get_value(v).dtype).name
        for slot in slots.values()
        for v in slot.variables
    }
    if len(names) > 1 or not names <= {"float32", "bfloat16", "float16"}:
        raise UnsupportedError(
            f"save got weights of {', '.join(sorted(names))}; say in which dtype to write them: "
            'dtype="float32", "bfloat16" or "float16"'
        )
    return names.pop()


def _write_weights(
    stage: Path,
    slots: Mapping[str, Slot],
    shapes: Mapping[str, tuple[int, ...]],
    prefix: str,
    dtype: str,
    max_shard_bytes: int,
) -> None:
    width = jnp.dtype(dtype).itemsize
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    full = total = 0
    for name in slots:
        size = math.prod(shapes[name]) * width
        if shards[-1] and full + size > max_shard_bytes:
            shards.append({})
            full = 0
        shards[-1][_full_name(name, prefix)] = shapes[name]
        full += size
        total += size
    by_name = {_full_name(name, prefix): slot for name, slot in slots.items()}

    def read(name: str) -> np.ndarray:
        return _cast(name, by_name[name].collect(), dtype)

    if len(shards) == 1:
        write_tensors(stage / "model.safetensors", shards[0], dtype, read)
        return
    where = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_tensors(stage / file, shard, dtype, read)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(stage / "model.safetensors.index.json", index)


def _full_name(name: str, prefix: str) -> str:
    # The head is beside the model that the prefix names.
    return name if name.startswith("lm_head.") else prefix + name


def _cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(jnp.dtype(dtype))
    if cast.dtype != array.dtype and np.isinf(cast).sum() > np.isinf(array).sum():
        raise ValueError(f"save got {name} with values too large for {dtype}; use bfloat16")
    return cast


# Files --------------------------------------------------------------------------------------------


def _write_tokenizer(stage: Path, tokenizer: Tokenizer) -> None:
    """Copy the files that the tokenizer was read from, or write them where there are none."""
    source = tokenizer.directory
    if source is not None:
        if not (source / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"save copies the tokenizer's files, and {str(source / 'tokenizer.json')!r} is gone"
            )
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, stage / name)
        for path in sorted((source / _TEMPLATES).glob("*.jinja")):
            (stage / _TEMPLATES).mkdir(exist_ok=True)
            shutil.copyfile(path, stage / _TEMPLATES / path.name)
        return
    (stage / "tokenizer.json").write_text(tokenizer.to_json(), "utf-8")
    known = {"tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(stage / "tokenizer_config.json", known | tokenizer.special)
    for name, template in tokenizer.templates.items():
        path = stage / "chat_template.jinja"
        if name != "default":
            path = stage / _TEMPLATES / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(template, "utf-8")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _stage(target: Path) -> Iterator[Path]:
    """Give a directory to write to, whose files replace the target's if nothing fails."""
    token = f".{target.name}-{secrets.token_hex(4)}.tmp"
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = (target if target.is_dir() else target.parent) / token
    stage.mkdir()
    try:
        yield stage
        if target.is_dir():
            _put(stage, target)
        else:
            stage.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _put(stage: Path, target: Path) -> None:
    """Replace the checkpoint in a directory; until the end it has no `config.json`."""
    (target / "config.json").unlink(missing_ok=True)
    for name in os.listdir(target):
        if name in (*_TOKENIZER_FILES, "generation_config.json") or re.fullmatch(_WEIGHTS, name):
            (target / name).unlink()
    for path in (target / _TEMPLATES).glob("*.jinja"):
        path.unlink()
    files = [path for path in sorted(stage.rglob("*")) if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == "config.json"):
        place = target / path.relative_to(stage)
        place.parent.mkdir(exist_ok=True)
        os.replace(path, place)
