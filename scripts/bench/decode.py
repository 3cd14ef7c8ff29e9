"""How fast decoding is: without a cache, with one, and in transformers, on GPT-2 124M's shapes.

    python -m bench decode --json results.json --plot results.png
    python -m bench decode --quick --only one-row buffers

The weights are random, float32, and the same for all. Contestants take turns within one run, and
what is shown are medians. transformers takes part where it is installed with torch (the `compare`
extra). Everything takes about 15 minutes on two cores, --quick about 3.

Sections: one-row, 976 tokens after 24; eight-rows, 512 prompt tokens each; buffers, position 512
in 1024 and 8192 slots; bandwidth, the share of the machine's memory bandwidth that is reached;
first-token, in a fresh process and in one that finds its programs compiled; and where there is a
GPU, llama: steps of 1B, 7B and 8B shapes in bfloat16 over caches in bfloat16, int8 and int4, one
row and eight, against what the bandwidth allows. --gpu --shape tiny tries that one on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from bench import decode_tables, llama, machine, report
from bench.runners import TINY, Shape, write_checkpoint
from bench.sections import SECTIONS, Bench

LLAMA = "llama"
NAMES = (*SECTIONS, LLAMA)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = report.parser("decode", __doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time per token (one-row)")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="SECTION", help="just these")
    parser.add_argument("--tiny", action="store_true", help="a model of no use, to try the script")
    parser.add_argument("--gpu", action="store_true", help="llama too, GPU or not")
    parser.add_argument(
        "--shape", nargs="+", choices=llama.SHAPES, default=["7b", "8b", "1b"], help="of llama"
    )
    parser.add_argument(
        "--seconds", type=float, default=300, help="begin nothing of llama after these"
    )
    options = parser.parse_args(arguments)
    if not options.only:
        options.only = list(NAMES if jax.default_backend() == "gpu" else SECTIONS)
    if options.gpu and LLAMA not in options.only:
        options.only.append(LLAMA)
    if options.plot and "one-row" not in options.only:
        parser.error("--plot draws the section one-row; name it in --only too")
    return options


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All sections that were asked for."""
    shape = TINY if options.tiny else Shape()
    made = report.Report("decode", options)
    if LLAMA in options.only:
        until = time.monotonic() + options.seconds

        def tell(section: dict[str, Any], news: str) -> None:
            made.add(LLAMA, section)
            console.print(news)

        llama.measure(tuple(options.shape), until, tell)
    others = [name for name in options.only if name != LLAMA]
    if not others:
        return made.results
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "gpt2"
        write_checkpoint(directory, shape)
        bench = Bench(directory, shape, quick=options.quick, say=console.print)
        for section in others:
            console.print(f"{section}: load {machine.load()}")
            made.add(section, SECTIONS[section](bench))
    return made.results


def main(arguments: list[str]) -> int:
    """Measure, write, show."""
    options = parse(arguments)
    # The tables are the output; how it goes is said beside them.
    results = measure(options, Console(stderr=True, highlight=False))
    if options.plot:
        decode_tables.plot(results, options.plot)
    decode_tables.show(results, Console(highlight=False, width=110))
    return 0
