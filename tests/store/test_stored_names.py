"""Entries and fingerprints that were written by earlier versions are known to this one."""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np

import jkv
from jkv._pytree import pytree, static
from jkv.cache.fingerprint import fingerprint
from jkv.errors import UnsupportedError
from jkv.models.config import Config
from jkv.store.packing import pack
from tests.cache.kinds import KINDS
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "golden" / "stored_names.json"
CONFIG = Config(
    vocab=5, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, feed_forward=8, context=64
)


@pytree
class Weights:
    """As much of a model as a fingerprint reads."""

    weight: Any
    config: Config = static()


def names_in(words: Any) -> set[str]:
    """The classes with their fields, and the functions, that an entry names."""
    if isinstance(words, list):
        return set().union(*map(names_in, words))
    if not isinstance(words, dict):
        return set()
    if "function" in words:
        return {words["function"]}
    found = names_in(words.get("tuple", []) + list(words.get("fields", {}).values()))
    if "class" in words:
        found.add(f"{words['class']}({', '.join(words['fields'])})")
    return found


def written() -> dict[str, Any]:
    model = Weights(jnp.asarray(np.arange(12, dtype=np.float32)), CONFIG)
    names, prints = set(), {}
    for case in KINDS:
        prints[case.name] = fingerprint(model, case.kind).hex()
        try:
            cache = jkv.init_cache(CONFIG, case.kind, batch=1, slots=64, dtype="float32")
            names |= names_in(pack(cache).meta["cache"])
        except UnsupportedError:
            names.add(f"{case.name}: not stored")
    return {"names": sorted(names), "fingerprints": prints}


def test_names_in_entries_and_fingerprints_stay():
    """What is renamed keeps its first name in `jkv._stored_names`."""
    assert written() == json.loads(GOLDEN.read_text())


if __name__ == "__main__":  # after a kind was added: nothing else in the file may change
    GOLDEN.write_text(json.dumps(written(), indent=1) + "\n", encoding="utf-8")
