"""Checkpoints on disk: the golden ones, and a copy to spoil."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


class Checkpoint:
    """A checkpoint directory that a test may change."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def config(self, **changes: Any) -> None:
        """Set keys of config.json; `...` removes one."""
        self.json("config.json", **changes)

    def json(self, name: str, **changes: Any) -> None:
        path = self.path / name
        values = json.loads(path.read_text()) if path.exists() else {}
        values |= changes
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))

    def tensors(self, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
        """Rewrite the weights after `change` has been at them."""
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, metadata={"format": "pt"})

    def shard(self, names: tuple[str, str] = ("a.safetensors", "b.safetensors")) -> dict:
        """Split the weights over two files; returns the index as written."""
        tensors = load_file(self.weights)
        self.weights.unlink()
        keys = sorted(tensors)
        halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
        for name, half in zip(names, halves, strict=True):
            save_file({k: tensors[k] for k in half}, self.path / name)
        index = {"metadata": {"total_size": 1}, "weight_map": {}}
        for name, half in zip(names, halves, strict=True):
            index["weight_map"] |= dict.fromkeys(half, name)
        self.index(index)
        return index

    def index(self, values: dict) -> None:
        (self.path / "model.safetensors.index.json").write_text(json.dumps(values))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Checkpoint]:
    """A copy of a golden checkpoint, by name."""

    def copy(name: str = "llama-mqa") -> Checkpoint:
        path = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(GOLDEN / name, path)
        return Checkpoint(path)

    return copy
