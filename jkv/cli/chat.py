"""`jkv chat`: turns from the terminal or a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from jkv.cli import options, process
from jkv.cli.errors import complain, is_ours


def chat(
    model: options.Model = "shakespeare",
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Per reply; by default 256, or half the context.")
    ] = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.Penalty = None,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    cache: options.CacheSpec = "dense",
    dtype: options.Dtype = None,
    on_full: Annotated[
        str, typer.Option(help="When the context is full: drop the oldest turns, or raise.")
    ] = "drop",
) -> None:
    """Talk to a model, one line per turn. /reset begins anew, /quit ends."""
    import jkv
    from jkv.cache.spec import parse

    kind = parse(cache)
    drawing = options.drawing(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    lm = process.load(model, dtype)
    if max_new_tokens is None:
        max_new_tokens = min(256, max(1, lm.config.context // 2))
    talk = jkv.Chat(
        lm,
        system=system,
        max_new_tokens=max_new_tokens,
        cache=kind,
        stop=options.stops(stop, lm.config),
        on_full=on_full,
        **drawing,
    )
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    for line in _lines(terminal):
        if line == "/quit":
            return
        if line == "/reset":
            talk.reset()
            continue
        try:
            for piece in talk.stream(line):
                print(piece, end="", flush=True)
            print(flush=True)
        except ValueError as error:
            # Somebody who sits there can say it in other words; the conversation is as it was.
            if not terminal or not is_ours(error):
                raise
            complain(str(error))


def _lines(terminal: bool) -> Iterator[str]:
    """What is said, without empty lines, until the input ends."""
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() edits lines with it
    while True:
        try:
            line = input("> ") if terminal else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        if line.strip():
            yield line.strip()
