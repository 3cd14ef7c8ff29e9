"""Compile the decode loop, for hardware that need not be there, and look for a second cache.

A textbook decode loop copies its whole cache at every step, silently; whether it does is decided
by each compiler anew. This compiles the library's own loop and fails where its temporaries reach
a tenth of the cache, or where its program holds a copy of a cache's array.

    python scripts/compile_check.py                     # this machine's CPU
    python scripts/compile_check.py --target tpu        # TPU v5e and v6e, needs libtpu
    python scripts/compile_check.py --target h200       # NVIDIA H200, needs jax[cuda13]

Exit code: 0 no second cache anywhere, 1 there is one, 77 the target's compiler is not installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 77
TARGETS = ("cpu", "tpu", "h200")


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode loop to compile."""

    kind: Any
    batch: int
    groups: int
    new: int = 1  # tokens per pass: 1 decodes, more is a chunk of a prefill
    kv_heads: int = 4
    slots: int = 1024
    head_dim: int = 64
    layers: int = 3
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled loop holds beside its cache."""

    cache: int  # bytes
    temporaries: int  # bytes
    copies: int  # of arrays as big as a layer's keys

    @property
    def share(self) -> float:
        """Temporaries as a share of the cache."""
        return self.temporaries / self.cache

    @property
    def free(self) -> bool:
        """Whether there is no second cache."""
        return self.share < 0.1 and self.copies == 0


def measure(case: Case, sharding: Any = None) -> Report:
    """Compile the case, for the devices of `sharding` if one is given."""
    import jax

    from jkv._pytree import nbytes

    function, arguments, cache = program(case)

    def shape(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    compiled = function.lower(*jax.tree.map(shape, arguments)).compile()
    memory = compiled.memory_analysis()
    biggest = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(cache))
    return Report(
        cache=nbytes(cache),
        temporaries=memory.temp_size_in_bytes,
        copies=count_copies(compiled.as_text(), biggest),
    )


def program(case: Case) -> tuple[Any, Any, Any]:
    """The jitted function, its arguments' shapes, and the cache among them."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jkv.cache import init_cache
    from jkv.decoding import loop
    from jkv.models import Config, Decoder, Rope

    config = Config(
        vocab=128,
        layers=case.layers,
        width=64,
        heads=case.kv_heads * case.groups,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        feed_forward=64,
        context=case.slots,
        rope=Rope(dims=case.head_dim),
        dtype=case.dtype,
    )
    model = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(
        lambda: init_cache(config, case.kind, batch=case.batch, slots=case.slots)
    )
    rows: Any = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    if case.new > 1:
        tokens = jax.ShapeDtypeStruct((case.batch, case.new), jnp.int32)
        hidden = jax.ShapeDtypeStruct((case.batch, config.width), jnp.dtype(case.dtype))
        return loop.absorb, (model, tokens, cache, rows, hidden), cache
    flags: Any = jax.ShapeDtypeStruct((case.batch,), bool)
    state = loop.State(cache=cache, token=rows, done=flags, sampling=())
    ends = jax.ShapeDtypeStruct((case.batch, 1), jnp.int32)

    advanced: Any = loop.advanced

    def decode(model: Any, state: Any, ends: Any, steps: Any) -> Any:
        return advanced.__wrapped__(32, model, state, None, None, ends, steps)

    steps = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(decode, donate_argnums=1), (model, state, ends, steps), cache


def count_copies(program: str, size: int) -> int:
    """How many `copy` operations of exactly `size` elements a compiled program holds."""
    found = 0
    for shape in re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:copy|copy-start)\(", program):
        found += math.prod(int(n) for n in shape.split(",") if n) == size
    return found
