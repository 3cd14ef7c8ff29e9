"""Which loops `compile_check.py` compiles for each target, by name."""

from __future__ import annotations

from typing import Any

import jkv
from bench.loops import Case, Paged, forms_of_pages
from jkv.planning import PRESETS


def _sizes(name: str) -> dict[str, Any]:
    """Of a published model, in the words of `Case`."""
    config = PRESETS[name]
    same = ("kv_heads", "head_dim", "layers", "width", "feed_forward", "vocab")
    return {"groups": config.heads // config.kv_heads} | {x: getattr(config, x) for x in same}


# Models that people run, 8 rows of 8192 tokens.
SHAPES = {name: _sizes(name) for name in ("llama-3-8b", "llama-3.2-1b")}


def kinds_of(target: str, slots: int, kept: int) -> dict[str, Any]:
    """Kinds of cache by name; `kept` tokens are the budget of those that evict."""
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
    are as large as a tile there, see `jkv.ops.attention.mosaic_tpu`.
    """
    dtype = "float32" if target == "cpu" else "bfloat16"
    found = {}
    for form, codecs in forms_of_pages().items():
        unit = max((codec.block_size for codec in codecs or ()), default=1)
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
        target: cpu, tpu or h200.
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


def wanted(target: str, shape: str | None = None) -> dict[str, Case | Paged]:
    """All that is compiled for a target, by name, or of one of `SHAPES`."""
    found: dict[str, Case | Paged] = {**cases(target, shape)}
    if shape is None:
        found |= paged_cases(target) | prefill_cases(target) | parted_cases(target)
    return found
