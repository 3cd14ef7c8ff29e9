"""What differs between versions of JAX and flax: 0.7.2 and 0.11.2 are the oldest that jkv runs on.

Other modules neither ask for a version nor look whether these libraries have an attribute: they
call a function from here, each of which names the version that ends it, or pass the oldest JAX that
an implementation is written for to `why_too_old`.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import MutableSequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from jkv._axes import Array, Ref

if TYPE_CHECKING:
    from flax import nnx

M = TypeVar("M")
Version = tuple[int, ...]


def _parse(version: str) -> Version:
    """Return the numbers of a version, without a suffix such as rc1 or .dev2."""
    return tuple(map(int, re.findall(r"\d+", version.split("+")[0])[:3]))


JAX: Version = jax.__version_info__
FLAX = _parse(importlib.metadata.version("flax"))  # which takes a while to import

# The oldest JAX for which an implementation is written.
CUDNN_RESIDUAL: Version = (0, 8, 1)  # `dot_product_attention(return_residual=)`, the lse
MOSAIC_TPU: Version = (0, 10)  # memory spaces of inputs beside a grid of traced size
MOSAIC_GPU: Version = (0, 11)  # lane semantics, layouts of codes of 8 bits


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, such as "jaxlib", or None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def why_too_old(oldest: Version) -> str | None:
    """Return why this JAX cannot run what is written for `oldest` and later, or None."""
    if oldest <= JAX:
        return None
    found, wanted = (".".join(map(str, version)) for version in (JAX, oldest))
    return f"JAX {found} (it is for {wanted} and later)"


def module_list(modules: list[M]) -> MutableSequence[M]:
    """Make a list of modules that a module may have as an attribute.

    From flax 0.12 on that is `nnx.List`; before, there is none and a plain list is tracked.
    """
    from flax import nnx

    return modules if FLAX < (0, 12) else nnx.List(modules)


def get_value(variable: nnx.Variable[Any]) -> Any:
    """Return what a variable holds, an array or its shape: `Variable.get_value` of flax 0.12.1."""
    return variable.value if FLAX < (0, 12, 1) else variable.get_value()


def set_value(variable: nnx.Variable[Any], value: Array | jax.ShapeDtypeStruct) -> None:
    """Set what a variable holds, an array or its shape: `Variable.set_value` of flax 0.12.1."""
    if FLAX < (0, 12, 1):
        variable.value = value
    else:
        variable.set_value(value)


def gpu_store(ref: Ref, x: Array) -> None:
    """Store a small array to any part of a GPU's memory: `plgpu.store` of JAX 0.12."""
    from jax.experimental.pallas import mosaic_gpu

    if JAX < (0, 12):
        ref[...] = x
    else:
        plgpu: Any = mosaic_gpu  # a type checker may see an older one
        plgpu.store(ref, x, optimized=False)
