"""What the kernels for Hopper GPUs take: registers, spills, shared memory, instructions per token.

    python scripts/kernel_table.py                                   # needs jax[cuda13], no GPU
    python scripts/kernel_table.py --nvdisasm /usr/local/cuda/bin/nvdisasm

Compiled for an H200 that need not be there, one launch for each form of cache. Beside the bytes of
a token (one key/value head's key and value) stands what a multiprocessor's share of the memory's
bandwidth leaves for them: instructions beyond that many, of each of four schedulers, would make
the kernel slower than the memory. They are counted in the machine code of the innermost loop, all
of it, seldom taken branches included, and only where there is a disassembler.

Exit code: 0 nothing spills, 1 something does, 77 the compiler is not installed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CYCLES, BANDWIDTH = 1.755e9, 4.3e12  # a second, of one multiprocessor and of the memory
WIDTH = (24, 5, 6, 6, 8, 8, 8, 13, 13, 8)
TITLES = (
    "form",
    "H",
    "new",
    "G",
    "regs",
    "spills",
    "shared",
    "bytes/token",
    "instr/token",
    "leaves",
)


def forms() -> dict[str, Any]:
    """Codecs of keys and values; None for plain bfloat16."""
    from jkv.ops.codecs import Affine, Float8

    return {
        "bfloat16": None,
        "int8": (Affine(8), Affine(8)),
        "fp8": (Float8(), Float8()),
        "int4 by token": (Affine(4), Affine(4)),
        "int4, keys by channel": (Affine(4, axis="channel", group=64), Affine(4)),
        "int4 cache": (Affine(4, axis="channel", group=64), Affine(4, group=64)),
    }


def loop(text: str) -> int | None:
    """Instructions of the innermost loop that holds the matrix products."""
    code, labels = [], {}
    for line in text.splitlines():
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            labels[found.group(1)] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found.group(1))
    products = [i for i, what in enumerate(code) if "HGMMA" in what]
    sizes = []
    for i, what in enumerate(code):
        target = re.search(r"BRA\b.*`\((\.L_x_\d+)\)", what)
        start = labels.get(target.group(1)) if target else None
        if products and start is not None and start <= products[0] and i >= products[-1]:
            sizes.append(i - start + 1)
    return min(sizes, default=None)


def disassembled(ptx: Path, ptxas: str, nvdisasm: str) -> str:
    """Machine code, in words."""
    binary = ptx.with_suffix(".cubin")
    subprocess.run([ptxas, "-arch=sm_90a", str(ptx), "-o", str(binary)], check=True)
    done = subprocess.run([nvdisasm, "-c", str(binary)], check=True, capture_output=True, text=True)
    return done.stdout


def case(codecs: Any, new: int, groups: int, dim: int, sharding: Any, dump: Path) -> dict[str, Any]:
    """Compile one call, and read what the compiler says about its larger kernel."""
    import jax
    import jax.numpy as jnp

    from jkv import ops
    from jkv._pytree import nbytes
    from jkv.ops import dispatch
    from jkv.ops.mosaic_gpu.launch import layout_of

    batch, heads, slots = 8, 8, 32768
    if codecs is None:
        k = v = jax.ShapeDtypeStruct((batch, heads, slots, dim), jnp.bfloat16)
    else:
        k, v = (
            jax.eval_shape(lambda c=c: c.empty(batch, heads, slots, dim, jnp.bfloat16))
            for c in codecs
        )
    q = jax.ShapeDtypeStruct((batch, new, heads * groups, dim), jnp.bfloat16)
    at = jax.ShapeDtypeStruct((batch, new), jnp.int32)
    operands = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (q, k, v, at)
    )
    for old in dump.iterdir():
        old.unlink()

    def attend(q: Any, k: Any, v: Any, at: Any) -> Any:
        return ops.attention(q, ops.ContiguousKV(k, v), at, implementation="mosaic_gpu")

    with dispatch.target("cuda"):
        jax.jit(attend).lower(*operands).compile()
    first = min(dump.glob("*.ptxas"), key=lambda path: path.stat().st_ctime_ns)
    said = first.read_text()
    resources = first.with_suffix(".resources.txt").read_text()
    numbers = {
        "registers": r"Used (\d+) registers",
        "spilled": r"(\d+) bytes spill stores",
    }
    found: dict[str, Any] = {name: int(re.findall(how, said)[0]) for name, how in numbers.items()}
    shared = re.search(r"smem_scratch_bytes=(\d+)", resources)
    found["shared"] = int(shared.group(1)) if shared else 0
    found["block"] = layout_of(q, k, v, None, slots).block
    found["bytes"] = nbytes((k, v)) / (batch * heads * slots)
    found["ptx"] = first.with_suffix(".ptx")
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"))
    parser.add_argument("--ptxas", default=shutil.which("ptxas") or "ptxas")
    parser.add_argument(
        "--textproto", type=Path, default=ROOT.parent / "shared" / "hardware" / "h200.textproto"
    )
    options = parser.parse_args()
    dump = Path(tempfile.mkdtemp())
    for name in ("PTX", "PTXAS", "RESOURCES"):
        os.environ[f"MOSAIC_GPU_DUMP_{name}"] = "1"
    os.environ |= {"MOSAIC_GPU_DUMP_TO": str(dump), "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    from compile_check import SKIPPED, devices
    from jkv.errors import UnsupportedError

    try:
        sharding = devices("h200", options.textproto)["h200"]
    except (ImportError, FileNotFoundError) as error:
        print(f"SKIPPED: no compiler for an H200 ({error})")
        return SKIPPED
    multiprocessors, spilled = 132, 0
    print("".join(f"{title:>{w}}" for title, w in zip(TITLES, WIDTH, strict=True)))
    for name, codecs in forms().items():
        for dim, new, groups in ((128, 1, 4), (128, 5, 16), (64, 1, 4), (256, 1, 2)):
            try:
                found = case(codecs, new, groups, dim, sharding, dump)
            except UnsupportedError as error:
                print(f"{name:>{WIDTH[0]}}{dim:>{WIDTH[1]}}  {str(error).split(': ', 1)[-1][:70]}")
                continue
            spilled += found["spilled"]
            count: Any = None
            if options.nvdisasm:
                count = loop(disassembled(found["ptx"], options.ptxas, options.nvdisasm))
            leaves = found["bytes"] / (BANDWIDTH / multiprocessors / CYCLES)
            cells = (
                name,
                dim,
                new,
                groups,
                found["registers"],
                found["spilled"],
                found["shared"],
                f"{found['bytes']:.0f}",
                f"{count / found['block']:.1f}" if count else "",
                f"{leaves:.1f}",
            )
            print("".join(f"{cell:>{w}}" for cell, w in zip(cells, WIDTH, strict=True)), flush=True)
    shutil.rmtree(dump)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
