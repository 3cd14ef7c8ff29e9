"""Which implementation of attention runs, and why not another: one list for each platform."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
from jax import lax

from jkv._text import brief
from jkv.errors import UnsupportedError

# What is tried on a platform, best first. The last refuses nothing.
CANDIDATES = {
    "cuda": ("mosaic_gpu", "xla"),
    "tpu": ("mosaic_tpu", "xla"),
    "cpu": ("xla",),
}
# What one operation has there besides, which is tried before.
BEFORE = {("attention", "cuda"): ("cudnn",)}
IMPLEMENTATIONS = ("cudnn", "mosaic_gpu", "mosaic_tpu", "xla", "reference")
DIFFERENTIABLE = ("xla", "reference")  # the others have the derivatives of "xla"
CACHES = ("k", "v", "buffer", "pages")  # operands not to be repeated for rows that share them
POOLS = ("k_pages", "v_pages", "pages")  # operands that all rows share

_target: ContextVar[str | None] = ContextVar("target", default=None)
_seen: ContextVar[list[str] | None] = ContextVar("seen", default=None)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which implementation runs, and what was said against those before it in the list."""

    name: str
    refused: dict[str, str]  # name to reason

    def __str__(self) -> str:
        """One line for each."""
        lines = [f"{name}: no, {why}" for name, why in self.refused.items()]
        return "\n".join([*lines, f"{self.name}: yes"])


@contextlib.contextmanager
def target(platform: str) -> Iterator[None]:
    """Choose for another platform than this process has: to compile for hardware that is not there.

    It holds while a function is traced: a jitted one that has been traced before keeps its choice.

    Args:
        platform: "cuda", "tpu" or "cpu".

    Raises:
        UnsupportedError: another platform.
    """
    if platform not in CANDIDATES:
        raise UnsupportedError(f"target got {brief(platform)}; expected one of {tuple(CANDIDATES)}")
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def record() -> Iterator[list[str]]:
    """The names of what is chosen while functions are traced inside, each once, in order."""
    names: list[str] = []
    token = _seen.set(names)
    try:
        yield names
    finally:
        _seen.reset(token)


def platforms() -> tuple[str, ...]:
    """Platforms for which what is traced now may be compiled."""
    wanted = _target.get()
    if wanted is None:
        backend = jax.default_backend()
        wanted = {"gpu": "cuda"}.get(backend, backend)
    # A program of a machine with a GPU may still be put on its CPU.
    return ("cpu",) if wanted not in CANDIDATES or wanted == "cpu" else (wanted, "cpu")


def candidates(operation: str, platform: str) -> tuple[str, ...]:
    """What is tried for an operation on a platform, best first."""
    return *BEFORE.get((operation, platform), ()), *CANDIDATES[platform]


@functools.cache
def capability() -> str | None:
    """Of the GPU there is; None where there is none, which is where another is compiled for."""
    if jax.default_backend() != "gpu":
        return None
    return str(jax.local_devices()[0].compute_capability)


def choose(operation: str, platform: str | None, arguments: dict[str, Any]) -> Choice:
    """The first in the platform's list that does not say why it cannot.

    Raises:
        UnsupportedError: a platform that there is no list for.
    """
    platform = platforms()[0] if platform is None else platform
    if platform not in CANDIDATES:
        raise UnsupportedError(
            f"{operation} got platform={brief(platform)}; expected one of {tuple(CANDIDATES)}"
        )
    refused = {}
    for name in candidates(operation, platform):
        why = _why_not(operation, name, arguments)
        if why is None:
            return Choice(name, refused)
        refused[name] = why
    raise UnsupportedError(f"no implementation of {operation} on {platform}: {refused}")


