"""What every test stands on: runtime shape checks, strict numerics, and what tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests import quick, typecheck

# Before JAX reads it; processes that tests start compile alike, and compute the same bits.
os.environ["XLA_FLAGS"] = quick.flags(os.environ)

from jaxtyping import install_import_hook

# Before jkv is imported by anything: every annotated shape and dtype is checked at each call.
install_import_hook("jkv", f"{typecheck.__name__}.checked")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long runs are for those who ask for them."""
    if os.environ.get("JKV_SOAK") != "1":
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="a long run: set JKV_SOAK=1"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Checkpoints and texts too big for the repository, in `shared/` beside it.

    JKV_REQUIRE_SHARED=1 makes their absence a failure, so that a run which is meant to cover them
    cannot pass by skipping.
    """
    for path in (ROOT.parent / "shared", ROOT / "shared"):
        if path.is_dir():
            return path
    reason = f"no shared/ directory beside {ROOT.name}/: nothing real to read"
    if os.environ.get("JKV_REQUIRE_SHARED") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


class Compiles:
    """How many programs XLA compiled since the last `reset`."""

    _total = 0

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Count from here."""
        self._start = Compiles._total

    @property
    def count(self) -> int:
        """Programs compiled so far."""
        return Compiles._total - self._start

    def __enter__(self) -> Compiles:
        self.reset()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = Compiles._total

    @classmethod
    def listen(cls, event: str, duration: float, **_: object) -> None:
        """Called by JAX. The size of a jitted function's cache would count too much."""
        del duration
        if event == "/jax/core/compile/backend_compile_duration":
            cls._total += 1


jax.monitoring.register_event_duration_secs_listener(Compiles.listen)


@pytest.fixture
def compiles() -> Compiles:
    """Counts compilations: ``with compiles: ...`` and then ``compiles.count``, read inside."""
    return Compiles()


@pytest.fixture(scope="session")
def tiny_config():
    """A decoder in miniature: two layers, grouped heads, rotary positions."""
    from jkv.models import Config, Rope

    return Config(
        vocab=11,
        layers=2,
        width=16,
        heads=4,
        kv_heads=2,
        head_dim=8,
        feed_forward=24,
        context=256,
        rope=Rope(dims=8),
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """`tiny_config` with random weights; tests must not change it."""
    from flax import nnx

    from jkv.models import Decoder

    # In one program: one compilation instead of one per operation.
    model = jax.jit(lambda: Decoder(tiny_config, rngs=nnx.Rngs(0)))()
    # Drawn as for training, logits are nearly flat; spread them, so that a wrong cache shows in
    # the greedy tokens and not in the fifth digit only.
    model.embedding[...] = model.embedding[...] * 50
    return model


@pytest.fixture
def optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test compiles by hand is optimised, as it is for users."""
    compile_with(quick.OPTIMISED, monkeypatch)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test compiles by hand has the buffers that it has for users."""
    compile_with(quick.FUSED, monkeypatch)


def compile_with(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that are compiled by hand are so with these options of XLA."""
    compile = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered,
        "compile",
        lambda lowered: compile(lowered, compiler_options=options),
    )


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs() -> Iterator[None]:
    """Each program takes some 18 mappings of memory, and a process may have 65,530 of them.

    With no more of them XLA's compiler ends the process.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    """A test that changes JAX's configuration must not change the next one's."""
    before = jax.config.jax_numpy_rank_promotion, jax.config.jax_enable_x64
    yield
    assert before == (jax.config.jax_numpy_rank_promotion, jax.config.jax_enable_x64)
