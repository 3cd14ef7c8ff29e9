"""Types of what users pass to generation; at run time each function checks its own arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jkv.cache.protocol import CacheKind
from jkv.decoding.transform import Transform
from jkv.models.decoder import Decoder
from jkv.models.lm import LM

Model = LM | Decoder
Ids = Sequence[int] | np.ndarray | jax.Array  # [T]
Prompts = str | Sequence[str | Ids] | np.ndarray | jax.Array  # one text, or rows; arrays [B, T]
# One, or several for all rows, or a list of them for each row.
Stop = int | str | Sequence[int | str | Sequence[int | str]] | np.ndarray | jax.Array
CacheLike = CacheKind | str  # a kind, or its text such as "int4"
Sampler = Transform | Callable[[jax.Array], jax.Array]  # a function of the logits [B, V]
Progress = Callable[[int, int], object]  # of the longest prompt's tokens done, and in all
