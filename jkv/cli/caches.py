"""`jkv caches`: the kinds of cache, how they are written, and what they take."""

from __future__ import annotations

import json

from jkv.cli import options, plan


def caches(
    model: plan.Planned = "llama-3.1-8b",
    seq_len: options.SeqLen = None,
    dtype: plan.PlannedDtype = None,
    ignore: options.Ignore = None,
    as_json: options.AsJson = False,
) -> None:
    """List the kinds of cache, and what they take in a model."""
    from jkv import planning
    from jkv.cache import spec

    made = planning.survey(model, seq_len=options.tokens(seq_len), dtype=dtype, ignore=ignore or ())
    if as_json:
        keys = ("cache", "bytes_per_token", "cache_bytes", "seq_len", "model", "refused")
        listed = []
        for entry in made:
            name = entry.cache.partition(":")[0]
            about = {"usage": spec.usage(name), "description": spec.FORMS[name].says}
            listed.append({k: v for k, v in entry.to_dict().items() if k in keys} | about)
        print(json.dumps({"caches": listed}))
        return
    for name, form in spec.FORMS.items():
        print(f"{spec.usage(name)}\n    {form.says}")
    print()
    print(plan.table(made))
