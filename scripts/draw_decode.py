"""Draw README's picture of the figures in scripts/results: python scripts/draw_decode.py [FILE]."""

from __future__ import annotations

import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PICTURE = RESULTS / "decode_2026-11-21.svg"
TOKENS = 976


def figures(text: str) -> dict[str, float]:
    """Read seconds for all tokens, by who generated them, from the table of figures.

    Raises:
        ValueError: the table has no such row.
    """
    row = re.search(
        r"GPT-2 124M, .* \| jkv ([\d.]+) s; `transformers` default ([\d.]+), static ([\d.]+); "
        r"without a cache ([\d.]+) \|",
        text,
    )
    if row is None:
        raise ValueError("scripts/results/README.md has no row of GPT-2 124M; expected one")
    cached, default, static, without = map(float, row.groups())
    return {
        "jkv, dense cache": cached,
        "transformers, default cache": default,
        "transformers, static cache": static,
        "jkv, without a cache": without,
    }


def draw(seconds: dict[str, float], path: Path) -> None:
    """Draw milliseconds per token as bars."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text: small, legible at any size, and searched by a test.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jkv", "font.size": 11}):
        figure = Figure(figsize=(7.2, 2.2), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        names = list(seconds)[::-1]
        each = [1e3 * seconds[name] / TOKENS for name in names]
        colours = ["#2a6f97" if name.startswith("jkv, dense") else "#b9c3cc" for name in names]
        bars = axes.barh(names, each, color=colours, height=0.62)
        axes.bar_label(bars, [f"{time:.0f} ms" for time in each], padding=4)
        axes.set_xlim(0, 1.12 * max(each))
        axes.set_title("Time per token: GPT-2 124M, float32, 1000 tokens, 2 CPU cores", fontsize=11)
        axes.tick_params(length=0)
        axes.xaxis.set_visible(False)
        for side in axes.spines.values():
            side.set_visible(False)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    found = figures((RESULTS / "README.md").read_text("utf-8"))
    draw(found, Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
