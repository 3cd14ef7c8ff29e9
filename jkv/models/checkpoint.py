"""The reader of a checkpoint directory in Hugging Face layout, whole or not at all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jkv._tensorfile import DTYPES, Tensor, read_header
from jkv._text import brief, printable
from jkv.errors import CheckpointError
from jkv.models import diagnose, families
from jkv.models.config import Config
from jkv.models.decoder import Decoder
from jkv.models.families import Family
from jkv.models.files import INDEX_LIMIT, read_json
from jkv.models.slots import Slot, find_slots, outline_model, tensor_shapes
from jkv.models.tensor_names import Place

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

# Called with the bytes read so far and those to read.
Progress = Callable[[int, int], object]


def read_checkpoint(
    directory: Path,
    *,
    dtype: str | None = None,
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
    problems: list[str] | None = None,
) -> tuple[Decoder, Config]:
    """Read the decoder of a directory with `config.json` and safetensors.

    Tensors are read one by one: the host never holds a second copy of the weights.

    Args:
        directory: what to read.
        dtype: of the weights; by default float32 on the CPU, the checkpoint's own elsewhere.
        ignore: keys of `config.json` to treat as absent.
        progress: called with the bytes read so far and those to read.
        problems: problems found before, such as in the tokenizer; reported with the rest.

    Raises:
        CheckpointError: something is missing, unknown or of another shape; it lists everything.
    """
    problems = [] if problems is None else problems
    values, config, family = _read_config(directory, ignore, problems)
    tensors = _find_tensors(directory, family, problems)
    if family is not None:
        tensors = _strip_prefix(tensors, family, problems)
    # Which tensors are harmless in an unknown family is unknown.
    counted = {} if family is None else _drop_harmless(tensors, family)
    coded = diagnose.quantization(values, directory, counted)
    if coded is not None:
        problems.append(coded)
    elif config is not None and family is not None and tensors:
        _match(config, family, tensors, problems)
    if problems or config is None or family is None:
        raise CheckpointError(_report(directory, problems))
    config = dataclasses.replace(config, dtype=_choose_dtype(dtype, config, tensors))
    model = outline_model(config)
    slots = find_slots(model, family)
    _fill(slots, tensors, config.dtype, progress)
    return model, config


def read_config(
    directory: Path,
    *,
    dtype: str | None = None,
    ignore: Sequence[str] = (),
    problems: list[str] | None = None,
) -> Config:
    """Read the configuration of a directory; weights are not read, and need not exist.

    Args:
        directory: what to read.
        dtype: of the weights; by default the checkpoint's own, float32 where it does not say.
        ignore: keys of `config.json` to treat as absent.
        problems: problems found before; reported with the rest.

    Raises:
        CheckpointError: the configuration is missing, broken or unknown; it lists everything.
    """
    problems = [] if problems is None else problems
    values, config, _ = _read_config(directory, ignore, problems)
    coded = diagnose.quantization(values, directory, {})
    if coded is not None:
        problems.append(coded)
    if problems or config is None:
        raise CheckpointError(_report(directory, problems))
    return dataclasses.replace(config, dtype=dtype or config.dtype or "float32")


_MOST = 100  # problems in one message
_LONGEST = 1000  # characters of one


def _report(directory: Path, problems: list[str]) -> str:
    lines = [f"  - {problem[:_LONGEST]}" for problem in problems[:_MOST]]
    if len(problems) > _MOST:
        lines.append(f"and {len(problems) - _MOST} more problems")
    return "\n".join([f"{directory} cannot be loaded:", *lines])


# What is in the directory -------------------------------------------------------------------------


def _read_config(
    directory: Path, ignore: Sequence[str], problems: list[str]
) -> tuple[dict[str, Any], Config | None, Family | None]:
    """Read the keys that are not ignored, the `Config` that they describe, and its family."""
    values = read_json(directory / "config.json", problems, optional=True)
    if not (directory / "config.json").exists():
        what = diagnose.directory(directory)
        problems.append("config.json is missing" + ("" if what is None else f": {what}"))
    generation = read_json(directory / "generation_config.json", problems, optional=True) or {}
    if values is None:
        return {}, None, None
    family = families.find(values, problems)
    if family is None:
        return values, None, None
    stops = generation.get("eos_token_id")
    config = families.read_config(values, family, problems, stops, ignore)
    return {k: v for k, v in values.items() if k not in ignore}, config, family


def _find_tensors(directory: Path, family: Family | None, problems: list[str]) -> dict[str, Tensor]:
    """Find every tensor of the checkpoint, by name."""
    if (directory / _SINGLE).exists():
        return read_header(directory / _SINGLE, problems)
    if (directory / _INDEX).exists():
        return _find_shards(directory, family, problems)
    if not (directory / "config.json").exists() and diagnose.directory(directory) is not None:
        return {}  # reported with the missing configuration
    problems.append(f"{_SINGLE} or {_INDEX} is missing; {diagnose.weights(directory)}")
    return {}


def _find_shards(directory: Path, family: Family | None, problems: list[str]) -> dict[str, Tensor]:
    index = read_json(directory / _INDEX, problems, limit=INDEX_LIMIT)
    if index is None:
        return {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f"{_INDEX}: weight_map is {brief(weight_map)}; expected an object")
        return {}
    found: dict[str, Tensor] = {}
    shards: set[str] = set()
    for shard in sorted({str(name) for name in weight_map.values()}):
        if not _is_shard_name(shard):
            problems.append(
                f"{_INDEX}: {brief(shard)} is no shard's name; expected that of a .safetensors "
                "file in the directory itself"
            )
            continue
        if not (directory / shard).is_file():
            problems.append(f"{shard} is missing, which {_INDEX} names")
            continue
        shards.add(shard)
        for name, tensor in read_header(directory / shard, problems).items():
            if name in found:
                other = found[name].path.name
                problems.append(f"{shard}: {printable(name)} is in {other} too")
            found[name] = tensor
            where = weight_map.get(name)
            if where is None:
                found[name] = dataclasses.replace(tensor, listed=False)
            elif where != shard:
                problems.append(
                    f"{shard}: holds {printable(name)}, which {_INDEX} looks for in {brief(where)}"
                )
    lost = [name for name in weight_map if name not in found and str(weight_map[name]) in shards]
    if family is not None:
        lost = [name for name in lost if not _is_harmless(name.removeprefix(family.prefix), family)]
    problems.extend(f"{_INDEX}: {name} is not in its shard" for name in _group_layers(lost))
    return found


def _is_shard_name(shard: str) -> bool:
    """Return whether a name is a file in the directory itself; it may be a symlink."""
    return re.fullmatch(r"[^/\\:\x00-\x1f]+\.safetensors", shard) is not None


# What the model needs -----------------------------------------------------------------------------


def _strip_prefix(
    tensors: dict[str, Tensor], family: Family, problems: list[str]
) -> dict[str, Tensor]:
    """Return the tensors by the names of the family's table, which have no prefix."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(family.prefix)
        if short in named:
            name = printable(name)
            problems.append(f"{name} is there with and without the prefix {family.prefix}")
        named[short] = tensor
    return named


