"""Attention over pages that a block table puts in order; see `jkv.ops.attention`."""

from typing import Any

from jaxtyping import Float, Int

from jkv._axes import Array
from jkv.ops import choice
from jkv.ops.encoded import Encoded
from jkv.ops.pages import Tiled
from jkv.ops.partial import Partial

__all__ = ["explain_paged", "paged_attention"]


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P K page H"] | Encoded | Tiled,
    v_pages: Float[Array, "P K page H"] | Encoded | Tiled,
    block_table: Int[Array, "B M"],
    *,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Partial:
    """Attention of new tokens over cached ones in pages, as a `Partial` (Kwon et al. 2023,
    arXiv:2309.06180).

    Position p of row b is token ``p % page`` of page ``block_table[b, p // page]``. Rows may share
    pages. Nothing is gathered as a whole: pages are read where they lie, those that are seen.

    Args:
        q: queries, already rotated.
        k_pages: keys of all pages; each of the K heads serves N / K query heads. An array, or in a
            codec's form (`jkv.ops.encoded`) whose rows are pages, or `jkv.ops.pages.Tiled`.
        v_pages: values, likewise.
        block_table: numbers of pages, -1 where there is none: its tokens are seen by nobody.
        positions: of the queries; -1 is padding, which sees nothing.
        lengths: tokens of each row. What is beyond may be anything, NaN included.
        scale: of the scores, by default ``1 / sqrt(H)``.
        window: a query sees the last `window` positions, its own included.
        sinks: positions below this are seen whatever the window.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        implementation: one of `jkv.ops.choice.IMPLEMENTATIONS`; by default the best that can do
            this on the platform compiled for, see `explain_paged`.

    Raises:
        ValueError: shapes that do not fit together, or a window below 1.
        UnsupportedError: an implementation of that name does not exist, or cannot do this.
    """
    arguments = _arguments(
        q, k_pages, v_pages, block_table, positions, lengths, scale, window, sinks, softcap
    )
    return choice.run("paged_attention", implementation, arguments)


def explain_paged(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    block_table: Any,
    *,
    positions: Any,
    lengths: Any,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    platform: str | None = None,
) -> choice.Choice:
    """Which implementation `paged_attention` would choose, and why not those before it.

    Args:
        q: and the others as for `paged_attention`; shapes (`jax.ShapeDtypeStruct`) do.
        platform: "cuda", "tpu" or "cpu", by default that of this process.

    Raises:
        ValueError: as `paged_attention` does.
        UnsupportedError: another platform.
    """
    arguments = _arguments(
        q, k_pages, v_pages, block_table, positions, lengths, scale, window, sinks, softcap
    )
    return choice.choose("paged_attention", platform, arguments)


def _arguments(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    block_table: Any,
    positions: Any,
    lengths: Any,
    scale: float | None,
    window: int | None,
    sinks: int,
    softcap: float | None,
) -> dict[str, Any]:
    if q.shape[2] % k_pages.shape[1]:
        raise ValueError(
            f"paged_attention got {q.shape[2]} query heads over {k_pages.shape[1]} key/value "
            "heads; expected a multiple"
        )
    if window is not None and window < 1:
        raise ValueError(
            f"paged_attention got window={window}; expected at least 1, or None for all"
        )
    if block_table.shape[1] < 1:
        raise ValueError("paged_attention got a block table without columns; expected at least one")
    return {
        "q": q,
        "k_pages": k_pages,
        "v_pages": v_pages,
        "block_table": block_table,
        "positions": positions,
        "lengths": lengths,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "window": window,
        "sinks": sinks,
        "softcap": softcap,
    }
