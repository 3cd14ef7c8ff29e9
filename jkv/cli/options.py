"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Option("--model", help="The built-in model's name, a directory, or a hub id.")
]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the K likeliest tokens.")]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the likeliest tokens that together reach P.")
]
MinP = Annotated[
    float | None, typer.Option(help="Draw from tokens at least P times as likely as the likeliest.")
]
Penalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Above 1: push down tokens already said."),
]
Seed = Annotated[
    int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Of what is drawn at random.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", help="A text at which to end, beside the checkpoint's own ends; repeatable."
    ),
]
SPEC_HELP = "The kind of cache, such as dense, none or window:256; `jkv caches` lists all."
CacheSpec = Annotated[str, typer.Option("--cache", metavar="SPEC", help=SPEC_HELP)]
Dtype = Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16.")]
AsJson = Annotated[bool, typer.Option("--json", help="One object on standard output.")]


def drawing(
    temperature: Any, top_k: Any, top_p: Any, min_p: Any, penalty: Any, seed: int
) -> dict[str, Any]:
    """The keywords `sampler` and `key` that the options describe, whoever has read them.

    Raises:
        TypeError: no number.
        ValueError: a value out of range, used or not.
    """
    import jax

    from jkv import sampling

    # The penalty comes first: its numbers are meant for logits that nothing has scaled.
    chosen = [] if penalty is None else [sampling.repetition_penalty(penalty)]
    heat = sampling.temperature(temperature)
    cuts = [
        make(value)
        for make, value in (
            (sampling.top_k, top_k),
            (sampling.top_p, top_p),
            (sampling.min_p, min_p),
        )
        if value is not None
    ]
    if temperature == 0:  # the likeliest token is in every cut
        return {"sampler": sampling.chain(*chosen, heat) if chosen else None, "key": None}
    return {"sampler": sampling.chain(*chosen, heat, *cuts), "key": jax.random.key(seed)}
