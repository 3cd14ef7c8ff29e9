"""How fast attention over a cache is, as a share of the bandwidth at which memory can be copied.

    python -m bench attention --json results.json --plot results.png
    python -m bench attention --quick --only llama-3-8b

One decode step's attention of one layer: a token per row over caches that are full. First a copy
of a large array is timed, its bytes counted as read and written; what attention is compared with
is reading the cache at that speed. Every form of cache, in rows and in pages; beside it, for
bfloat16, what else there is: XLA, cuDNN, JAX's own decode kernel while it can be imported, and
torch's own choice and FlashAttention, if torch is there. This library's result is compared with
the reference first: where it is wrong that is told, not timed. Before all that some prefills, whose
time is that of the products: what a dense cache chooses, beside XLA alone.

Times are of many steps in one program, each over another part of a pool of caches that is larger
than the chip's cache memory; the least of several rounds. --tiny tries the script on a CPU.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import prefill, report
from bench.contenders import FORMS, MODELS, TINY, Grid, contenders, copy_bandwidth, measure, summary

WHAT = ("model", "rows", "slots", "form", "page", "contender")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = report.parser("attention", __doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw shares of the bandwidth")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--only", nargs="+", choices=MODELS, metavar="MODEL", help="just these")
    parser.add_argument("--tiny", action="store_true", help="sizes of no use, to try the script")
    parser.add_argument("--seconds", type=float, default=240, help="begin nothing after these")
    return parser.parse_args(arguments)


def grid(options: argparse.Namespace) -> Grid:
    """What is measured."""
    if options.tiny:
        return TINY
    models = tuple(options.only or MODELS)
    if options.quick:
        return Grid(models=models[:1], rows=(1, 8), slots=(8192, 32768), rounds=3)
    return Grid(models=models)


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All points, the most telling first, until the time is up."""
    wanted = grid(options)
    until = time.monotonic() + options.seconds
    rate = copy_bandwidth(wanted)
    console.print(f"copy: {rate / 1e9:.0f} GB/s")
    made = report.Report("attention", options)
    made.add("copy bandwidth", rate)
    points = prefill.TINY if options.tiny else prefill.POINTS
    made.add("prefill", prefill.measure(points, until, console.print))
    measured: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    made.add("points", measured)
    made.add("left out", left_out)
    for point in wanted.points():
        for name, contender in contenders(point).items():
            entry = {**point.described(), "contender": name}
            if time.monotonic() > until:
                left_out.append(entry)
                continue
            entry |= measure(point, contender, rate, wanted)
            measured.append(entry)
            console.print(line(entry))
            made.add("points", measured)
    made.add("left out", left_out)
    return made.results


def line(entry: dict[str, Any]) -> str:
    """One result in a line."""
    what = " ".join(str(entry[k]) for k in WHAT)
    if "why not" in entry:
        return f"{what}: {entry['why not']}"
    return f"{what}: {entry['microseconds']:.1f} us, {entry['share']:.0%}"


def show(results: dict[str, Any], console: Console) -> None:
    """A table, and what was left out."""
    report.show_machine(results, console)
    sections = results["sections"]
    console.print(f"copy {sections['copy bandwidth'] / 1e9:.0f} GB/s")
    table = Table(title="Attention of one layer, one token per row")
    for column in WHAT:
        table.add_column(column)
    for column in ("us", "GB/s", "of the copy", "attention"):
        table.add_column(column, justify="right")
    for entry in sections["points"]:
        names = [str(entry[k] or "") for k in WHAT]
        if "why not" in entry:
            table.add_row(*names, "", "", "", entry["why not"][:60])
            continue
        table.add_row(
            *names,
            f"{entry['microseconds']:.1f}",
            f"{entry['bytes per second'] / 1e9:.0f}",
            f"{entry['share']:.0%}",
            entry.get("attention", ""),
        )
    console.print(table)
    for text in summary(sections["points"]) + prefill.summary(sections["prefill"]):
        console.print(text)
    if sections["left out"]:
        console.print(f"{len(sections['left out'])} more were left out for want of time.")


def plot(results: dict[str, Any], path: Path) -> None:
    """Shares over tokens, one line for each form; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    mine = [e for e in results["sections"]["points"] if e["contender"] == "jkv" and "share" in e]
    for form in FORMS:
        for page in sorted({e["page"] or 0 for e in mine}):
            here = [e for e in mine if e["form"] == form and (e["page"] or 0) == page]
            here = sorted((e["rows"] * e["slots"], e["share"]) for e in here)
            if here:
                label = form if not page else f"{form}, pages of {page}"
                axes.plot(*zip(*here, strict=True), "o", alpha=0.7, label=label)
    axes.set(xlabel="tokens of all rows", ylabel="share of the copy bandwidth", xscale="log")
    axes.axhline(0.85, color="grey", linestyle="--")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main(arguments: list[str]) -> int:
    """Measure, write, show."""
    options = parse(arguments)
    results = run(options, Console(stderr=True, highlight=False))
    if options.plot:
        plot(results, options.plot)
    show(results, Console(highlight=False, width=140))
    sections = results["sections"]
    wrong = [e for e in sections["points"] + sections["prefill"] if e.get("wrong")]
    return 1 if wrong else 0
