"""What the figures were measured on, and how fast it reads memory."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")


def cores() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Hardware, versions and date."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"{device.platform}: {device.device_kind}",
        "processor": _processor(),
        "cores": cores(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "load": load(),
    }


def load() -> float | None:
    """Processes that want to run, averaged over a minute: above `cores()` others are in the way."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    wide = " (AVX-512)" if any("avx512f" in line for line in lines) else ""
    return (names[0] if names else platform.processor() or platform.machine()) + wide


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_bandwidth(size: int = 1 << 30, rounds: int = 7) -> float:
    """Bytes per second at which the device reads an array of `size` bytes, the best form's median.

    On the CPU both a reduction by XLA and one dot product per core by numpy's BLAS: whichever is
    faster is nearer to what the memory can do.
    """
    numbers = np.ones(size // 4, np.float32)
    forms = [_by_xla(numbers)]
    if jax.default_backend() == "cpu":
        forms.append(_by_numpy(numbers))
    rates = []
    for form in forms:
        form()
        rates.append(statistics.median(size / form() for _ in range(rounds)))
    return max(rates)


def _by_xla(numbers: np.ndarray) -> Any:
    array = jax.device_put(numbers)
    total = jax.jit(lambda x: x.sum())

    def run() -> float:
        start = time.perf_counter()
        total(array).block_until_ready()
        return time.perf_counter() - start

    return run


def _by_numpy(numbers: np.ndarray) -> Any:
    parts = np.array_split(numbers, cores())
    pool = ThreadPoolExecutor(len(parts))

    def run() -> float:
        start = time.perf_counter()
        list(pool.map(lambda part: np.dot(part, part), parts))
        return time.perf_counter() - start

    return run
