"""`jkv score`: how likely texts are."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

import jkv
from jkv._tables import columns
from jkv.cli import options, process

SHOWN = 60  # characters of a text in the table


def score(
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT", help="What to score; several are one batch."),
    ],
    model: options.Model = "shakespeare",
    top_logprobs: Annotated[
        int, typer.Option(metavar="K", help="With --json: the K likeliest tokens in each place.")
    ] = 0,
    cache: options.CacheSpec = "dense",
    dtype: options.Dtype = None,
    ignore: options.Ignore = None,
    as_json: options.AsJson = False,
) -> None:
    """Tell how likely texts are, as in jkv score "To be, or not to be"

    The log-probability of each text given its first token, in natural logarithms, and the
    perplexity per token. With --json those of each token too: the first has null, since nothing
    comes before it.
    """
    from jkv.cache.spec import parse

    if top_logprobs and not as_json:
        raise ValueError("--top-logprobs is shown in the object only: give --json too")
    kind = parse(cache)
    lm = process.load(model, dtype, ignore)
    scores = jkv.score(lm, texts, top_logprobs=top_logprobs, cache=kind)
    outputs = [_output(scores, row, text) for row, text in enumerate(texts)]
    if as_json:
        model_of = {"model": lm.source, "cache": cache, "dtype": lm.config.dtype}
        print(json.dumps({**model_of, "outputs": outputs}))
        return
    rows = [["log-probability", "perplexity", "tokens"]]
    for output in outputs:
        perplexity = output["perplexity"]
        each = "-" if perplexity is None else f"{perplexity:.4g}"
        rows.append([f"{output['logprob']:.4f}", each, str(len(output["tokens"]))])
    for line, text in zip(columns(rows, left=0), ["text", *map(_shortened, texts)], strict=True):
        print(f"{line}  {text}")


def _output(scores: jkv.decoding.Scores, row: int, text: str) -> dict[str, Any]:
    """Make a text's object."""
    count = int(scores.lengths[row])
    output: dict[str, Any] = {
        "text": text,
        "tokens": scores.tokens[row, :count].tolist(),
        "logprob": float(scores.totals[row]),
        "perplexity": float(scores.perplexities[row]) if count > 1 else None,
        "logprobs": [None, *scores.logprobs[row, 1:count].tolist()],
    }
    if scores.top_tokens is not None and scores.top_logprobs is not None:
        output["top_tokens"] = [None, *scores.top_tokens[row, 1:count].tolist()]
        output["top_logprobs"] = [None, *scores.top_logprobs[row, 1:count].tolist()]
    return output


def _shortened(text: str) -> str:
    line = text.replace("\n", "\\n")
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."
