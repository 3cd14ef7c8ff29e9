"""`jkv engine`: requests from a file, many at once."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import jkv
from jkv._text import plural
from jkv.cli import options, process

if TYPE_CHECKING:
    from jkv.engine import Request

WIDTH = 30  # of the bar of pages, in letters


def engine(
    requests: Annotated[
        Path, typer.Option(help="A file of JSON objects, one request per line; - reads them here.")
    ],
    model: options.Model = "shakespeare",
    pages: Annotated[int, typer.Option(help="Pages of the pool.")] = 512,
    max_batch: Annotated[int, typer.Option(help="Requests that run at once.")] = 8,
    cache: Annotated[
        str,
        typer.Option(
            "--cache",
            metavar="SPEC",
            help="Such as paged, or paged:32,int8: tokens of a page, form.",
        ),
    ] = "paged",
    max_new_tokens: Annotated[int, typer.Option(help="Of requests that do not say.")] = 64,
    dtype: options.Dtype = None,
    ignore: options.Ignore = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Report bad lines and answer the others.")
    ] = False,
    prometheus: Annotated[
        Path | None,
        typer.Option(help="A file to keep the figures in, second by second, for Prometheus."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The figures as an object, after the answers.")
    ] = False,
) -> int:
    """Answer the requests of a file over one pool of pages.

    A request is an object with prompt (a text, or token ids) and, where wanted, id, max_new_tokens,
    min_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
    frequency_penalty, no_repeat_ngram, logit_bias, seed, stop, priority and tenant; null is as good
    as nothing. Answers come as they end, an object per line: the line's number, the
    request's own id if it has one, text, tokens and why it ended. With --json the last line is
    {"stats": {...}}, the engine's figures.

    All bad lines are reported at once, and nothing is answered; with --skip-bad the others are. On
    a terminal a table shows how it goes.
    """
    from jkv.cache.spec import parse
    from jkv.cli.requests import Requests
    from jkv.engine import Engine
    from jkv.engine.stats import prometheus as exposition

    lines = Requests(requests, max_new_tokens)
    lines.report()
    parse(cache)  # a text that names no kind is better known now
    if prometheus is not None:
        replace_file(prometheus, "")  # where it cannot be written, that is better known now
    if not lines.asked:
        return 2
    try:
        lm = process.load(model, dtype, ignore)
    except ValueError:
        if lines.bad and not skip_bad:
            return 2  # the lines come first; only with the model can the rest of them be checked
        raise
    made = Engine(lm, pages=pages, max_batch=max_batch, cache=cache)
    waiting: dict[int, Request] = {}
    for line, asked in list(lines.asked.items()):
        request = lines.attempt(line, functools.partial(made.submit, **asked.keywords))
        if request is not None:
            waiting[line] = request
    lines.report()
    if not waiting or (lines.bad and not skip_bad):
        return 2

    def keep() -> None:
        if prometheus is not None:
            replace_file(prometheus, exposition(made.stats()))

    keep_sometimes = _every(1.0, keep)
    samplers = [asked.keywords["sampler"] for asked in lines.asked.values()]
    try:
        # Bad lines have been reported by now; the clock starts when the programs are there.
        with process.spinner("compiling"):
            made.warm([sampler for sampler in samplers if sampler])
        for request in waiting.values():
            request.submitted = time.perf_counter()
        with _live(made.stats) as show:
            show()
            more = True
            while more:
                more = made.step()
                for line, request in [x for x in waiting.items() if x[1].state == "finished"]:
                    del waiting[line]
                    print(json.dumps(_answer(line, lines.asked[line].id, request, lm)), flush=True)
                show()
                keep_sometimes()
    finally:
        keep()
    figures = made.stats()
    if as_json:
        print(json.dumps({"stats": figures}))
    else:
        print(_summary(figures), file=sys.stderr)
    return 0


def replace_file(path: Path, text: str) -> None:
    """Write a file whose readers see the old text or the new one, and never a part.

    Raises:
        ValueError: it cannot be written, or is no file.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"--prometheus {path} is no file; expected the name of one, or a new one")
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            part.write_text(text)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"--prometheus {path}: {error.strerror}") from error


def _every(seconds: float, do: Callable[[], None]) -> Callable[[], None]:
    """Does it when it was last done so long ago, or never."""
    due = -math.inf

    def perhaps() -> None:
        nonlocal due
        if time.perf_counter() >= due:
            do()
            due = time.perf_counter() + seconds

    return perhaps


def _answer(
    line: int, own: str | int | None, request: jkv.engine.Request, lm: jkv.LM
) -> dict[str, Any]:
    failed = request.error is not None
    answer = {
        "line": line,
        **({} if own is None else {"id": own}),
        "text": None if failed or lm.tokenizer is None else request.text,
        "tokens": request.tokens,
        "finish_reason": request.finish_reason,
        "cached_tokens": request.cached_tokens,
    }
    return answer | ({"error": repr(request.error)} if failed else {})


@contextlib.contextmanager
def _live(stats: Callable[[], dict[str, Any]]) -> Iterator[Callable[[], None]]:
    """Show a table of figures on a terminal, four times a second; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.live import Live

    # Answers that go to the same terminal are written above the table; into a file they go as ever.
    redirect = sys.stdout.isatty()
    console = Console(stderr=True)
    with Live(
        console=console, auto_refresh=False, transient=True, redirect_stdout=redirect
    ) as live:
        yield _every(0.25, lambda: live.update(view(stats()), refresh=True))


def view(figures: dict[str, Any]) -> Any:
    """Make a `rich` table of the figures of `Engine.stats`."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    pages, preempted = figures["pages"], figures["preemptions"]
    used, kept = (round(WIDTH * pages[name] / pages["pages"]) for name in ("used", "cached"))
    rows = {
        "requests": f"{figures['running']} running, {figures['waiting']} waiting, "
        f"{figures['finished']} finished",
        "pages": f"{'█' * used}{'▒' * kept}{'░' * (WIDTH - used - kept)} {pages['used']} of "
        f"{pages['pages']} in use, {pages['shared']} of them shared, {pages['cached']} kept",
        "prompts": f"{figures['hit_rate']:.0%} of their tokens found in the cache",
        "preempted": f"{preempted['recompute']} recomputed, {preempted['swap']} swapped",
        "first token": _milliseconds(figures["time_to_first_token"]),
        "between": _milliseconds(figures["time_between_tokens"]),
        "speed": f"{figures['tokens_per_second']:.0f} tokens/s, "
        f"{plural(figures['tokens'], 'token')}",
    }
    for name, text in rows.items():
        table.add_row(Text(name, "dim"), Text(text))
    return table


def _milliseconds(quantiles: dict[str, float | None]) -> str:
    if quantiles["p50"] is None:
        return "-"
    return ", ".join(f"{name} {1000 * (value or 0):.1f} ms" for name, value in quantiles.items())


def _summary(figures: dict[str, Any]) -> str:
    failed = figures["reasons"]["error"]
    return (
        f"{plural(figures['finished'], 'request')}"
        f"{f', {failed} of them failed' if failed else ''}, "
        f"{plural(figures['tokens'], 'token')}, {figures['tokens_per_second']:.0f} tokens/s; "
        f"{figures['hit_rate']:.0%} of prompt tokens found; first token after "
        f"{_milliseconds(figures['time_to_first_token'])}"
    )
