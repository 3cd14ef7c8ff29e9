"""What checks jkv's annotations in tests: beartype, but for the arguments of its entry points.

What users call checks its arguments itself, with messages that say what to do. Its annotations are
for readers and type checkers, and beartype's messages must not come first. Results are checked, and
so are the arguments of everything else.
"""

from __future__ import annotations

from beartype import beartype

# Per package, as `__qualname__` has them.
ENTRY_POINTS = {
    "jkv.cache": (
        "Cache.convert",
        "Cache.crop",
        "Cache.evict",
        "Cache.fork",
        "Cache.requantise",
        "Cache.resize",
        "Cache.take",
        "Paged.requantise",
        "QuantizedCache.requantise",
        "_affine",
        "_codecs",
        "_layer_kind",
        "check_lengths",
        "check_rows",
        "concat",
        "convert",
        "dense",
        "evict",
        "evicting",
        "fp8",
        "from_legacy",
        "init_cache",
        "near_far",
        "paged",
        "parse",
        "per_layer",
        "pyramid",
        "quantized",
        "snapkv",
        "sparse",
        "window",
    ),
    "jkv.decoding": (
        "Chat.__init__",
        "Chat.send",
        "Chat.stream",
        "Options.__init__",
        "PrefixStore.__init__",
        "_find",
        "_resume",
        "_slots",
        "beam_search",
        "chain",
        "decode_step",
        "generate",
        "min_new_tokens",
        "no_repeat_ngram",
        "prefill",
        "prepare",
        "prompt_lookup",
        "rollout",
        "score",
        "stream",
    ),
    "jkv.cli": ("_answer", "drawing"),
    "jkv.engine": (
        "Engine.__init__",
        "Engine.generate",
        "Engine.submit",
        "Engine.update",
        "Engine.warm",
        "EngineCore.__init__",
        "EngineCore.warm",
        "PageStore.__init__",
        "RequestOptions.__init__",
        "Runner.bind",
        "Swap.__init__",
        "bind_sampler",
        "managed_kind",
    ),
    "jkv.ops": (
        "Affine.__init__",
        "Cast.__init__",
        "Sparse.__init__",
        "AttentionSpec.__init__",
        "attention",
        "explain",
    ),
    "jkv.models": (
        "LM.decode",
        "LM.encode",
        "LM.save",
        "Tokenizer.decode",
        "dtype_name",
        "_ids",
        "load",
        "outline",
        "read_config",
        "shard",
    ),
    "jkv.testing": ("check_kind",),
    "jkv.planning": (
        "_dtype",
        "_plan",
        "find_config",
        "plan",
        "survey",
    ),
    "jkv.store": (
        "Disk.__init__",
        "Reader.lookups",
        "Reader.matches",
        "Remote.__init__",
        "Store.__init__",
        "Store.contains",
        "Store.get",
        "Store.get_entry",
        "Store.get_many",
        "Store.longest_prefix",
        "Store.longest_prefix_many",
        "Store.open",
        "Store.open_many",
        "Store.prefetch",
        "Store.put",
        "Store.put_many",
        "Store.reject",
        "Store.remove",
        "Store.resize",
        "Store.sweep",
        "Store.unpin",
        "Store.warm",
        "Tier.__init__",
        "TierState.resize",
        "Tiering.resize",
        "Writer.prepare",
        "_InProcess.__init__",
        "as_tokens",
        "check_keys",
        "entry_name",
    ),
}
found: dict[str, set[str]] = {package: set() for package in ENTRY_POINTS}


def checked(function):
    """The typechecker of jaxtyping's import hook, which knows it by its name."""
    package = ".".join(function.__module__.split(".")[:2])
    if function.__qualname__ in ENTRY_POINTS.get(package, ()):
        found[package].add(function.__qualname__)
        annotations = function.__annotations__
        function.__annotations__ = {k: v for k, v in annotations.items() if k == "return"}
    return beartype(function)
