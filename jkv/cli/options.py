"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from jkv._text import brief

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
    typer.Option("--repetition-penalty", help="Above 1: push down tokens of prompt and answer."),
]
Presence = Annotated[
    float | None,
    typer.Option("--presence-penalty", help="Subtract from the logits of tokens of the answer."),
]
Frequency = Annotated[
    float | None,
    typer.Option("--frequency-penalty", help="Likewise, once for each time they came."),
]
NoRepeat = Annotated[
    int | None,
    typer.Option("--no-repeat-ngram", help="Never say the same N tokens in a row twice."),
]
MinNewTokens = Annotated[
    int | None, typer.Option(help="New tokens before the checkpoint's ends count, at least.")
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
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="A key of config.json to treat as absent; repeatable."),
]
SeqLen = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Tokens in each row, such as 8192 or 8k; by default the model's context.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One object on standard output.")]


# What `drawing` takes, in the order of the chain: what forbids and penalises is meant for logits
# that nothing has scaled, and what cuts for those that the temperature has.
FIRST = (
    "logit_bias",
    "min_new_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram",
)
CUTS = ("top_k", "top_p", "min_p")


def drawing(temperature: float, seed: int, **wanted: object) -> dict[str, Any]:
    """Make the keywords `sampler` and `key` from options, or from the fields of a request.

    Args:
        temperature: 0 takes the likeliest token.
        seed: of the key.
        wanted: arguments of the transforms of `jkv.sampling`, by the names of `FIRST` and `CUTS`;
            None is as good as nothing.

    Raises:
        TypeError: no number.
        ValueError: a value out of range, used or not.
    """
    import jax

    from jkv import sampling

    def made(names: tuple[str, ...]) -> list[Any]:
        given = [name for name in names if wanted.get(name) is not None]
        return [getattr(sampling, name)(wanted[name]) for name in given]

    first, heat, cuts = made(FIRST), sampling.temperature(temperature), made(CUTS)
    if temperature == 0:  # the likeliest token is in every cut
        return {"sampler": sampling.chain(*first, heat) if first else None, "key": None}
    return {"sampler": sampling.chain(*first, heat, *cuts), "key": jax.random.key(seed)}


def tokens(text: str | None) -> int | None:
    """Parse a number of tokens, "32k" being 32 * 1024 as contexts are named; None stays None.

    Raises:
        ValueError: it is something else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(-?\d{1,18})\s*([kK]?)\s*", text, re.ASCII)
    if match is None:
        raise ValueError(
            f"--seq-len got {brief(text)}; expected a number of tokens, such as 8192 or 8k"
        )
    return int(match[1]) * (1024 if match[2] else 1)
