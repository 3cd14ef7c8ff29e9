"""`jkv engine`: requests from a file, many at once."""

from __future__ import annotations

import contextlib
import json
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


def engine(
    requests: Annotated[Path, typer.Option(help="A file of JSON objects, one request per line.")],
    model: options.Model = "shakespeare",
    pages: Annotated[int, typer.Option(help="Pages of the pool.")] = 512,
    max_batch: Annotated[int, typer.Option(help="Requests that run at once.")] = 8,
    cache: Annotated[
        str, typer.Option("--cache", metavar="SPEC", help="Such as paged, or paged:16,int8.")
    ] = "paged",
    max_new_tokens: Annotated[int, typer.Option(help="Of requests that do not say.")] = 64,
    dtype: options.Dtype = None,
    prometheus: Annotated[
        Path | None, typer.Option(help="A file to keep the figures in, in Prometheus' format.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Answer the requests of a file over one pool of pages, and show how it goes.

    A request is an object with prompt (a text, or token ids) and, where wanted, max_new_tokens,
    temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, priority and tenant. Answers
    come as they end, an object per line: the line's number, text, tokens and why it ended. With
    --json the last line is an object with the engine's figures.
    """
    from jkv.cache.spec import parse
    from jkv.engine import Engine
    from jkv.engine.stats import prometheus as exposition

    asked = read_requests(requests)
    kind = parse(cache)
    lm = process.load(model, dtype)
    made = Engine(lm, pages=pages, max_batch=max_batch, cache=kind)
    waiting = {}
    for line, fields in asked:
        try:
            waiting[line] = made.submit(**_keywords(fields, lm.config, max_new_tokens))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{requests}, line {line}: {error}") from error
    with _live(made.stats) as show:
        more = True
        while more:
            more = made.step()
            for line, request in [x for x in waiting.items() if x[1].state == "finished"]:
                del waiting[line]
                print(json.dumps(_answer(line, request, lm)), flush=True)
            show()
    figures = made.stats()
    if prometheus is not None:
        prometheus.write_text(exposition(figures))
    if as_json:
        print(json.dumps(figures))
    else:
        print(_summary(figures), file=sys.stderr)


def read_requests(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The file's requests, each with the number of its line.

    Raises:
        ValueError: it cannot be read, or a line is no object with a prompt and known fields.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    asked = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(fields, dict) or "prompt" not in fields or set(fields) - FIELDS:
            raise ValueError(
                f"{path}, line {number} is {line:.80}; expected an object with prompt and any of "
                f"{', '.join(sorted(FIELDS - {'prompt'}))}"
            )
        asked.append((number, fields))
    if not asked:
        raise ValueError(f"{path} holds no requests; expected one JSON object per line")
    return asked


def _keywords(fields: dict[str, Any], config: Any, most: int) -> dict[str, Any]:
    """What `Engine.submit` gets."""
    draw = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    usual: dict[str, Any] = {"temperature": 0.0, "seed": 0}
    chosen: list[Any] = [fields.get(name, usual.get(name)) for name in draw]
    keywords = {"max_new_tokens": most, **options.drawing(*chosen)}
    keywords |= {k: v for k, v in fields.items() if k not in draw}
    if isinstance(keywords.get("stop"), str | list):
        stop = keywords["stop"]
        keywords["stop"] = [*config.end_ids, *([stop] if isinstance(stop, str) else stop)]
    return keywords


def _answer(line: int, request: Any, lm: Any) -> dict[str, Any]:
    text = None if lm.tokenizer is None else request.text
    return {
        "line": line,
        "text": text,
        "tokens": request.tokens,
        "finish_reason": request.finish_reason,
        "cached_tokens": request.cached_tokens,
    }


@contextlib.contextmanager
def _live(stats: Callable[[], dict[str, Any]]) -> Iterator[Callable[[], None]]:
    """A table of figures on a terminal, four times a second; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.live import Live

    shown = 0.0
    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:

        def show() -> None:
            nonlocal shown
            if time.perf_counter() - shown > 0.25:
                shown = time.perf_counter()
                live.update(view(stats()), refresh=True)

        yield show


def view(figures: dict[str, Any]) -> Any:
    """The figures of `Engine.stats` as a `rich` table."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    pages = figures["pages"]
    bar = round(30 * pages["used"] / pages["pages"])
    preempted = sum(figures["preemptions"].values())
    rows = {
        "requests": f"{figures['running']} running, {figures['waiting']} waiting, "
        f"{figures['finished']} finished",
        "pages": f"[{'#' * bar}{'.' * (30 - bar)}] {pages['used']} of {pages['pages']}, "
        f"{pages['shared']} shared, {pages['cached']} kept",
        "prompts": f"{figures['hit_rate']:.0%} of their tokens found in the cache",
        "preempted": f"{preempted}",
        "first token": _milliseconds(figures["time_to_first_token"]),
        "between": _milliseconds(figures["time_between_tokens"]),
        "speed": f"{figures['tokens_per_second']:.0f} tokens/s",
    }
    for name, text in rows.items():
        table.add_row(name, text.replace("[", r"\[", 1))
    return table


def _milliseconds(quantiles: dict[str, float | None]) -> str:
    if quantiles["p50"] is None:
        return "-"
    return ", ".join(f"{name} {1000 * (value or 0):.1f} ms" for name, value in quantiles.items())


def _summary(figures: dict[str, Any]) -> str:
    return (
        f"{figures['finished']} requests, {figures['tokens']} tokens, "
        f"{figures['tokens_per_second']:.0f} tokens/s (compilation included); "
        f"{figures['hit_rate']:.0%} of prompt tokens found; first token after "
        f"{_milliseconds(figures['time_to_first_token'])}"
    )
