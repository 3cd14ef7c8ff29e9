"""A directory in Hugging Face layout, read into a decoder or refused as a whole."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jkv.errors import CheckpointError
from jkv.models import families
from jkv.models.config import Config
from jkv.models.decoder import Decoder, Linear
from jkv.models.families import Family, Place
from jkv.models.files import INDEX_LIMIT, read_json
from jkv.models.settings import show
from jkv.models.tensorfile import DTYPES, Tensor, read_header

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

# Called with the bytes read so far and those to read.
Progress = Callable[[int, int], object]


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A tensor that the model needs, and the variables that it fills."""

    name: str
    place: Place
    shape: tuple[int, ...]  # on disk
    owners: tuple[Any, ...]  # modules that hold the variables
    variables: tuple[nnx.Variable, ...]


def read_checkpoint(
    directory: Path,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
    problems: list[str] | None = None,
) -> tuple[Decoder, Config]:
    """The decoder of a directory with `config.json` and safetensors.

    Tensor by tensor: the host never holds a second copy of the weights.

    Args:
        directory: what to read.
        dtype: of the weights; by default float32 on the CPU, the checkpoint's own elsewhere.
        progress: called with the bytes read so far and those to read.
        problems: what was found before, in the tokenizer for one; reported with the rest.

    Raises:
        CheckpointError: anything is missing, left over, misshapen or unknown; it lists everything.
    """
    problems = [] if problems is None else problems
    config, family = _read_config(directory, problems)
    tensors = _find_tensors(directory, problems)
    slots: list[_Slot] = []
    model = None
    if config is not None and family is not None:
        config = dataclasses.replace(config, dtype=_choose_dtype(dtype, config, tensors))
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        slots = _slots(model, config, family)
        if tensors:
            tensors = _match(slots, family, tensors, config, problems)
    if problems or model is None or config is None:
        raise CheckpointError(_report(directory, problems))
    _fill(slots, tensors, config.dtype, progress)
    return model, config


def read_config(
    directory: Path, *, dtype: str | None = None, problems: list[str] | None = None
) -> Config:
    """The configuration of a directory; its weights are not looked at, and need not be there.

    Args:
        directory: what to read.
        dtype: of the weights; by default the checkpoint's own, float32 where it does not say.
        problems: what was found before; reported with the rest.

    Raises:
        CheckpointError: the configuration is missing, broken or unknown; it lists everything.
    """
    problems = [] if problems is None else problems
    config, _ = _read_config(directory, problems)
    if problems or config is None:
        raise CheckpointError(_report(directory, problems))
    return dataclasses.replace(config, dtype=dtype or config.dtype or "float32")


def _report(directory: Path, problems: list[str]) -> str:
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return f"{directory} cannot be loaded:\n{lines}"


# What is in the directory -------------------------------------------------------------------------


def _read_config(directory: Path, problems: list[str]) -> tuple[Config | None, Family | None]:
    values = read_json(directory / "config.json", problems)
    generation = read_json(directory / "generation_config.json", problems, optional=True) or {}
    if values is None:
        return None, None
    family = families.find(values, problems)
    if family is None:
        return None, None
    stops = generation.get("eos_token_id")
    return families.read_config(values, family, problems, stops), family


