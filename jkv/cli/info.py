"""`jkv info`: what runs here, what a checkpoint is, and what its cache takes."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

import jkv
from jkv.cli import options, process


def info(
    source: Annotated[
        str | None, typer.Argument(help="A built-in name, a directory, or a hub id.")
    ] = None,
    cache: options.CacheSpec = "dense",
    dtype: options.Dtype = None,
    ignore: options.Ignore = None,
    as_json: options.AsJson = False,
) -> None:
    """Tell what runs here, and what a checkpoint takes.

    Of what runs the versions, the device and how it attends.
    """
    from jkv.cache.spec import parse
    from jkv.models import outline

    kind = parse(cache)
    facts: dict[str, Any] = {}
    if source is not None:
        facts = _facts(outline(source, dtype=dtype, ignore=ignore or ()), cache, kind)
    facts |= {"runs": jkv.about()}
    if as_json:
        print(json.dumps(facts))
        return
    if source is None:
        print(facts["runs"])
        return
    weights = facts["weight_bytes"]
    shown = facts | {
        "parameters": f"{facts['parameters']:,}",
        "weight_bytes": f"{weights:,} ({process.size(weights)})",
        "cache_bytes_per_token": f"{facts['cache_bytes_per_token']:,}",
    }
    for name, value in shown.items():
        shown_as = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        print(f"{name.replace('_', ' '):<22} {shown_as}")


def _facts(lm: jkv.LM, cache: str, kind: jkv.CacheKind) -> dict[str, Any]:
    import jax

    from jkv import _pytree
    from jkv.planning.memory import bytes_per_token

    config, tokenizer = lm.config, lm.tokenizer
    sizes = ("layers", "width", "heads", "kv_heads", "head_dim", "vocab", "context")
    return {
        "model": lm.source,
        "family": config.family,
        "dtype": config.dtype,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(lm.model)),
        "weight_bytes": _pytree.nbytes(lm.model),
        "cache": cache,
        "cache_bytes_per_token": bytes_per_token(config, kind, 1024),
        **{name: getattr(config, name) for name in sizes},
        "tokenizer": tokenizer is not None,
        "chat_template": tokenizer is not None and "default" in tokenizer.templates,
    }
