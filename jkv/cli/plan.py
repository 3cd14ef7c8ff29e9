"""`jkv plan`: what a model and its cache will take, before anything is allocated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

import jkv
from jkv._text import plural
from jkv.cli import options, process
from jkv.cli.tables import columns, operations

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
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in each row; by default the model's context.")
    ] = None,
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
        "seq_len": seq_len,
        "dtype": dtype,
        "device_memory": device_memory,
        "ignore": ignore or (),
    }
    if cache is not None and len(cache) == 1:
        made = planning.plan(model, cache=cache[0], **asked)
        print(json.dumps(made.to_dict()) if as_json else report(made))
        return
    made = planning.plan(model, cache=cache, **asked) if cache else planning.survey(model, **asked)
    if as_json:
        print(json.dumps({"plans": [entry.to_dict() for entry in made]}))
    else:
        print(table(made))


def report(plan: jkv.planning.Plan) -> str:
    """Write all that there is to say about one plan."""
    lines = [heading(plan), f"cache {plan.cache}, {_rows(plan)}", ""]
    memory = [
        ("weights", plan.weight_bytes, ""),
        ("cache", plan.cache_bytes, _growth(plan)),
        ("activations", plan.activation_bytes, "about"),
        ("total", plan.total_bytes, ""),
    ]
    lines += columns(
        [("bytes", "", "", ""), *((n, f"{b:,}", process.size(b), more) for n, b, more in memory)]
    )
    if plan.device_memory is not None:
        lines += ["", _fit(plan, plan.device_memory)]
    step, without = plan.step, plan.step_without
    rows = [("one more token per row", "with the cache", "without", "")]
    for part in (*step.PARTS, "flops"):
        a, b = getattr(step, part), getattr(without, part)
        rows.append((_NAMES[part], operations(a), operations(b), f"{b / a:,.4g} x" if a else ""))
    for part in ("between_blocks", "read", "written"):
        a, b = getattr(step, part), getattr(without, part)
        rows.append(
            (_NAMES[part], process.size(a), process.size(b), f"{b / a:,.4g} x" if a else "")
        )
    lines += ["", *columns(rows)]
    lines += ["", f"the whole prompt into an empty cache: {operations(plan.prompt.flops)}FLOP"]
    return "\n".join(lines)


_NAMES = {
    "projections": "projections, FLOP",
    "scores": "scores, FLOP",
    "values": "values, FLOP",
    "mlp": "feed-forward, FLOP",
    "logits": "logits, FLOP",
    "flops": "all, FLOP",
    "between_blocks": "between blocks [B, T, D]",
    "read": "weights and cache read",
    "written": "cache written",
}


def heading(plan: jkv.planning.Plan) -> str:
    """Describe the model in a line."""
    return (
        f"{plan.model}: {plan.parameters:,} parameters in {plan.dtype}, "
        f"made for {plural(plan.context, 'token', commas=True)}"
    )


def table(plans: Sequence[jkv.planning.Plan | jkv.planning.Refusal]) -> str:
    """Write kinds beside each other, and why this model cannot have some."""
    first = next(entry for entry in plans if isinstance(entry, jkv.planning.Plan))
    memory = first.device_memory
    head = [
        "cache",
        "bytes/token",
        "cache",
        "total",
        *(["max tokens", "max rows"] if memory is not None else []),
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
            process.size(entry.cache_bytes),
            process.size(entry.total_bytes),
        ]
        if memory is not None:
            row += [_count(entry.max_seq_len), _count(entry.max_batch)]
        rows.append([*row, operations(entry.step.flops)])
    more = "" if memory is None else f", of {memory / 1e9:.4g} GB"
    about = f"{_rows(first)}; weights {process.size(first.weight_bytes)}{more}"
    return "\n".join([heading(first), about, "", *columns(rows), *_roomier(plans)])


def _roomier(plans: Sequence[jkv.planning.Plan | jkv.planning.Refusal]) -> list[str]:
    """List kinds with room for more than the rows have, which are larger than they need be."""
    more = [
        f"  {entry.cache}: for {entry.kept_tokens:,}"
        for entry in plans
        if isinstance(entry, jkv.planning.Plan) and (entry.kept_tokens or 0) > entry.seq_len
    ]
    return ["", "room for more tokens than the rows have:", *more] if more else []


def _rows(plan: jkv.planning.Plan) -> str:
    rows = plural(plan.batch, "row", commas=True)
    return f"{rows} of {plural(plan.seq_len, 'token', commas=True)}"


def _growth(plan: jkv.planning.Plan) -> str:
    """Write what a cache takes with each token, or the room that it has from the start."""
    if plan.kept_tokens is None or plan.bytes_per_token:
        return f"{plan.bytes_per_token:,} per token"
    return f"0 per token, room for {plan.kept_tokens:,} from the start"


def _count(number: int | None) -> str:
    return "any" if number is None else f"{number:,}"


def _fit(plan: jkv.planning.Plan, memory: int) -> str:
    longest = "rows of any length"
    if plan.max_seq_len is not None:
        longest = plural(plan.max_seq_len, "token", commas=True)
    return (
        f"{memory / 1e9:.4g} GB of memory: {'fits' if plan.fits else 'does not fit'}; "
        f"at most {longest} in each of {plan.batch:,}, or "
        f"{plural(plan.max_batch or 0, 'row', commas=True)} of {plan.seq_len:,}"
    )
