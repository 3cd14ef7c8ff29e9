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
import functools
import importlib
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 77
TARGETS = {"cpu": "cpu", "tpu": "tpu", "h200": "cuda"}  # to platforms


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
    layers: int = 2
    width: int = 64
    feed_forward: int = 64
    vocab: int = 128
    dtype: str = "float32"
    parts: int = 1  # devices, over which the heads are parted


@dataclasses.dataclass(frozen=True)
class Paged:
    """A decode loop over pages, of attention alone: each step writes a page and looks at all."""

    form: str  # one of `forms_of_pages`
    page: int
    batch: int
    groups: int
    slots: int = 32768
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 2
    dtype: str = "bfloat16"


# Layers of a large model that fit beside their caches, where not all do.
MOST_LAYERS = {"v5e": 8}
# Shapes of models that people run, 8 rows of 8192 tokens.
SHAPES = {
    "llama-3-8b": {
        "groups": 4,
        "kv_heads": 8,
        "head_dim": 128,
        "layers": 32,
        "width": 4096,
        "feed_forward": 14336,
        "vocab": 128256,
    },
    "llama-3.2-1b": {
        "groups": 4,
        "kv_heads": 8,
        "head_dim": 64,
        "layers": 16,
        "width": 2048,
        "feed_forward": 8192,
        "vocab": 128256,
    },
}


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
    import jax

    from jkv._pytree import nbytes
    from jkv.ops import choice

    make: Any = program if isinstance(case, Case) else paged_program
    parts = case.parts if isinstance(case, Case) else 1

    def placed(leaf: Any) -> Any:
        sharding = jax.sharding.SingleDeviceSharding(there[0]) if there is not None else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with choice.target(platform), choice.record() as chosen:
        function, arguments, cache = make(case)
        if parts > 1:
            arguments = parted(arguments, there[:parts])
        else:
            arguments = jax.tree.map(placed, arguments)
        lowered = function.lower(*arguments)
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


def parted(arguments: Any, there: Any) -> Any:
    """Shapes of `loop.advanced`'s arguments as `jkv.shard` and its loop lay them."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import jkv
    from jkv._pytree import replace
    from jkv.cache import heads

    mesh = Mesh(np.array(there), ("heads",))

    def laid(leaf: Any, spec: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def everywhere(leaf: Any) -> Any:
        return laid(leaf, PartitionSpec())

    model, state, *rest = arguments
    layers = state.cache.layers
    layers = jax.tree.map(laid, layers, heads.specs(layers, mesh))
    state = jax.tree.map(everywhere, state)
    state = replace(state, cache=replace(state.cache, layers=layers))
    return jkv.shard(model, mesh), state, *jax.tree.map(everywhere, rest)


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
    import jax

    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        if "async-update" not in str(error):
            raise
        return None
    return count_copies(text, size)


def program(case: Case) -> tuple[Any, Any, Any]:
    """The jitted function, the shapes of its arguments, and of the cache among them."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jkv.cache import init_cache
    from jkv.decoding import loop
    from jkv.models import Config, Decoder, Rope

    config = Config(
        vocab=case.vocab,
        layers=case.layers,
        width=case.width,
        heads=case.kv_heads * case.groups,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        feed_forward=case.feed_forward,
        context=case.slots,
        rope=Rope(dims=case.head_dim),
        dtype=case.dtype,
    )
    rows = jnp.zeros((case.batch,), jnp.int32)

    def arguments() -> Any:
        model = Decoder(config, rngs=nnx.Rngs(0))
        cache = init_cache(config, case.kind, batch=case.batch, slots=case.slots)
        if case.new > 1:
            tokens = jnp.zeros((case.batch, case.new), jnp.int32)
            last = jnp.zeros((case.batch, config.width), case.dtype)
            return model, tokens, cache, rows, last
        state = loop.State(cache=cache, token=rows, done=rows > 0, sampling=())
        ends = jnp.zeros((case.batch, 1), jnp.int32)
        return model, state, None, None, ends, jnp.int32(0)

    shapes = jax.eval_shape(arguments)
    if case.new > 1:
        return loop.absorb, shapes, shapes[2]
    advanced: Any = loop.advanced  # without its jit, whose first argument is static
    decode = jax.jit(functools.partial(advanced.__wrapped__, 32), donate_argnums=1)
    return decode, shapes, shapes[1].cache


def forms_of_pages() -> dict[str, Any]:
    """Codecs of keys and values in pages by name; None is as they are."""
    from jkv.ops.encoded import Affine, Float8

    return {
        "exact": None,
        "int8": (Affine(8), Affine(8)),
        "int4": (Affine(4, axis="channel", group=64), Affine(4)),
        "int4 by token": (Affine(4), Affine(4)),
        "fp8": (Float8(), Float8()),
    }


