"""What jkv moves between host and device itself, under a transfer guard of the user's too."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")
_NOTHING = contextlib.nullcontext()
_GUARDS = tuple(
    f"jax_transfer_guard_{way}" for way in ("host_to_device", "device_to_host", "device_to_device")
)


def intended() -> contextlib.AbstractContextManager[None]:
    """Mark the transfers within as intended: prompts go to the device, and tokens come back.

    `jax.transfer_guard("disallow")` is for transfers that a program makes by accident. Those of a
    call whose arguments or results are on the host are none. (To spell each of them as a
    `jax.device_put` would take six times as long as the implicit transfer of a program's argument,
    and this takes nothing where there is no guard: JAX 0.10.2.)
    """
    guarded = any(getattr(jax.config, guard) is not None for guard in _GUARDS)
    return jax.transfer_guard("allow") if guarded else _NOTHING


def transfers(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose transfers between host and device are `intended`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with intended():
            return function(*args, **kwargs)

    return call
