"""What `decode` measured as tables and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.report import show_machine


def show(results: dict[str, Any], console: Console) -> None:
    """Every section that was measured."""
    show_machine(results, console)
    for name, table in TABLES.items():
        if name in results["sections"]:
            made, note = table(results["sections"][name])
            console.print()
            console.print(made)
            if note:
                console.print(note)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _one_row(section: dict[str, Any]) -> tuple[Table, str]:
    table = _table(
        f"{section['new']} tokens after {section['prompt']}, one row, float32",
        "",
        "seconds",
        "ms per token",
        "jkv is faster by",
        "same tokens",
    )
    for name, found in section["contestants"].items():
        faster = section["speedup"].get(name)
        table.add_row(
            name,
            f"{found['seconds']:.2f}",
            f"{1e3 * found['seconds per step']:.1f}",
            f"{faster:.2f}" if faster else "",
            found["same tokens"],
        )
    for name, found in section["without a cache"].items():
        total = found["total, integrated from these lengths"]
        table.add_row(
            name,
            f"{total:.0f} *",
            f"{1e3 * total / section['new']:.0f} *",
            f"{total / section['contestants']['jkv, dense cache']['seconds']:.1f} *",
            "",
        )
    article = ", ".join(f"{name} {value} s" for name, value in section["article, T4"].items())
    return table, (
        "* not run in full: integrated from the time per step at several lengths.\n"
        f"For comparison, an article's 1000 tokens on a T4: {article}."
    )


def _eight_rows(section: dict[str, Any]) -> tuple[Table, str]:
    table = _table(
        f"{section['rows']} rows of {section['prompt']} tokens, {section['new']} new ones",
        "",
        "ms per step",
        "jkv is faster by",
        "prefill, seconds",
    )
    for name, found in section["contestants"].items():
        faster = section["speedup"].get(name)
        table.add_row(
            name,
            f"{1e3 * found['seconds per step']:.1f}",
            f"{faster:.2f}" if faster else "",
            f"{found['seconds to the first token']:.2f}",
        )
    return table, ""


def _buffers(section: dict[str, Any]) -> tuple[Table, str]:
    table = _table("Decoding at position 512 in two buffers", "slots", "ms per step")
    for slots, step in section["median"].items():
        table.add_row(slots, f"{1e3 * step:.1f}")
    return table, f"8192 slots cost {section['ratio']:.2f} times what 1024 cost."


def _bandwidth(section: dict[str, Any]) -> tuple[Table, str]:
    rate = section["read bandwidth"]
    table = _table(
        "Reading weights and cache, one row", "at position", "ms per step", "GB/s", "share"
    )
    for position, found in section["at position"].items():
        table.add_row(
            position,
            f"{1e3 * found['seconds per step']:.1f}",
            f"{found['bytes per second'] / 1e9:.1f}",
            f"{found['share']:.0%}",
        )
    return table, f"The share is of the {rate / 1e9:.1f} GB/s at which this machine reads memory."


def _first_token(section: dict[str, Any]) -> tuple[Table, str]:
    table = _table(
        "From the call to the first token in a fresh process",
        "",
        "import and load, s",
        "first token, s",
        "64 tokens, s",
    )
    for name, found in section["medians"].items():
        table.add_row(name, *(f"{found[k]:.2f}" for k in ("load", "first token", "64 tokens")))
    return table, "The second process finds the programs of the first in JAX's compilation cache."


def _llama(section: dict[str, Any]) -> tuple[Table, str]:
    table = _table(
        "Decode steps of Llama's shapes, random weights in bfloat16",
        "",
        "rows",
        "slots",
        "cache",
        "ms per step",
        "tokens/s",
        "of the floor",
        "attention",
    )
    for found in section["points"]:
        names = [str(found[k]) for k in ("shape", "rows", "slots", "cache")]
        if "why not" in found:
            table.add_row(*names, "", "", "", found["why not"][:60])
            continue
        table.add_row(
            *names,
            f"{1e3 * found['seconds per step']:.2f}",
            f"{found['tokens per second']:.0f}",
            f"{found['share']:.0%}",
            found.get("attention", ""),
        )
    note = (
        "The floor: weights and cache, each read once at the "
        f"{section['copy bandwidth'] / 1e9:.0f} GB/s at which this device copies."
    )
    if section["left out"]:
        note += f"\n{len(section['left out'])} more were left out for want of time."
    return table, note


TABLES = {
    "one-row": _one_row,
    "eight-rows": _eight_rows,
    "buffers": _buffers,
    "bandwidth": _bandwidth,
    "first-token": _first_token,
    "llama": _llama,
}


def plot(results: dict[str, Any], path: Path) -> None:
    """Time per token over the position, with and without a cache; needs matplotlib."""
    from matplotlib.figure import Figure

    section = results["sections"]["one-row"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, found in section["without a cache"].items():
        steps = [1e3 * step for step in found["seconds per step"]]
        axes.plot(found["lengths"], steps, marker="o", linestyle="--", label=name)
    for name, found in section["contestants"].items():
        axes.plot(
            [position for position, _ in found["curve"]],
            [1e3 * seconds for _, seconds in found["curve"]],
            label=name,
        )
    axes.set(
        xlabel="position",
        ylabel="ms per token",
        yscale="log",
        title="a tiny model" if results["settings"]["tiny"] else "GPT-2 124M, float32, one row",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
