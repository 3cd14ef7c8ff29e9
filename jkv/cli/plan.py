"""`jkv plan`: what a model and its cache will take, before anything is allocated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

import jkv
from jkv._bytes import is_decimal, size
from jkv._tables import columns, operations
from jkv.cli import options

Planned = Annotated[
    str,
    typer.Option(
        "--model",
        help="A preset such as llama-2-7b, the built-in model's name, a directory, or a hub id. "
        "No weights are read.",
    ),
]

PlannedDtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16; by default the checkpoint's own."),
]


def plan(
    model: Planned = "shakespeare",
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    seq_len: options.SeqLen = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help=f"{options.SPEC_HELP} Repeatable; by default all kinds."),
    ] = None,
    dtype: PlannedDtype = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Such as 80GB or 24GiB: what would fit?")
    ] = None,
    ignore: options.Ignore = None,
    as_json: options.AsJson = False,
) -> None:
    """Tell what a model and its cache take, allocating nothing.

    Bytes, what fits into a device, and the operations of a step with and without a cache: all for
    one --cache, a table for several or none.
    """
    from jkv import planning

    asked = {
        "batch": batch,
        "seq_len": options.tokens(seq_len),
        "dtype": dtype,
        "device_memory": device_memory,
        "ignore": ignore or (),
    }
    if cache is not None and len(cache) == 1:
        made = planning.plan(model, cache=cache[0], **asked)
        print(json.dumps(made.to_dict()) if as_json else made)
        return
    made = planning.plan(model, cache=cache, **asked) if cache else planning.survey(model, **asked)
    if as_json:
        print(json.dumps({"plans": [entry.to_dict() for entry in made]}))
    else:
        print(table(made))


def table(plans: Sequence[jkv.planning.Plan | jkv.planning.Refusal]) -> str:
    """Write kinds beside each other, and why this model cannot have some."""
    from jkv.planning.report import describe_rows, heading, past

    first = next(entry for entry in plans if isinstance(entry, jkv.planning.Plan))
    memory = first.device_memory
    decimal = is_decimal(memory or 0)
    head = [
        "cache",
        "bytes/token",
        "cache",
        "total",
        *(["fits", "max tokens", "max rows"] if memory is not None else []),
    ]
    rows: list[list[str]] = [[*head, "step FLOP"]]
    for entry in plans:
        if isinstance(entry, jkv.planning.Refusal):
            rows.append([entry.cache, f"no: {entry.why}"])
            continue
        row = [
            entry.cache,
            f"{entry.bytes_per_token:,.6g}"
            if isinstance(entry.bytes_per_token, float)
            else f"{entry.bytes_per_token:,}",
            size(entry.cache_bytes, decimal=decimal),
            size(entry.total_bytes, decimal=decimal),
        ]
        if memory is not None:
            row += [
                "yes" if entry.fits else "no",
                _count(entry.max_seq_len),
                _count(entry.max_batch),
            ]
        rows.append([*row, operations(entry.step.flops)])
    more = "" if memory is None else f", of {size(memory, decimal=decimal)}"
    weights = size(first.weight_bytes, decimal=decimal)
    about = f"{describe_rows(first)}; weights {weights}{more}"
    return "\n".join([heading(first), about, *past(first), "", *columns(rows), *_roomier(plans)])


def _roomier(plans: Sequence[jkv.planning.Plan | jkv.planning.Refusal]) -> list[str]:
    """List kinds with room for more than the rows have, which are larger than they need be."""
    more = [
        f"  {entry.cache}: for {entry.kept_tokens:,}"
        for entry in plans
        if isinstance(entry, jkv.planning.Plan) and (entry.kept_tokens or 0) > entry.seq_len
    ]
    return ["", "room for more tokens than the rows have:", *more] if more else []


def _count(number: int | None) -> str:
    return "any" if number is None else f"{number:,}"
