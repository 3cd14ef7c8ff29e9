"""`jkv engine`: requests from a file, many at once."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from jkv.cli import options, process

FIELDS = {
    "prompt",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "priority",
    "tenant",
}
WIDTH = 30  # of the bar of pages, in letters


def engine(
    requests: Annotated[Path, typer.Option(help="A file of JSON objects, one request per line.")],
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
    prometheus: Annotated[
        Path | None,
        typer.Option(help="A file to keep the figures in, second by second, for Prometheus."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The figures as an object, after the answers.")
    ] = False,
) -> None:
    """Answer the requests of a file over one pool of pages, and show how it goes.

    A request is an object with prompt (a text, or token ids) and, where wanted, max_new_tokens,
    temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, priority and tenant; null is
    as good as nothing. Answers come as they end, an object per line: the line's number, text,
    tokens and why it ended. With --json the last line is {"stats": {...}}, the engine's figures.
    """
    from jkv.cache.spec import parse
    from jkv.engine import Engine
    from jkv.engine.stats import prometheus as exposition

    asked = {
        line: _told(requests, line, _keywords, fields, max_new_tokens)
        for line, fields in read_requests(requests)
    }
    kind = parse(cache)
    if prometheus is not None:
        replace_file(prometheus, "")  # where it cannot be written, that is better known now
    lm = process.load(model, dtype)
    made = Engine(lm, pages=pages, max_batch=max_batch, cache=kind)
    waiting = {}
    for line, keywords in asked.items():
        keywords["stop"] = options.stops(keywords.get("stop"), lm.config)
        waiting[line] = _told(requests, line, made.submit, **keywords)

    def keep() -> None:
        if prometheus is not None:
            replace_file(prometheus, exposition(made.stats()))

    keep_sometimes = _every(1.0, keep)
    try:
        with _live(made.stats) as show:
            show()
            # Mistakes have been told by now; the clock starts when the programs are there.
            made.warm([keywords["sampler"] for keywords in asked.values() if keywords["sampler"]])
            for request in waiting.values():
                request.submitted = time.perf_counter()
            more = True
            while more:
                more = made.step()
                for line, request in [x for x in waiting.items() if x[1].state == "finished"]:
                    del waiting[line]
                    print(json.dumps(_answer(line, request, lm)), flush=True)
                show()
                keep_sometimes()
    finally:
        keep()
    figures = made.stats()
    if as_json:
        print(json.dumps({"stats": figures}))
    else:
        print(_summary(figures), file=sys.stderr)


def read_requests(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The file's requests, each with the number of its line; fields that are null left out.

    Raises:
        ValueError: it cannot be read, or a line is no object with a prompt and known fields.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # texts may hold other ends of lines
    except OSError as error:
        raise ValueError(f"--requests {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    asked = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is no JSON: {error.msg} at character {error.pos + 1}"
            ) from error
        where = f"{path}, line {number}"
        if not isinstance(fields, dict):
            raise ValueError(f"{where} is {line:.80}; expected an object with prompt")
        if unknown := sorted(set(fields) - FIELDS):
            raise ValueError(
                f"{where} has {', '.join(unknown)}; expected prompt and any of "
                f"{', '.join(sorted(FIELDS - {'prompt'}))}"
            )
        fields = {name: value for name, value in fields.items() if value is not None}
        if "prompt" not in fields:
            raise ValueError(f"{where} has no prompt; expected a text, or token ids")
        asked.append((number, fields))
    if not asked:
        raise ValueError(f"{path} holds no requests; expected one JSON object per line")
    return asked


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


def _told(path: Path, line: int, what: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """What it returns; what it complains about comes with the line."""
    try:
        return what(*args, **keywords)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {line}: {error}") from error


def _every(seconds: float, do: Callable[[], None]) -> Callable[[], None]:
    """Does it when it was last done so long ago, or never."""
    due = -math.inf

    def perhaps() -> None:
        nonlocal due
        if time.perf_counter() >= due:
            do()
            due = time.perf_counter() + seconds

    return perhaps


def _keywords(fields: dict[str, Any], most: int) -> dict[str, Any]:
    """What `Engine.submit` gets, but for the model's own stops."""
    draw = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    usual: dict[str, Any] = {"temperature": 0.0, "seed": 0}
    chosen: list[Any] = [fields.get(name, usual.get(name)) for name in draw]
    seed = chosen[-1]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed got {seed!r}; expected an integer from 0 to {2**32 - 1}")
    keywords = {"max_new_tokens": most, **options.drawing(*chosen)}
    keywords |= {k: v for k, v in fields.items() if k not in draw}
    if "stop" in keywords and not isinstance(keywords["stop"], list):
        keywords["stop"] = [keywords["stop"]]
    return keywords


def _answer(line: int, request: Any, lm: Any) -> dict[str, Any]:
    failed = request.error is not None
    answer = {
        "line": line,
        "text": None if failed or lm.tokenizer is None else request.text,
        "tokens": request.tokens,
        "finish_reason": request.finish_reason,
        "cached_tokens": request.cached_tokens,
    }
    return answer | ({"error": repr(request.error)} if failed else {})


@contextlib.contextmanager
def _live(stats: Callable[[], dict[str, Any]]) -> Iterator[Callable[[], None]]:
    """A table of figures on a terminal, four times a second; elsewhere nothing."""
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
    """The figures of `Engine.stats` as a `rich` table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    pages, preempted = figures["pages"], figures["preemptions"]
    used, kept = (round(WIDTH * pages[name] / pages["pages"]) for name in ("used", "cached"))
    kept = min(kept, WIDTH - used)
    rows = {
        "requests": f"{figures['running']} running, {figures['waiting']} waiting, "
        f"{figures['finished']} finished",
        "pages": f"{'█' * used}{'▒' * kept}{'░' * (WIDTH - used - kept)} {pages['used']} of "
        f"{pages['pages']} in use, {pages['shared']} of them shared, {pages['cached']} kept",
        "prompts": f"{figures['hit_rate']:.0%} of their tokens found in the cache",
        "preempted": f"{preempted['recompute']} recomputed, {preempted['swap']} swapped",
        "first token": _milliseconds(figures["time_to_first_token"]),
        "between": _milliseconds(figures["time_between_tokens"]),
        "speed": f"{figures['tokens_per_second']:.0f} tokens/s, {figures['tokens']} tokens",
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
        f"{figures['finished']} requests{f', {failed} of them failed' if failed else ''}, "
        f"{figures['tokens']} tokens, {figures['tokens_per_second']:.0f} tokens/s; "
        f"{figures['hit_rate']:.0%} of prompt tokens found; first token after "
        f"{_milliseconds(figures['time_to_first_token'])}"
    )