def paged_program(case: Paged) -> tuple[Any, Any, Any]:
    """As `program`, for pages: keys and values of all layers, and tables of the rows' pages.

    A token goes into its page while that is on its way into the chip; keys that are encoded some
    tokens at a time are written so, whenever their last is there.
    """
    import jax
    import jax.numpy as jnp

    from jkv.ops import paged_attention
    from jkv.ops.encoded import Encoded
    from jkv.ops.pages import empty, laid, taken
    from jkv.ops.pages import put as put_pages

    columns, heads = case.slots // case.page, case.kv_heads * case.groups
    sizes = (case.batch * columns, case.kv_heads, case.page, case.head_dim)
    codecs = forms_of_pages()[case.form] or (None, None)
    units = [1 if codec is None else codec.unit for codec in codecs]

    def put(pages: Any, unit: int, tokens: Any, table: Any, length: Any) -> Any:
        at = jnp.take_along_axis(table, length[:, None] // case.page, axis=1)[:, 0]
        inside = length % case.page
        held = taken(pages, at)
        if isinstance(held, Encoded):
            tokens = jnp.repeat(tokens, unit, axis=1)
            whole = jnp.where((inside + 1) % unit == 0, inside // unit, -1)
            new: Any = held.put(tokens, whole[:, None])
        else:
            own = jnp.arange(case.page)[None, None, :, None] == inside[:, None, None, None]
            new = jnp.where(own, jnp.swapaxes(tokens, 1, 2).astype(held.dtype), held)
        return put_pages(pages, laid(pages, new), at)

    def step(_: Any, state: Any) -> Any:
        layers, table, length, x = state
        after = []
        for pools in layers:
            new = jnp.mean(x.reshape(case.batch, 1, case.kv_heads, case.groups, -1), axis=3)
            k, v = (put(p, u, new, table, length) for p, u in zip(pools, units, strict=True))
            options = {"positions": length[:, None], "lengths": length + 1}
            x = paged_attention(x, k, v, table, **options).out.astype(case.dtype)
            after.append((k, v))
        return after, table, length + 1, x

    def arguments() -> Any:
        layers = [empty(codecs, *sizes, jnp.dtype(case.dtype)) for _ in range(case.layers)]
        table = jnp.zeros((case.batch, columns), jnp.int32)
        x = jnp.zeros((case.batch, 1, heads, case.head_dim), case.dtype)
        return layers, table, jnp.zeros((case.batch,), jnp.int32), x

    shapes = jax.eval_shape(arguments)
    decode = jax.jit(lambda state: jax.lax.fori_loop(0, 32, step, state), donate_argnums=0)
    return decode, (shapes,), shapes[0]


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
    from jax.experimental import topologies

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


def kinds_of(target: str, slots: int, kept: int) -> dict[str, Any]:
    """Kinds of cache by name; `kept` tokens are the budget of those that evict."""
    import jkv

    scores = {"h2o": jkv.scores.h2o}
    if target != "cpu":
        scores |= {
            "key_norm": jkv.scores.key_norm,
            "tova": jkv.scores.tova,
            "snapkv": jkv.scores.snapkv(),
        }
    kinds = {
        "dense": jkv.dense(),
        "window": jkv.window(slots),
        "sinks": jkv.window(slots, sinks=4),
        "int8": jkv.quantized(bits=8),
        "int4": jkv.quantized(bits=4),
        "int2": jkv.quantized(bits=2),
        "fp8": jkv.fp8(),
        "near_far": jkv.near_far(recent=64, far=jkv.quantized(bits=8)),
    }
    # As small as the kernels take in every form; `paged_cases` has other sizes.
    page = {"cpu": 16, "h200": 64, "tpu": 16}[target]
    kinds |= {
        "paged": jkv.paged(page),
        "paged int8": jkv.paged(page, bits=8),
        "paged int4": jkv.paged(page, bits=4),
        "paged fp8": jkv.paged(page, codec=jkv.fp8()),
    }
    kinds |= {f"evicting {name}": jkv.evicting(kept, score) for name, score in scores.items()}
    if target != "tpu":
        # These are read by XLA alone, which on a TPU copies their narrow arrays.
        kinds |= {"sparse": jkv.sparse(0.25), "mixed": jkv.sparse(0.25, bits=8)}
    return kinds


def paged_cases(target: str) -> dict[str, Paged]:
    """Loops over pages by name, of sizes that people have.

    Small pages of keys that are encoded some tokens at a time are no block of a TPU's memory: they
    are as large as a tile there, see `jkv.ops.paged_attention.mosaic_tpu`.
    """
    dtype = "float32" if target == "cpu" else "bfloat16"
    found = {}
    for form, codecs in forms_of_pages().items():
        unit = max((codec.unit for codec in codecs or ()), default=1)
        least = 128 if target == "tpu" and unit > 1 else unit
        sizes = [(128, 16), (128, 64)]
        if target == "tpu":
            # In tiles that a page fills, and in lines that several tokens do.
            sizes += [(64, 16), (64, 64)] if unit == 1 else [(128, 128)]
        for dim, page in sizes:
            if page < least:
                continue
            for batch, groups in ((1, 1), (8, 4)):
                if target == "tpu" and batch == 1:
                    continue  # as `kinds_of` has them
                name = f"{form} in pages of {page} B={batch} G={groups}"
                name += "" if dim == 128 else f" H={dim}"
                found[name] = Paged(form, page, batch, groups, head_dim=dim, dtype=dtype)
    return found


def cases(target: str, shape: str | None = None) -> dict[str, Case]:
    """What is compiled, by name; sizes are no cost, nothing of this is ever allocated.

    Args:
        target: one of `TARGETS`.
        shape: one of `SHAPES`: the whole of such a model, with each kind. Otherwise few layers, at
            sizes at which a compiler may choose differently.
    """
    if shape is not None:
        sizes: dict[str, Any] = SHAPES[shape] | {"slots": 8192, "dtype": "bfloat16"}
        kinds = kinds_of(target, 8192, 8192)
        return {f"{shape} {name}": Case(kind, 8, **sizes) for name, kind in kinds.items()}
    # On an accelerator the buffers must be too long for the chip's own memory: a TPU carries a
    # whole small cache into it and out again, which is no second cache. A kind that rounds decodes
    # a block of 128 tokens at a time, whatever the length: that is little beside a long one, which
    # has to be the longer the fewer bytes a token takes.
    long = 32768
    short = 4096 if target == "cpu" else long
    exact = ("dense", "window", "sinks", "paged")
    # A score that looks at keys is XLA's affair, and moves whatever the chip's memory holds.
    kept = 4 * long if target == "tpu" else short
    forms = {
        "cpu": [("float32", 64)],
        "tpu": [("bfloat16", 128), ("bfloat16", 64), ("float32", 64)],
        "h200": [("bfloat16", 128), ("float32", 128)],
    }[target]
    narrow = [form for form in forms[1:] if form == ("bfloat16", 64)]

    def chosen(name: str, form: tuple[str, int], batch: int, groups: int) -> bool:
        # All of it for one kind; for the others the fewest and the most rows.
        if name == "dense":
            return True
        if form in narrow:
            return (batch, groups) == (1, 1)
        return form == forms[0] and (batch, groups) in ((1, 1), (8, 4))

    return {
        f"{name} B={batch} G={groups} {form[0]} H={form[1]}": Case(
            kind,
            batch,
            groups,
            slots=short if name in exact or "evicting" in name else long * 128 // form[1],
            dtype=form[0],
            head_dim=form[1],
        )
        for name, kind in kinds_of(target, short, kept).items()
        for form in forms
        for batch in (1, 8)
        for groups in (1, 4)
        if chosen(name, form, batch, groups)
    }


def prefill_cases(target: str) -> dict[str, Case]:
    """Prefills by name, of two layers of a Llama 3 8B: 512 tokens over 8 rows of 8192."""
    if target != "h200":
        return {}
    sizes: dict[str, Any] = SHAPES["llama-3-8b"] | {"layers": 2, "slots": 8192, "new": 512}
    names = ("dense", "window", "sinks", "int8", "int4", "paged")
    return {
        f"prefill of 512 {name}": Case(kind, 8, dtype="bfloat16", **sizes)
        for name, kind in kinds_of(target, 4096, 4096).items()
        if name in names
    }


def parted_cases(target: str) -> dict[str, Case]:
    """Loops by name of two layers of a Llama 3 8B whose heads are on two devices."""
    if target == "cpu":
        return {}
    sizes: dict[str, Any] = SHAPES["llama-3-8b"] | {"layers": 2, "slots": 8192, "parts": 2}
    return {
        f"on 2 devices {name}": Case(kind, 8, dtype="bfloat16", **sizes)
        for name, kind in kinds_of(target, 4096, 4096).items()
        if name in ("int8", "paged")
    }


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
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    sys.path.insert(0, str(ROOT))
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
        wanted: dict[str, Any] = cases(arguments.target, arguments.shape)
        if not arguments.shape:
            wanted |= paged_cases(arguments.target) | prefill_cases(arguments.target)
            wanted |= parted_cases(arguments.target)
        for name, case in wanted.items():
            if not any(text in name for text in arguments.only):
                continue
            if arguments.shape:
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