def _drop_harmless(tensors: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Drop tensors that old versions saved and no model uses."""
    return {name: t for name, t in tensors.items() if not _is_harmless(name, family)}


def _is_harmless(name: str, family: Family) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in family.harmless)


def _match(config: Config, family: Family, tensors: dict[str, Tensor], problems: list[str]) -> None:
    """Report tensors that are missing, unknown or of another shape."""
    shapes = tensor_shapes(config, family)
    problems.extend(
        f"missing tensor {name}" for name in _group_layers(shapes.keys() - tensors.keys())
    )
    extra = _drop_harmless(tensors, family).keys() - shapes.keys()
    if config.tied and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        embedding = tensors.get(next(n for n, p in family.tensors.items() if p == _EMBEDDING))
        if embedding is not None and not _equal_tensors(embedding, tensors["lm_head.weight"]):
            problems.append(
                "lm_head.weight differs from the embedding, and tie_word_embeddings is true"
            )
    problems.extend(f"unknown tensor {name}" for name in _group_layers(extra))
    for name, shape in shapes.items():
        if name in tensors and not tensors[name].listed:
            problems.append(
                f"{tensors[name].path.name}: holds {name}, which {_INDEX} does not list"
            )
        if name in tensors and tensors[name].shape != shape:
            problems.append(
                f"tensor {name} has shape {brief(list(tensors[name].shape))}; expected "
                f"{list(shape)}"
            )


_EMBEDDING = Place("array", ("embedding",))


def _equal_tensors(a: Tensor, b: Tensor) -> bool:
    """Compare two tensors, rounded to the coarser of their dtypes."""
    if a.shape != b.shape:
        return False
    if (a.path, a.start) == (b.path, b.start):
        return True
    if {a.dtype, b.dtype} == {"F16", "BF16"}:  # each has rounded the same number on its own
        return all(
            np.allclose(x.astype(np.float32), y.astype(np.float32), rtol=2**-8, atol=2**-24)
            for x, y in zip(a.chunks(), b.chunks(), strict=True)
        )
    coarse = min(a, b, key=lambda tensor: tensor.nbytes).numpy_dtype
    return all(
        bool(np.array_equal(_bits(x.astype(coarse)), _bits(y.astype(coarse))))
        for x, y in zip(a.chunks(), b.chunks(), strict=True)
    )


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint8)


def _group_layers(names: Iterable[str]) -> list[str]:
    """Sort names, and join those that differ only in the layer's number: ``layers.{0,1}.x``."""
    groups: dict[str, list[int]] = {}
    for name in sorted(names):
        match = re.search(r"(?<=\.)\d{1,9}(?=\.)", "." + name)
        key = name if match is None else _mask_layer(name, match)
        groups.setdefault(key, [])
        if match is not None:
            groups[key].append(int(match.group()))
    lines = []
    for key, layers in groups.items():
        numbers = _ranges(sorted(layers))
        line = key.replace("\0", f"{{{numbers}}}" if len(layers) > 1 else numbers)
        lines.append(printable(line))
    return lines


def _ranges(numbers: list[int]) -> str:
    """Format sorted numbers as 0,2-5,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return ",".join(parts)


def _mask_layer(name: str, match: re.Match[str]) -> str:
    return name[: match.start() - 1] + "\0" + name[match.end() - 1 :]


# Reading ------------------------------------------------------------------------------------------


def _choose_dtype(dtype: str | None, config: Config, tensors: dict[str, Tensor]) -> str:
    if dtype is not None:
        return dtype
    stored = {DTYPES[t.dtype] for t in tensors.values() if t.dtype in DTYPES}
    return usual_dtype(config.dtype or (stored.pop() if len(stored) == 1 else "float32"))


def usual_dtype(stored: str) -> str:
    """Return the default dtype in which weights stored in another are loaded."""
    # XLA's matrix products in bfloat16 are ten times slower than in float32 on the CPU.
    cpu = jax.default_backend() == "cpu"
    return "float32" if cpu or stored == "float64" else stored


def _fill(
    slots: list[Slot], tensors: dict[str, Tensor], dtype: str, progress: Progress | None
) -> None:
    """Read each tensor into its variables."""
    total = sum(tensors[slot.name].nbytes for slot in slots)
    done = 0
    for slot in slots:
        if progress is not None:
            progress(done, total)
        slot.fill(tensors[slot.name].read(), dtype)
        done += tensors[slot.name].nbytes
    if progress is not None:
        progress(done, total)
