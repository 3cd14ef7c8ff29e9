"""The choice of an operation's implementation, with the reasons against others."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import jax.custom_batching
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jkv import _compat
from jkv._axes import Array
from jkv._text import brief
from jkv.errors import PerformanceWarning, UnsupportedError

PLATFORMS = ("cuda", "tpu", "cpu")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class _Record:
    names: list[str]


_target: ContextVar[str | None] = ContextVar("target", default=None)
_seen: ContextVar[_Record | None] = ContextVar("seen", default=None)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an operation.

    Attributes:
        name: what callers choose it by.
        platforms: where it is a candidate; none for one that runs anywhere when asked for.
        unsupported: the reason why it cannot do a case, from the operation's operands (shapes do)
            and static options, or None if it can.
        run: does it, with the operation's operands and static options.
        differentiable: JAX can differentiate and map it. The others have the derivatives of the
            operation's last implementation.
        only_chunks: attends to the queries' own tokens and to no others.
        oldest_jax: the first version of JAX that it is written for.
    """

    name: str
    platforms: tuple[str, ...]
    unsupported: Callable[..., str | None]
    run: Callable[..., Any]
    differentiable: bool = False
    only_chunks: bool = False
    oldest_jax: tuple[int, ...] = ()

    def why_not(self, operands: tuple[Any, ...], static: Any) -> str | None:
        """Return the reason why it cannot do a case here, or None if it can."""
        # With an older JAX, its modules may not even be imported.
        return _compat.why_too_old(self.oldest_jax) or self.unsupported(*operands, static)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which implementation runs, and the reasons against those before it in the list."""

    name: str
    refused: dict[str, str]  # name to reason
    advice: str | None = None  # what would be faster here

    def __str__(self) -> str:
        """Write the one that runs in a line, and below it each that does not, with the reason."""
        advice = "" if self.advice is None else f"; {self.advice}"
        refused = [f"  {name} does not: {why}" for name, why in self.refused.items()]
        return "\n".join([f"{self.name} runs{advice}", *refused])


def lazy_import(module: str, function: str) -> Callable[..., Any]:
    """Return a function of a module that is imported at its first call.

    The kernels' languages take a while to import, and most processes never need them.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return call


@contextlib.contextmanager
def target(platform: str) -> Iterator[None]:
    """Choose for another platform than this process has: to compile for hardware that is not there.

    It holds while a function is traced: a jitted one that has been traced before keeps its choice.

    Args:
        platform: "cuda", "tpu" or "cpu".

    Raises:
        UnsupportedError: another platform.
    """
    if platform not in PLATFORMS:
        raise UnsupportedError(f"target got {brief(platform)}; expected one of {PLATFORMS}")
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def record() -> Iterator[list[str]]:
    """Collect the names of what is chosen while functions are traced inside, each once."""
    seen = _Record([])
    token = _seen.set(seen)
    try:
        yield seen.names
    finally:
        _seen.reset(token)


def note(name: str) -> None:
    """Tell `record` that an implementation runs."""
    seen = _seen.get()
    if seen is not None and name not in seen.names:
        seen.names.append(name)


def tracing() -> Hashable:
    """Return what a trace depends on beside its arguments.

    A function whose trace is kept for later calls takes it as a static argument. Each `record` has
    another, and sees whatever runs in it.
    """
    return _target.get(), _seen.get()


def platforms() -> tuple[str, ...]:
    """Platforms for which what is traced now may be compiled."""
    wanted = _target.get()
    if wanted is None:
        backend = jax.default_backend()
        wanted = {"gpu": "cuda"}.get(backend, backend)
    # A program of a machine with a GPU may still be put on its CPU.
    return ("cpu",) if wanted not in PLATFORMS or wanted == "cpu" else (wanted, "cpu")


@functools.cache
def capability() -> str | None:
    """Return the compute capability of this GPU, None without one (when compiling for another)."""
    if jax.default_backend() != "gpu":
        return None
    return str(jax.local_devices()[0].compute_capability)


def tpu_kernels() -> bool:
    """Return whether kernels for TPUs are candidates in what is traced now."""
    return "tpu" in platforms() and _compat.why_too_old(_compat.MOSAIC_TPU) is None


def advise_dtype(dtype: DTypeLike) -> str | None:
    """Return which other dtype this device computes faster in, and why, or None."""
    found = capability()
    if found is None or jnp.dtype(dtype) != jnp.bfloat16 or int(found.split(".")[0]) >= 8:
        return None
    return (
        f"a GPU of compute capability {found} computes bfloat16 as float32; use float16, as in "
        'jkv.load(..., dtype="float16")'
    )


@functools.cache
def warn_of_dtype(dtype: DTypeLike) -> None:
    """Warn, once in a process, of a dtype that another would be faster than on this device."""
    advice = advise_dtype(dtype)
    if advice is not None:
        warnings.warn(advice, PerformanceWarning, stacklevel=3)