def run(operation: str, name: str | None, arguments: dict[str, Any]) -> Any:
    """What the chosen implementation says, or the one of that name.

    Raises:
        UnsupportedError: there is none of that name, or it cannot do this.
    """
    if name is not None:
        own = [platform for platform in CANDIDATES if name in candidates(operation, platform)]
        if not own and name not in DIFFERENTIABLE:
            listed = {n for platform in CANDIDATES for n in candidates(operation, platform)}
            known = tuple(n for n in IMPLEMENTATIONS if n in listed or n in DIFFERENTIABLE)
            raise UnsupportedError(
                f"{operation} got implementation={brief(name)}; expected one of {known}"
            )
        if own and not set(own) & set(platforms()):
            raise UnsupportedError(
                f"{operation} got implementation={brief(name)}, which runs on {own} and not on "
                f"{platforms()[0]}; expected None for the best one that can, or "
                "jkv.ops.choice.target to compile for hardware that is not there"
            )
        why = _why_not(operation, name, arguments)
        if why is not None:
            raise UnsupportedError(
                f"{operation} got implementation={brief(name)}, which cannot do this: {why}; "
                "expected None for the best one that can"
            )
        note(name)
        return _function(operation, name)(**arguments)
    chosen = {p: choose(operation, p, arguments).name for p in platforms()}
    best = chosen[platforms()[0]]
    note(best)
    if set(chosen.values()) == {best}:
        return _function(operation, best)(**arguments)
    static = {k: v for k, v in arguments.items() if not _traced(v)}
    traced = {k: v for k, v in arguments.items() if _traced(v)}
    branches = {
        platform: functools.partial(_called, _function(operation, name), static)
        for platform, name in chosen.items()
    }
    return lax.platform_dependent(traced, **branches)


def _called(function: Any, static: dict[str, Any], traced: dict[str, Any]) -> Any:
    return function(**traced, **static)


def _traced(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)


def note(name: str) -> None:
    """Tell `record` that an implementation runs."""
    names = _seen.get()
    if names is not None and name not in names:
        names.append(name)


def _module(operation: str, name: str) -> Any:
    # On first use: the kernels' languages take a while to import, and most never need them.
    return importlib.import_module(f"jkv.ops.{operation}.{name}")


def _function(operation: str, name: str) -> Callable[..., Any]:
    function = getattr(_module(operation, name), operation)
    if name in DIFFERENTIABLE:
        return function
    return functools.partial(kernel, function, getattr(_module(operation, "xla"), operation))


def kernel(function: Any, plain: Any, **arguments: Any) -> Any:
    """A kernel, with the derivatives of `plain`, and under `vmap`: more rows, or `plain`.

    Args:
        function: the kernel; its arrays begin with rows, but for those of `POOLS`.
        plain: the same in operations that JAX differentiates and maps.
        arguments: of both.
    """
    static = {k: v for k, v in arguments.items() if not _traced(v)}
    traced = {k: v for k, v in arguments.items() if _traced(v)}

    @jax.custom_batching.custom_vmap
    def mapped(traced: dict[str, Any]) -> Any:
        return _compiled(function, tuple(static.items()), traced)

    @mapped.def_vmap
    def _(size: int, flags: Any, traced: dict[str, Any]) -> tuple[Any, Any]:
        batched = flags[0]
        whole = {k: all(jax.tree.leaves(v)) for k, v in batched.items()}
        some = {k: any(jax.tree.leaves(v)) for k, v in batched.items()}
        if all(whole.get(k, True) for k in CACHES) and not any(some.get(k) for k in POOLS):
            out = _with_more_rows(mapped, size, batched, traced)
        else:
            axes = jax.tree.map(lambda yes: 0 if yes else None, batched)
            out = jax.vmap(lambda t: plain(**t, **static), (axes,), axis_size=size)(traced)
        return out, jax.tree.map(lambda _: True, out)

    @jax.custom_jvp
    def run(traced: dict[str, Any]) -> Any:
        return mapped(traced)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return jax.jvp(lambda t: plain(**t, **static), primals, tangents)

    return run(traced)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(function: Any, static: tuple[tuple[str, Any], ...], traced: dict[str, Any]) -> Any:
    """The kernel, a function that all layers of a model share: traced and lowered once.

    Some kernels place their operands, which is for compiled programs only.
    """
    return function(**traced, **dict(static))


def _with_more_rows(mapped: Any, size: int, batched: Any, traced: dict[str, Any]) -> Any:
    """The mapped axis as part of the rows."""

    def folded(yes: bool, leaf: Any) -> Any:
        leaf = leaf if yes else jnp.broadcast_to(leaf, (size, *leaf.shape))
        return leaf.reshape(-1, *leaf.shape[2:])

    rows = {k: v if k in POOLS else jax.tree.map(folded, batched[k], v) for k, v in traced.items()}
    return jax.tree.map(lambda leaf: leaf.reshape(size, -1, *leaf.shape[1:]), mapped(rows))


def _why_not(operation: str, name: str, arguments: dict[str, Any]) -> str | None:
    check = getattr(_module(operation, name), "unsupported", None)
    return None if check is None else check(**arguments)
