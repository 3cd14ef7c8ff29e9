"""Numbers for people: aligned columns, and operations with a prefix."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of aligned cells, the first `left` columns to the left and the others to the right.

    A row shorter than the first ends with a text of any length.
    """
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in whole) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width)
            if i < left or i == len(row) - 1 < len(widths) - 1
            else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def operations(count: int | float) -> str:
    """Write a number of floating-point operations for people."""
    units = ["", " k", " M", " G", " T", " P", " E"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g}{units[0]}"
