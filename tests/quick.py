"""Programs that are run once or twice: compiled in a third of the time, without optimisation."""

from __future__ import annotations

import functools
from typing import Any

import jax

OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    # Its newer emitters optimise whatever they are told; later versions have others, and no such
    # option.
    OPTIONS["xla_cpu_use_fusion_emitters"] = False

quick_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
