"""Small models, to be planned for."""

from __future__ import annotations

import dataclasses

from jkv.models import Config, Rope

GIB = 2**30
TINY = Config(
    vocab=512,
    layers=2,
    width=128,
    heads=8,
    kv_heads=2,
    head_dim=16,
    feed_forward=256,
    context=4096,
    rope=Rope(dims=16),
)
WINDOWED = dataclasses.replace(TINY, layers=4, windows=(64, None, 64, None))
