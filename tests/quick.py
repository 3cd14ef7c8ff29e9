"""How the tests' programs are compiled: without optimisation, in a third of the time.

Most are run once or twice, and compiling them is most of the suite's time. What looks at a program
itself, or at the clock, compiles it as users' are: with ``compiler_options=OPTIMISED``, or with the
fixture `optimised`; what looks only at a program's buffers needs them as users' are and no fast
code, the fixture `fused`. JKV_TEST_OPTIMISED=1 compiles all programs as users' are.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

OPTIMISED: dict[str, Any] = {"xla_backend_optimization_level": 3}
FUSED: dict[str, Any] = {}  # XLA's own passes as users have them, and of LLVM's none
_QUICK = {
    "xla_backend_optimization_level": "0",
    # Modules split among threads cost a fifth more time in all; the suite's workers fill the cores.
    "xla_cpu_parallel_codegen_split_count": "1",
}
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # The newer of two ways to emit fusions optimises whatever it is told; later versions have but
    # one, and no such option.
    OPTIMISED["xla_cpu_use_fusion_emitters"] = FUSED["xla_cpu_use_fusion_emitters"] = True
    _QUICK["xla_cpu_use_fusion_emitters"] = "false"


def flags(environment: Mapping[str, str]) -> str:
    """XLA's; those that are there already come last, and win."""
    given = environment.get("XLA_FLAGS", "")
    wanted = environment.get("JKV_TEST_OPTIMISED") == "1" or "optimization_level" in given
    if wanted or environment.get("JAX_PLATFORMS") != "cpu":
        return given
    return " ".join([*(f"--{name}={value}" for name, value in _QUICK.items()), given]).strip()
