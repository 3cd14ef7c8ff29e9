"""Compile the decode loop, for hardware that need not be there, and look for a second cache.

A textbook decode loop copies its whole cache at every step, silently; whether it does is decided
by each compiler anew. This compiles the library's own loop and fails where its temporaries reach
a tenth of the cache, or where its program holds a copy of a cache's array. For a GPU it compiles
prefills as well, whose activations are as many bytes as they are: no copies, and cuDNN's calls.

    python scripts/compile_check.py                     # this machine's CPU
    python scripts/compile_check.py --target tpu        # TPU v5e and v6e, needs libtpu
    python scripts/compile_check.py --target h200       # NVIDIA H200, needs jax[cuda13]
    python scripts/compile_check.py --target tpu --shape llama-3-8b

Exit code: 0 no second cache anywhere, 1 there is one, 77 the target's compiler is not installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from bench.cases import SHAPES, wanted
from bench.loops import Case, Paged, over, paged_program, program
from jkv._pytree import nbytes
from jkv.ops import dispatch

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 77
TARGETS = {"cpu": "cpu", "tpu": "tpu", "h200": "cuda"}  # to platforms

# Layers of a large model that fit beside their caches, where not all do.
MOST_LAYERS = {"v5e": 8}


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled loop holds beside its cache."""

    cache: int  # bytes
    temporaries: int  # bytes
    copies: int | None  # of arrays as big as a layer's keys; None: see `copies_of`
    attention: str  # which implementations of it
    new: int = 1  # tokens per pass
    lost: str | None = None  # see `lost_of`

    @property
    def share(self) -> float:
        """Temporaries as a share of the cache."""
        return self.temporaries / self.cache

    @property
    def free(self) -> bool:
        """Whether there is no second cache."""
        return (self.share < 0.1 or self.new > 1) and not self.copies

    @property
    def complaint(self) -> str:
        """What is wrong with it, for the end of a line."""
        wrong = ([] if self.free else ["A SECOND CACHE"]) + ([self.lost] if self.lost else [])
        return "".join(f"  {what}" for what in wrong)


def measure(case: Case | Paged, there: Any = None, platform: str = "cpu") -> Report:
    """Compile the case, for some of the devices `there` if any are given."""
    make: Any = program if isinstance(case, Case) else paged_program
    parts = case.parts if isinstance(case, Case) else 1

    def placed(leaf: Any) -> Any:
        sharding = jax.sharding.SingleDeviceSharding(there[0]) if there is not None else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with dispatch.target(platform), dispatch.record() as chosen:
        function, shapes, cache = make(case)
        shapes = jax.tree.map(placed, shapes) if parts == 1 else over(shapes, there[:parts])
        lowered = function.lower(*shapes)
    compiled = lowered.compile()
    biggest = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(cache)) // parts
    return Report(
        cache=nbytes(cache) // parts,
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        copies=copies_of(compiled, biggest),
        attention="+".join(chosen),
        new=case.new if isinstance(case, Case) else 1,
        lost=lost_of(compiled, case) if isinstance(case, Case) and "cudnn" in chosen else None,
    )


def lost_of(compiled: Any, case: Case) -> str | None:
    """What became of cuDNN's calls, chosen as they were, and of their lse, which must stay whole.

    `jax.nn` rounds the lse to the dtype of the queries, which the compiler is to take back; see
    `jkv.ops.attention.cudnn`.
    """
    text = compiled.as_text()
    if "__cudnn$fmha" not in text:
        return "NO CALL OF CUDNN"
    heads = case.kv_heads * case.groups
    sizes = rf"{case.batch},(?:{heads},{case.new}|{case.new},{heads})"
    return "A ROUNDED LSE" if re.search(rf"= b?f16\[{sizes}\]", text) else None


def copies_of(compiled: Any, size: int) -> int | None:
    """As `count_copies`; None for a program that this jaxlib compiles and cannot print.

    That happens to scatters of several arrays which libtpu gives to a v6e's sparse cores.
    """
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        if "async-update" not in str(error):
            raise
        return None
    return count_copies(text, size)


def count_copies(text: str, size: int) -> int:
    """How many `copy` operations of exactly `size` elements a compiled program holds.

    A fusion whose result is its operand, under the name of another tiling, moves nothing; nor does
    a computation that nobody calls.
    """
    calls = re.findall(
        r"(output_to_operand_aliasing=\{\{\}: \(0, \{\}\)\}, )?calls=(%[\w.-]+)", text
    )
    moving = {name for aliased, name in calls if not aliased}
    count, counted = 0, True
    for line in text.splitlines():
        if found := re.match(r"(%copy_fusion[\w.]*) \(", line):
            counted = found.group(1) in moving
        elif line.startswith("}"):
            counted = True
        # An asynchronous copy has a tuple of shapes, of which the first is where it goes.
        shape = re.search(r"= \(?\w+\[([\d,]*)\][^=\n]* copy(?:-start)?\(", line)
        if shape and counted:
            count += math.prod(int(n) for n in shape.group(1).split(",") if n) == size
    return count


def devices(target: str, textproto: Path) -> dict[str, Any]:
    """Devices of each kind that a target stands for, two or more; None is the CPU here.

    Raises:
        ImportError: the target's compiler is not installed.
    """
    if target == "cpu":
        return {"cpu": None}
    needed = {"tpu": "libtpu", "h200": "jax_plugins.xla_cuda13"}[target]
    importlib.import_module(needed)
    if target == "tpu":
        found = {
            name: topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:2x2")
            for name in ("v5e", "v6e")
        }
    else:
        found = {
            "h200": topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                topology="1x1x2",
                target_config=textproto.read_text(),
            )
        }
    return {name: topology.devices for name, topology in found.items()}


def main() -> int:
    """Print a table and return the exit code."""
    parser = argparse.ArgumentParser(description="Look for a second cache.")
    parser.add_argument("--target", choices=TARGETS, default="cpu")
    parser.add_argument("--shape", choices=SHAPES, help="the whole of such a model")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="cases whose names have one of these",
    )
    parser.add_argument(
        "--textproto",
        type=Path,
        default=ROOT.parent / "shared" / "hardware" / "h200.textproto",
        help="what the compiler asks about the H200",
    )
    arguments = parser.parse_args()
    if arguments.target == "cpu":
        jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if arguments.target == "h200" and not arguments.textproto.exists():
        print(f"SKIPPED: {arguments.textproto} is not there; say where with --textproto")
        return SKIPPED
    try:
        found = devices(arguments.target, arguments.textproto)
    except ImportError as error:
        print(f"SKIPPED: the compiler for {arguments.target} is not installed ({error})")
        return SKIPPED

    failed = 0
    print(
        f"{'device':8}{'decode loop':38}{'cache':>11}{'temporaries':>13}{'share':>9}{'copies':>8}"
        "  attention"
    )
    for device, there in found.items():
        for name, case in wanted(arguments.target, arguments.shape).items():
            if not any(text in name for text in arguments.only):
                continue
            if isinstance(case, Case) and arguments.shape:
                layers = min(case.layers, MOST_LAYERS.get(device, case.layers))
                case = dataclasses.replace(case, layers=layers)
            report = measure(case, there, TARGETS[arguments.target])
            failed += bool(report.complaint)
            print(
                f"{device:8}{name:38}{report.cache / 2**20:>7.0f} MiB"
                f"{report.temporaries / 2**20:>9.1f} MiB{report.share:>9.1%}"
                f"{'?' if report.copies is None else report.copies:>8}"
                f"  {report.attention}{report.complaint}",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