class Operation:
    """An operation and its implementations, the best first; the last of a platform refuses nothing.

    Args:
        name: for messages.
        implementations: in the order in which they are tried.
        fold: for kernels under `vmap`, see `kernel`.
    """

    def __init__(self, name: str, implementations: Sequence[Implementation], fold: Fold | None):
        self.name, self.fold = name, fold
        self.implementations = list(implementations)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all implementations."""
        return tuple(each.name for each in self.implementations)

    def choose(self, platform: str | None, operands: tuple[Any, ...], static: Any) -> Choice:
        """Return the first on a platform that can do this, and the reasons against others.

        Args:
            platform: "cuda", "tpu" or "cpu"; None for that of this process.
            operands: arrays, or their shapes.
            static: options.

        Raises:
            UnsupportedError: a platform that there is none for.
        """
        platform = platforms()[0] if platform is None else platform
        if platform not in PLATFORMS:
            raise UnsupportedError(
                f"{self.name} got platform={brief(platform)}; expected one of {PLATFORMS}"
            )
        refused: dict[str, str] = {}
        for each in self.implementations:
            if platform not in each.platforms:
                continue
            why = each.why_not(operands, static)
            if why is None:
                return Choice(each.name, refused)
            refused[each.name] = why
        raise UnsupportedError(f"no implementation of {self.name} on {platform}: {refused}")

    def find(self, name: str) -> Implementation:
        """Return the implementation of that name.

        Raises:
            UnsupportedError: there is none.
        """
        for each in self.implementations:
            if each.name == name:
                return each
        raise UnsupportedError(
            f"{self.name} got implementation={brief(name)}; expected one of {self.names}"
        )

    def run(self, implementation: str | None, operands: tuple[Any, ...], static: Any) -> Any:
        """Run the best implementation that can do this, or the one of that name.

        Raises:
            UnsupportedError: there is none of that name, or it cannot do this.
        """
        if implementation is not None:
            named = self.find(implementation)
            self._check(named, operands, static)
            note(named.name)
            return self._function(named)(operands, static)
        chosen = {p: self.choose(p, operands, static).name for p in platforms()}
        best = chosen[platforms()[0]]
        note(best)
        if set(chosen.values()) == {best}:
            return self._function(self.find(best))(operands, static)
        branches = {
            platform: functools.partial(self._function(self.find(name)), static=static)
            for platform, name in chosen.items()
        }
        return lax.platform_dependent(operands, **branches)

    def _check(self, named: Implementation, operands: tuple[Any, ...], static: Any) -> None:
        if named.platforms and not set(named.platforms) & set(platforms()):
            raise UnsupportedError(
                f"{self.name} got implementation={brief(named.name)}, which runs on "
                f"{list(named.platforms)} and not on {platforms()[0]}; expected None for the best "
                "one that can, or jkv.ops.dispatch.target to compile for hardware that is not there"
            )
        why = named.why_not(operands, static)
        if why is not None:
            raise UnsupportedError(
                f"{self.name} got implementation={brief(named.name)}, which cannot do this: {why}; "
                "expected None for the best one that can"
            )

    def _function(self, chosen: Implementation) -> Callable[..., Any]:
        if chosen.differentiable:
            return lambda operands, static: chosen.run(*operands, static)
        plain = next(each.run for each in self.implementations if each.differentiable)

        def call(operands: tuple[Any, ...], static: Any) -> Any:
            return kernel(chosen.run, plain, operands, static, fold=self.fold)

        return call


# A mapped axis as part of the rows of a kernel's operands, given which leaves are mapped and the
# axis' size; None where the operands cannot be folded.
Fold = Callable[[tuple[Any, ...], tuple[Any, ...], int], tuple[Any, ...] | None]


def fold_rows(operands: T, batched: T, size: int) -> T:
    """Fold a mapped axis of `size` into the first axis of each leaf; unmapped ones are repeated."""

    def folded(yes: bool, leaf: Array) -> Array:
        leaf = leaf if yes else jnp.broadcast_to(leaf, (size, *leaf.shape))
        return leaf.reshape(-1, *leaf.shape[2:])

    return jax.tree.map(folded, batched, operands)


def fold_unless_shared(*own: int) -> Fold:
    """Fold all operands into rows, if those of these numbers are mapped as a whole.

    What rows share (a cache) is not to be repeated for each of them.
    """

    def fold(
        operands: tuple[Any, ...], batched: tuple[Any, ...], size: int
    ) -> tuple[Any, ...] | None:
        if not all(jax.tree.leaves([batched[i] for i in own])):
            return None
        return fold_rows(operands, batched, size)

    return fold


def kernel(
    function: Callable[..., Any],
    plain: Callable[..., Any],
    operands: tuple[Any, ...],
    *static: Any,
    fold: Fold | None = None,
) -> Any:
    """Run a kernel with the derivatives of `plain`, and under `vmap` with more rows, or as `plain`.

    Args:
        function: the kernel.
        plain: the same in operations that JAX differentiates and maps.
        operands: of both, pytrees of arrays.
        static: further arguments of both, hashable.
        fold: makes a mapped axis part of the rows; None: mapped calls run `plain`.
    """

    @jax.custom_batching.custom_vmap
    def mapped(operands: tuple[Any, ...]) -> Any:
        return _compiled(function, static, operands)

    @mapped.def_vmap
    def _(size: int, flags: Any, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        (batched,) = flags
        folded = None if fold is None else fold(operands, batched, size)
        if folded is not None:
            out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), mapped(folded))
        else:
            axes = jax.tree.map(lambda yes: 0 if yes else None, batched)
            out = jax.vmap(lambda x: plain(*x, *static), (axes,), axis_size=size)(operands)
        return out, jax.tree.map(lambda _: True, out)

    @jax.custom_jvp
    def run(operands: tuple[Any, ...]) -> Any:
        return mapped(operands)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return jax.jvp(lambda x: plain(*x, *static), primals, tangents)

    return run(operands)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    function: Callable[..., Any], static: tuple[Any, ...], operands: tuple[Any, ...]
) -> Any:
    """Run the kernel, a function that all layers of a model share: traced and lowered once.

    Some kernels place their operands, which is for compiled programs only.
    """
    return function(*operands, *static)