def _find_tensors(directory: Path, problems: list[str]) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by name."""
    if (directory / _SINGLE).is_file():
        return read_header(directory / _SINGLE, problems)
    if (directory / _INDEX).is_file():
        return _find_shards(directory, problems)
    names = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    others = [name for name in names if name.endswith(".safetensors")]
    found = f"found {', '.join(others)}" if others else "found no safetensors file"
    problem = f"{_SINGLE} or {_INDEX} is missing; {found}"
    if pickles:
        problem += (
            f". {', '.join(pickles)} would run code when opened, and never is: convert the weights "
            "to safetensors (with transformers: model.save_pretrained(directory))"
        )
    problems.append(problem)
    return {}


def _find_shards(directory: Path, problems: list[str]) -> dict[str, Tensor]:
    index = read_json(directory / _INDEX, problems, limit=INDEX_LIMIT)
    if index is None:
        return {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f"{_INDEX}: weight_map is {show(weight_map)}; expected an object")
        return {}
    found: dict[str, Tensor] = {}
    for shard in sorted({str(name) for name in weight_map.values()}):
        if not _plain(shard):
            problems.append(
                f"{_INDEX}: {show(shard)} is no shard's name; expected that of a .safetensors file "
                "in the directory itself"
            )
            continue
        if not (directory / shard).is_file():
            problems.append(f"{shard} is missing, which {_INDEX} names")
            continue
        for name, tensor in read_header(directory / shard, problems).items():
            if name in found:
                problems.append(f"{shard}: {name} is in {found[name].path.name} too")
            found[name] = tensor
            if weight_map.get(name) != shard:
                where = weight_map.get(name)
                problems.append(f"{shard}: holds {name}, which {_INDEX} looks for in {where}")
    lost = [name for name in weight_map if name not in found and _plain(str(weight_map[name]))]
    lost = [name for name in lost if (directory / str(weight_map[name])).is_file()]
    problems.extend(f"{_INDEX}: {name} is not in its shard" for name in _grouped(lost))
    return found


def _plain(shard: str) -> bool:
    """Whether a name stays in the directory, as a name: symlinks of a hub snapshot are fine."""
    return re.fullmatch(r"[^/\\:\x00-\x1f]+\.safetensors", shard) is not None


# What the model needs -----------------------------------------------------------------------------


def _slots(model: Decoder, config: Config, family: Family) -> list[_Slot]:
    """The rows of the family's table that this model has a place for."""
    slots = []
    for pattern, place in family.tensors.items():
        layers = range(config.layers) if "*" in pattern else (0,)
        for layer in layers:
            paths = [target.replace("*", str(layer)) for target in place.targets]
            slot = _slot(model, pattern.replace("*", str(layer)), place, paths)
            if slot is not None:
                slots.append(slot)
    return slots


def _slot(model: Decoder, name: str, place: Place, paths: list[str]) -> _Slot | None:
    if place.kind == "array":
        owner, _, leaf = paths[0].rpartition(".")
        owners = (_walk(model, owner),)
        variables: tuple[Any, ...] = (getattr(owners[0], leaf, None),)
    else:
        leaf = "bias" if place.kind == "bias" else "kernel"
        owners = tuple(_walk(model, path) for path in paths)
        variables = tuple(getattr(owner, leaf, None) for owner in owners)
    if None in variables:
        return None
    if place.kind == "array":
        shape = variables[0].shape
    else:
        outputs = sum(owner.shape[1] for owner in owners)
        inputs = owners[0].shape[0]
        shape = {"bias": (outputs,), "linear": (outputs, inputs), "conv1d": (inputs, outputs)}[
            place.kind
        ]
    return _Slot(name, place, tuple(shape), owners, variables)


def _walk(module: Any, path: str) -> Any:
    """The module at a path, None where a model of this configuration has none."""
    for step in path.split(".") if path else []:
        module = module[int(step)] if step.isdigit() else getattr(module, step, None)
        if module is None:
            return None
    return module


