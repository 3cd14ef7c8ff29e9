"""The state of a run: written whole or not at all, never pickled, saved when a signal ends it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a crash at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    if os.name == "posix":  # the rename itself reaches the disk with the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_tree(path: Path, tree: Any, facts: Mapping[str, Any]) -> None:
    """Write the arrays of a pytree, with JSON facts about them in the header."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in named}
    write_bytes(path, save(arrays, metadata={"facts": json.dumps(facts, sort_keys=True)}))


def read_facts(path: Path) -> dict[str, Any]:
    """The facts that a file was written with.

    Raises:
        ValueError: not a file of `save_tree`.
    """
    try:
        with safe_open(path, "numpy") as file:
            return json.loads((file.metadata() or {})["facts"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of this script ({error}); delete it to start anew"
        ) from None


def load_tree(path: Path, like: Any) -> Any:
    """The arrays of a file in the structure of `like`.

    Raises:
        ValueError: the file has other arrays.
    """
    named, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(key) for key, _ in named]
    with safe_open(path, "numpy") as file:
        found = set(file.keys())
        if found != set(names):
            raise ValueError(
                f"{path} has {len(found)} arrays where this model has {len(names)}, or other "
                "names; delete it to start anew"
            )
        leaves = [jnp.asarray(file.get_tensor(name)) for name in names]
    for name, leaf, (_, wanted) in zip(names, leaves, named, strict=True):
        if leaf.shape != wanted.shape or leaf.dtype != wanted.dtype:
            raise ValueError(
                f"{path} has {leaf.dtype}{list(leaf.shape)} at {name}; expected "
                f"{wanted.dtype}{list(wanted.shape)}; delete it to start anew"
            )
    return jax.tree.unflatten(structure, leaves)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What two sets of hyper-parameters disagree on, for people; empty when they agree."""
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return ", ".join(f"{n}={old.get(n)!r} there, {new.get(n)!r} now" for n in names)


class Signals:
    """Remembers the first SIGINT or SIGTERM; the second one acts as it always does."""

    def __init__(self):
        self.caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number: int, frame: Any) -> None:
        self.caught = number
        self.__exit__()

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
