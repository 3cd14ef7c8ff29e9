"""`jkv store`: what a store would do with a trace, and what is in a directory of one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jkv._bytes import parse_bytes
from jkv._tables import columns
from jkv._text import brief, plural
from jkv.cli import directory, options, process
from jkv.errors import UnsupportedError
from jkv.store.policy import POLICIES

store = typer.Typer(
    name="store", rich_markup_mode=None, help="Sequences' caches that are kept between requests."
)


@store.callback()
def _store() -> None:
    """Sequences' caches that are kept between requests."""


for _command in (directory.stats, directory.ls, directory.verify, directory.gc):
    store.command()(_command)


@store.command()
def simulate(
    trace: Annotated[
        Path,
        typer.Argument(
            help="A file of JSON objects, one request per line.", exists=True, dir_okay=False
        ),
    ],
    capacity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BYTES",
            help="Bytes, such as 512MiB; repeatable. By default 1/32 of all to all.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"One of {', '.join(POLICIES)}; repeatable, by default all.",
        ),
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="A share of the tokens: what capacity finds so many?")
    ] = None,
    block: Annotated[
        int, typer.Option(help="Tokens that are kept together, where a request gives ids.")
    ] = 16,
    bytes_per_token: Annotated[
        int, typer.Option(help="Of requests that do not say; `jkv info` tells a model's.")
    ] = 1,
    plot: Annotated[
        Path | None, typer.Option(help="A picture of hit rates over capacities (matplotlib).")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Simulate what a store would find of a trace.

    By policy and capacity, beside the optimum, which knows what comes.

    A request is an object: {"key": "chat-7", "tokens": 512} for an entry by its name, which may
    grow, or {"tokens": [5, 6, ...]} for whatever begins alike, within a "tenant" if there is one;
    "bytes" and "cost" (say, seconds to make it) where they are known.
    """
    from jkv.store import simulate as simulation

    names = _policies(policy)
    requests = simulation.read_trace(trace, block=block, bytes_per_token=bytes_per_token)
    most = simulation.whole(requests)
    sizes = sorted({parse_bytes(text, "capacity") for text in capacity or ()}) or sorted(
        {max(most >> shift, 1) for shift in range(6)}
    )
    outcomes = [
        simulation.simulate(requests, kind, size, name)
        for name, kind in names.items()
        for size in sizes
    ]
    needs = (
        None
        if target is None
        else {name: simulation.needed(requests, kind, target) for name, kind in names.items()}
    )
    facts: dict[str, Any] = {
        "requests": len(requests),
        "tokens": outcomes[0].asked[0],
        "bytes": outcomes[0].asked[1],
        "distinct_bytes": most,
    }
    if plot is not None:
        draw(outcomes, plot)
    if as_json:
        results = [outcome.to_dict() for outcome in outcomes]
        more = {} if needs is None else {"target": target, "needed": needs}
        print(json.dumps({"trace": facts, "results": results, **more}))
    else:
        print(report(facts, outcomes, sizes, target, needs))


def report(
    facts: dict[str, Any],
    outcomes: Sequence[Any],
    sizes: Sequence[int],
    target: float | None,
    needs: dict[str, int | None] | None,
) -> str:
    """Hit rates by policy and capacity, and the capacities that reach a target."""
    lines = [
        f"{plural(facts['requests'], 'request', commas=True)}, "
        f"{plural(facts['tokens'], 'token', commas=True)}, "
        f"{process.size(facts['bytes'])}; {process.size(facts['distinct_bytes'])} hold all of it"
    ]
    rates = {
        "tokens found": lambda outcome: outcome.token_hit_rate,
        "bytes found": lambda outcome: outcome.byte_hit_rate,
        "cost spared": lambda outcome: outcome.cost_saved,
    }
    for label, rate in rates.items():
        rows = [[label, *map(process.size, sizes)]]
        for at in range(0, len(outcomes), len(sizes)):
            some = outcomes[at : at + len(sizes)]
            rows.append([some[0].policy, *(f"{100 * rate(outcome):.1f} %" for outcome in some)])
        lines += ["", *columns(rows)]
    if needs is not None:
        rows = [[f"to find {100 * (target or 0):.4g} % of the tokens", ""]]
        for name, size in needs.items():
            rows.append([name, "cannot be reached" if size is None else process.size(size)])
        lines += ["", *columns(rows)]
    return "\n".join(lines)


def draw(outcomes: Sequence[Any], path: Path) -> None:
    """Shares of tokens found over capacities, a line for each policy.

    Raises:
        UnsupportedError: matplotlib is not installed.
        ValueError: no kind of picture that it knows.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "--plot needs matplotlib, which is not installed; pip install 'jkv-jax[plot]'"
        ) from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    if path.suffix.lstrip(".").lower() not in figure.canvas.get_supported_filetypes():
        raise ValueError(
            f"--plot got {brief(str(path))}; expected a name such as rates.png or rates.svg"
        )
    axes = figure.add_subplot()
    for name in dict.fromkeys(outcome.policy for outcome in outcomes):
        some = [outcome for outcome in outcomes if outcome.policy == name]
        axes.plot(
            [outcome.capacity for outcome in some],
            [100 * outcome.token_hit_rate for outcome in some],
            "k--" if name == "optimum" else "-",
            marker="o",
            markersize=3,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("capacity, bytes")
    axes.set_ylabel("tokens found, %")
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _policies(names: Sequence[str] | None) -> dict[str, Any]:
    """Return the optimum and the policies of those names, all of them without names."""
    for name in names or ():
        if name not in POLICIES:
            raise ValueError(f"--policy got {brief(name)}; expected one of {', '.join(POLICIES)}")
    return {"optimum": None} | {name: POLICIES[name] for name in names or POLICIES}
