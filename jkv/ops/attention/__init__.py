"""Attention over a cache: one meaning (`reference`), several implementations, one choice."""

from typing import Any

from jaxtyping import Float, Int

from jkv._axes import Array
from jkv.ops import choice
from jkv.ops.choice import IMPLEMENTATIONS
from jkv.ops.encoded import Encoded
from jkv.ops.partial import Partial

__all__ = ["IMPLEMENTATIONS", "attention", "explain"]


def __dir__() -> list[str]:
    return sorted(__all__)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | Encoded,
    v: Float[Array, "B K S H"] | Encoded,
    *,
    positions: Int[Array, "B T"],
    slot_positions: Int[Array, "B S"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    chunk: bool = False,
    implementation: str | None = None,
) -> Partial:
    """Attention of new tokens over cached ones, as a `Partial` that merges with others.

    Args:
        q: queries, already rotated.
        k: keys of the slots; each of the K heads serves N / K query heads. An array, or in a
            codec's form (`jkv.ops.encoded`), which is read a block at a time and never decoded
            as a whole.
        v: values of the slots, likewise.
        positions: of the queries; -1 is padding, which sees nothing.
        slot_positions: of the tokens in the slots, -1 where a slot is empty. Without it slot s
            holds position s.
        lengths: only the first `lengths[b]` slots of a row hold anything. Without it all do.
            What is beyond may be anything, NaN included.
        scale: of the scores, by default ``1 / sqrt(H)``.
        window: a query sees the last `window` positions, its own included.
        sinks: positions below this are seen whatever the window.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2, arXiv:2408.00118).
        chunk: the slots hold the queries' own tokens, each row's real ones first and in order:
            `positions` are those of the slots too. A prefill among itself, which some
            implementations can do and no more.
        implementation: one of `IMPLEMENTATIONS`; by default the best of those that can do this on
            the platform compiled for, see `explain`.

    Raises:
        ValueError: shapes that do not fit together, a window below 1, or slots that are described
            twice.
        UnsupportedError: an implementation of that name does not exist, or cannot do this.
    """
    arguments = _arguments(
        q, k, v, positions, slot_positions, lengths, scale, window, sinks, softcap, chunk
    )
    return choice.run("attention", implementation, arguments)


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    positions: Any,
    slot_positions: Any = None,
    lengths: Any = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    chunk: bool = False,
    platform: str | None = None,
) -> choice.Choice:
    """Which implementation `attention` would choose, and why not those before it in the list.

    Args:
        q: and the others as for `attention`; shapes (`jax.ShapeDtypeStruct`) do.
        platform: "cuda", "tpu" or "cpu", by default that of this process.

    Raises:
        ValueError: as `attention` does.
        UnsupportedError: another platform.
    """
    arguments = _arguments(
        q, k, v, positions, slot_positions, lengths, scale, window, sinks, softcap, chunk
    )
    return choice.choose("attention", platform, arguments)


def _arguments(
    q: Any,
    k: Any,
    v: Any,
    positions: Any,
    slot_positions: Any,
    lengths: Any,
    scale: float | None,
    window: int | None,
    sinks: int,
    softcap: float | None,
    chunk: bool,
) -> dict[str, Any]:
    """What every implementation is given, after what none could do."""
    if q.shape[2] % k.shape[1]:
        raise ValueError(
            f"attention got {q.shape[2]} query heads over {k.shape[1]} key/value heads; "
            "expected a multiple"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention got window={window}; expected at least 1, or None for all")
    if chunk and not (slot_positions is None and lengths is None and k.shape[2] == q.shape[1]):
        raise ValueError(
            f"attention got chunk=True with {k.shape[2]} slots for {q.shape[1]} queries, and slots "
            "that are described otherwise; expected as many, without slot_positions and lengths"
        )
    return {
        "q": q,
        "k": k,
        "v": v,
        "positions": positions,
        "slot_positions": positions if chunk else slot_positions,
        "lengths": lengths,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "window": window,
        "sinks": sinks,
        "softcap": softcap,
        "chunk": chunk,
    }
