"""What this process runs on: the device, the attention on it, and a GPU that is not used."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jkv import _compat
from jkv._version import __version__
from jkv.ops import dispatch
from jkv.ops.attention import explain
from jkv.ops.kv import ContiguousKV

_DEVICES = Path("/dev")
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


def about() -> str:
    """Say in one line what runs here: versions, device, attention, and a GPU that is not used.

    Example:
        >>> print(jkv.about())
        jkv ..., JAX ... on cpu; attention in float32: xla
    """
    devices = jax.local_devices()
    device = devices[0].device_kind
    capability = dispatch.capability()
    if capability is not None:
        device += f" (compute capability {capability})"
    if len(devices) > 1:
        device = f"{len(devices)} x {device}"
    jax_version = _compat.installed_version("jax")
    parts = [
        f"jkv {__version__}, JAX {jax_version} on {device}",
        _attention(_dtype()),
        dispatch.advise_dtype(jnp.bfloat16),
        unused_gpu(),
    ]
    return "; ".join(part for part in parts if part is not None)


def _dtype() -> DTypeLike:
    """Return the dtype for models on this device."""
    if dispatch.platforms()[0] == "cpu":
        return jnp.float32
    return jnp.bfloat16 if dispatch.advise_dtype(jnp.bfloat16) is None else jnp.float16


def _attention(dtype: DTypeLike) -> str:
    """Say which attention runs in a common model: over a cache, and in a prompt."""

    def chosen(new: int, slots: int) -> str:
        q = jax.ShapeDtypeStruct((1, new, 32, 128), dtype)
        k: Any = jax.ShapeDtypeStruct((1, 8, slots, 128), dtype)
        return explain(q, ContiguousKV(k, k, chunk=new == slots)).name

    step, prompt = chosen(1, 4096), chosen(512, 512)
    rest = "" if prompt == step else f", in a prompt: {prompt}"
    return f"attention in {jnp.dtype(dtype).name}: {step}{rest}"


def unused_gpu() -> str | None:
    """Say which NVIDIA GPU is there while JAX runs on the CPU, why, and what to do; else None."""
    if jax.default_backend() != "cpu":
        return None
    gpu = _find_gpu()
    return None if gpu is None else f"UNUSED: {gpu}, {_why_unused()}"


def _find_gpu() -> str | None:
    """Return the name of an NVIDIA GPU that the driver sees, or None."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        try:
            done = subprocess.run(
                [tool, "--query-gpu=name", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip().splitlines()[0]
    return "an NVIDIA GPU" if any(_DEVICES.glob("nvidia[0-9]*")) else None


def _why_unused() -> str:
    version, lib = map(_compat.installed_version, ("jax", "jaxlib"))
    install = f"""install "jax[cuda12]=={version}" and start Python anew"""
    wanted = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if wanted and not {"cuda", "gpu"} & set(wanted.split(",")):
        return f"since JAX_PLATFORMS is {wanted!r}: unset it"
    found = {name: v for name in _PLUGINS if (v := _compat.installed_version(name)) is not None}
    if not found:
        return f"since JAX's plugin for it is not installed: {install}"
    if lib not in found.values():
        name, other = next(iter(found.items()))
        return f"since {name} {other} is not for jaxlib {lib}: {install}"
    return "which JAX could not start: see what it logged, and whether the driver is new enough"
