"""`jkv info`: what a checkpoint is, and what its cache takes."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from jkv.cli import options, process


def info(
    source: Annotated[str, typer.Argument(help="A built-in name, a directory, or a hub id.")],
    cache: options.CacheSpec = "dense",
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """What a checkpoint is, and what its cache takes."""
    from jkv.cache.spec import parse

    kind = parse(cache)
    facts = _facts(process.load(source, dtype), cache, kind)
    if as_json:
        print(json.dumps(facts))
        return
    weights = facts["weight_bytes"]
    shown = facts | {
        "parameters": f"{facts['parameters']:,}",
        "weight_bytes": f"{weights:,} ({process.size(weights)})",
        "cache_bytes_per_token": f"{facts['cache_bytes_per_token']:,}",
    }
    for name, value in shown.items():
        said = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        print(f"{name.replace('_', ' '):<22} {said}")


def _facts(lm: Any, cache: str, kind: Any) -> dict[str, Any]:
    import jax

    from jkv import _pytree

    config, tokenizer = lm.config, lm.tokenizer
    sizes = ("layers", "width", "heads", "kv_heads", "head_dim", "vocab", "context")
    return {
        "model": lm.source,
        "family": config.family,
        "dtype": config.dtype,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(lm.model)),
        "weight_bytes": _pytree.nbytes(lm.model),
        "cache": cache,
        "cache_bytes_per_token": _bytes_per_token(config, kind),
        **{name: getattr(config, name) for name in sizes},
        "tokenizer": tokenizer is not None,
        "chat_template": tokenizer is not None and "default" in tokenizer.templates,
    }


def _bytes_per_token(config: Any, kind: Any) -> int:
    """What one more slot in one row takes, in all layers; nothing is allocated."""
    import jax

    from jkv import _pytree
    from jkv.cache import init_cache

    def size(slots: int) -> int:
        made = jax.eval_shape(lambda: init_cache(config, kind, batch=1, slots=slots))
        return _pytree.nbytes(made)

    return (size(2048) - size(1024)) // 1024