def _match(
    slots: list[_Slot],
    family: Family,
    tensors: dict[str, Tensor],
    config: Config,
    problems: list[str],
) -> dict[str, Tensor]:
    """The tensors by the table's names, each wanted and of the right shape, or problems."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(family.prefix)
        if short in named:
            problems.append(f"{name} is there with and without the prefix {family.prefix}")
        named[short] = tensor
    wanted = {slot.name: slot for slot in slots}
    problems.extend(f"missing tensor {name}" for name in _grouped(wanted.keys() - named.keys()))
    extra = named.keys() - wanted.keys()
    extra -= {name for name in extra if any(re.fullmatch(h, name) for h in family.harmless)}
    if config.tied and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        embedding = named.get(next(n for n, p in family.tensors.items() if p == _EMBEDDING))
        if embedding is not None and not _same(embedding, named["lm_head.weight"]):
            problems.append(
                "lm_head.weight differs from the embedding, and tie_word_embeddings is true"
            )
    problems.extend(f"unknown tensor {name}" for name in _grouped(extra))
    for name, slot in wanted.items():
        tensor = named.get(name)
        if tensor is None:
            continue
        if tensor.shape != slot.shape:
            problems.append(
                f"tensor {name} has shape {list(tensor.shape)}; expected {list(slot.shape)}"
            )
        if tensor.dtype not in DTYPES:
            problems.append(
                f"tensor {name} is {tensor.dtype}; expected {', '.join(DTYPES)} (quantized "
                "checkpoints are not read)"
            )
    return named


_EMBEDDING = Place("array", ("embedding",))


def _same(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.dtype not in DTYPES or (a.path, a.start) == (b.path, b.start):
        return True
    return bool(np.array_equal(a.read().view(np.uint8), b.read().view(np.uint8)))


def _grouped(names: Any) -> list[str]:
    """Names in order, those that differ in the layer's number only as one: ``layers.{0,1}.x``."""
    groups: dict[str, list[int]] = {}
    for name in sorted(names):
        match = re.search(r"(?<=\.)\d+(?=\.)", "." + name)
        key = name if match is None else _star(name, match)
        groups.setdefault(key, [])
        if match is not None:
            groups[key].append(int(match.group()))
    lines = []
    for key, layers in groups.items():
        numbers = ",".join(str(i) for i in sorted(layers))
        lines.append(key.replace("\0", f"{{{numbers}}}" if len(layers) > 1 else numbers))
    return lines


def _star(name: str, match: re.Match[str]) -> str:
    return name[: match.start() - 1] + "\0" + name[match.end() - 1 :]


# Reading ------------------------------------------------------------------------------------------


def _choose_dtype(dtype: str | None, config: Config, tensors: dict[str, Tensor]) -> str:
    if dtype is not None:
        return dtype
    stored = {DTYPES[t.dtype] for t in tensors.values() if t.dtype in DTYPES}
    return usual_dtype(config.dtype or (stored.pop() if len(stored) == 1 else "float32"))


def usual_dtype(stored: str) -> str:
    """The dtype in which weights stored in another are loaded, unless somebody asks."""
    # XLA's matrix products in bfloat16 are ten times slower than in float32 on the CPU.
    return "float32" if jax.default_backend() == "cpu" else stored


def _fill(
    slots: list[_Slot], tensors: dict[str, Tensor], dtype: str, progress: Progress | None
) -> None:
    """Read each tensor into its variables."""
    total = sum(tensors[slot.name].nbytes for slot in slots)
    done = 0
    for slot in slots:
        if progress is not None:
            progress(done, total)
        _fill_one(slot, tensors[slot.name].read(), dtype)
        done += tensors[slot.name].nbytes
    if progress is not None:
        progress(done, total)


def _fill_one(slot: _Slot, array: np.ndarray, dtype: str) -> None:
    if slot.place.kind == "array":
        slot.variables[0].set_value(_to_device(array, dtype))
        return
    if slot.place.kind == "linear":
        array = array.T  # a view; what is copied below is the part in its final layout
    start = 0
    for owner, variable in zip(slot.owners, slot.variables, strict=True):
        part = array[..., start : start + owner.shape[1]]
        start += owner.shape[1]
        layout = Linear.layout(part) if slot.place.kind != "bias" else part
        variable.set_value(_to_device(layout, dtype))


def _to_device(array: np.ndarray, dtype: str) -> jax.Array:
    """A copy on the device. `device_put` would alias memory on the CPU."""
    return jnp.array(array, dtype=jnp.dtype(dtype), copy=True)
