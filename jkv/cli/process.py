"""What a command does to its process: the model, compiled programs on disk, a clock, a bar."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jkv._bytes import size as size

_BACKEND = "/jax/core/compile/backend_compile_duration"
_COMPILING = (
    _BACKEND,
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)


def load(source: str, dtype: str | None, ignore: list[str] | None = None) -> Any:
    """Load the model, and keep compiled programs from one process to the next."""
    import jkv

    keep_programs()
    clock()
    with bar("loading", "bytes") as progress:
        return jkv.load(source, dtype=dtype, ignore=ignore or (), progress=progress)


class Clock:
    """Knows when JAX traced and compiled, so that it is not taken for work on tokens."""

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        self._spans: list[tuple[float, float]] = []  # some lie within others

    def heard(self, event: str, duration_secs: float, **_: Any) -> None:
        """Called by JAX at the end of whatever it measures."""
        if event in _COMPILING:
            now = time.perf_counter()
            self._spans.append((now - duration_secs, now))
        if event == _BACKEND:
            self.compile_seconds += duration_secs

    def working(self, start: float, end: float) -> float:
        """Seconds from `start` to `end` in which nothing was traced or compiled."""
        worked, since = 0.0, start
        for a, b in sorted(self._spans):
            worked += max(0.0, min(a, end) - since)
            since = max(since, min(b, end))
        return worked + max(0.0, end - since)


@functools.cache
def clock() -> Clock:
    """Return the clock of this process, which runs from the first call on."""
    import jax

    made = Clock()
    jax.monitoring.register_event_duration_secs_listener(made.heard)
    return made


def keep_programs() -> None:
    """Have JAX keep compiled programs in the user's cache directory, unless it is set otherwise."""
    import jax

    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if chosen or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(base) / "jkv" / "programs"
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none to write to: compiled anew each time
        return
    if os.access(path, os.W_OK | os.X_OK):
        jax.config.update("jax_compilation_cache_dir", str(path))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextlib.contextmanager
def bar(what: str, unit: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a progress bar on a terminal, and yield what moves it; elsewhere None."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn() if unit == "bytes" else progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextlib.contextmanager
def spinner(what: str) -> Iterator[Callable[[], None]]:
    """Show on a terminal that something is under way: the function that ends it sooner."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield status.stop
