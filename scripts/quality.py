r"""What each kind of cache costs in quality: held-out text through the real decode path.

    python scripts/quality.py --model shakespeare --text tinyshakespeare.txt
    python scripts/quality.py --model DIR --text FILE --cache dense --cache int8 --cache int4 \
        --json quality.json --plot quality.png

Every kind is given the same rows of the text's held-out end: a prompt in one pass, as a prefill,
and every other token by itself, as in decoding, the text's own token following whatever the model
would have said. What the kind loses is the perplexity above that of the dense cache (with the
standard error of that difference over rows), the Kullback-Leibler divergence of its distributions
from the dense cache's, and the share of tokens at which both find the same token likeliest.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jkv
from bench import machine
from jkv._pytree import nbytes
from jkv.cache.spec import parse

DEFAULT = (
    "dense",
    "int8",
    "fp8",
    "kv:k8v4",
    "int4",
    "int2",
    "near_far:recent=32,far=int2",
    "sparse:0.5",
    "sparse:0.25",
    "sparse:0.5,int8",
    "sparse:0.25,int8",
    "window:128",
    "window:124,sinks=4",
    "evict:128,score=h2o",
    "evict:128,score=tova",
    "evict:128,score=key_norm",
)
LONG = 32768  # tokens at which the bytes of a long context are told


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is run, alike for all kinds."""

    rows: int
    batch: int
    tokens: int
    prompt: int


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="shakespeare", help="directory, hub id or built-in name")
    parser.add_argument("--text", type=Path, required=True, help="its end is held out")
    parser.add_argument(
        "--cache", action="append", metavar="SPEC", help="a kind (see `jkv caches`); repeatable"
    )
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the text's end")
    parser.add_argument("--rows", type=int, default=32, help="stretches of text")
    parser.add_argument("--batch", type=int, default=16, help="rows at a time")
    parser.add_argument("--tokens", type=int, help="per row; the model's context by default")
    parser.add_argument("--prompt", type=int, default=32, help="first tokens, in one pass")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bytes against loss")
    return parser.parse_args()


def rows_of(lm: jkv.LM, text: str, share: float, setting: Setting) -> np.ndarray:
    """Stretches of the text's end, spread over it, [rows, tokens]."""
    held_out = text[int(len(text) * (1 - share)) :]
    ids = np.asarray(lm.encode(held_out)[0], np.int32)
    if len(ids) < setting.tokens:
        raise SystemExit(
            f"the held-out text has {len(ids)} tokens, fewer than a row of {setting.tokens}; "
            "expected a longer text, a larger --held-out or fewer --tokens"
        )
    starts = np.linspace(0, len(ids) - setting.tokens, setting.rows).astype(int)
    return np.stack([ids[start : start + setting.tokens] for start in starts])


@functools.partial(jax.jit, donate_argnums=2)
def read(model: Any, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    """Log-probabilities [B, V] after a prompt."""
    logits, cache = jkv.prefill(model, tokens, cache)
    return jax.nn.log_softmax(logits), cache


@functools.partial(jax.jit, donate_argnums=2)
def follow(model: Any, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    """Log-probabilities [T, B, V] after each of the tokens, one decode step for each."""

    def step(cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        logits, cache = jkv.decode_step(model, token, cache)
        return cache, jax.nn.log_softmax(logits)

    cache, found = lax.scan(step, cache, tokens.T)
    return found, cache


def distributions(lm: jkv.LM, kind: Any, rows: np.ndarray, prompt: int) -> tuple[Any, Any, float]:
    """Log-probabilities [T, B, V] after the prompt and later, the cache, seconds of decoding."""
    cache = jkv.init_cache(lm.config, kind, batch=len(rows), slots=rows.shape[1])
    first, cache = read(lm.model, jnp.asarray(rows[:, :prompt]), cache)
    first.block_until_ready()
    start = time.perf_counter()
    rest, cache = follow(lm.model, jnp.asarray(rows[:, prompt:-1]), cache)
    rest.block_until_ready()
    seconds = time.perf_counter() - start
    return jnp.concatenate([first[None], rest]), cache.check(), seconds


@jax.jit
def compare(found: jax.Array, dense: jax.Array, said: jax.Array) -> dict[str, jax.Array]:
    """Sums per row of loss, divergence and agreement; `said` is [T, B]."""
    loss = -jnp.take_along_axis(found, said[..., None], axis=-1)[..., 0]
    divergence = jnp.sum(jnp.exp(dense) * (dense - found), axis=-1)
    agree = jnp.argmax(found, -1) == jnp.argmax(dense, -1)
    return {"loss": loss.sum(0), "kl": divergence.sum(0), "same": agree.sum(0)}


def measure(lm: jkv.LM, specs: list[str], rows: np.ndarray, setting: Setting) -> dict[str, Any]:
    """By spec, what was found; the first spec is the dense cache."""
    sums: dict[str, dict[str, list[np.ndarray]]] = {spec: {} for spec in specs}
    speed: dict[str, list[float]] = {spec: [] for spec in specs}
    sizes: dict[str, int] = {}
    batches = [rows[i : i + setting.batch] for i in range(0, len(rows), setting.batch)]
    for batch in track(batches, description="rows", console=Console(stderr=True)):
        said = jnp.asarray(batch[:, setting.prompt :].T)
        dense = None
        for spec in specs:
            found, cache, seconds = distributions(lm, parse(spec), batch, setting.prompt)
            if len(speed[spec]) == 0 and len(batches) == 1:  # the only time, compilation in it
                found, cache, seconds = distributions(lm, parse(spec), batch, setting.prompt)
            dense = found if dense is None else dense
            sizes[spec] = cache.nbytes
            speed[spec].append((said.size - len(batch)) / seconds)
            for name, value in compare(found, dense, said).items():
                sums[spec].setdefault(name, []).append(np.asarray(value, np.float64))
    count = rows.shape[1] - setting.prompt
    return {
        spec: summary(
            {name: np.concatenate(found) / count for name, found in sums[spec].items()},
            np.concatenate(sums[specs[0]]["loss"]) / count,
        )
        | {
            "bytes per token": sizes[spec] / (setting.batch * setting.tokens),
            f"bytes per token at {LONG}": long_bytes(lm.config, spec),
            "tokens per second": float(np.median(speed[spec][1:] or speed[spec])),
        }
        for spec in specs
    }


def summary(mean: dict[str, np.ndarray], dense: np.ndarray) -> dict[str, float]:
    """Means over rows, and how sure the difference from the dense cache is."""
    more = mean["loss"] - dense
    error = more.std(ddof=1) / math.sqrt(len(more)) if len(more) > 1 else math.nan
    return {
        "loss": float(mean["loss"].mean()),
        "perplexity": float(np.exp(mean["loss"].mean())),
        "perplexity above dense": float(np.expm1(more.mean())),
        "standard error": float(error),
        "kl": float(mean["kl"].mean()),
        "top-1 agreement": float(mean["same"].mean()),
    }


def long_bytes(config: Any, spec: str) -> float:
    """Bytes per token of one row of a long context, from shapes alone."""

    def make() -> Any:
        return jkv.init_cache(config, parse(spec), batch=1, slots=LONG)

    return nbytes(jax.eval_shape(make)) / LONG


def table(results: dict[str, Any]) -> Table:
    """The measurements for people."""
    found, setting = results["kinds"], results["setting"]
    made = Table(
        title=f"{results['model']}: {setting['rows']} rows of {setting['tokens']} tokens, "
        f"{setting['prompt']} of them as a prompt",
        title_justify="left",
    )
    for name in ("cache", "perplexity", "above dense", "KL", "same top-1", "bytes/token"):
        made.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
    made.add_column(f"at {LONG // 1024}k", justify="right")
    made.add_column("smaller by", justify="right")
    made.add_column("tokens/s", justify="right")
    long = f"bytes per token at {LONG}"
    dense = next(iter(found.values()))
    for spec, row in found.items():
        made.add_row(
            spec,
            f"{row['perplexity']:.3f}",
            f"{row['perplexity above dense']:+.2%} ± {row['standard error']:.2%}",
            f"{row['kl']:.5f}",
            f"{row['top-1 agreement']:.2%}",
            f"{row['bytes per token']:.0f}",
            f"{row[long]:.0f}",
            f"{dense[long] / row[long]:.2f}x",
            f"{row['tokens per second']:.0f}",
        )
    return made


def draw(results: dict[str, Any], path: Path) -> None:
    """Bytes per token of the rows that were run, against the perplexity lost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for spec, row in results["kinds"].items():
        x, y = row["bytes per token"], 100 * row["perplexity above dense"]
        axes.scatter([x], [max(y, 1e-3)])
        axes.annotate(spec, (x, max(y, 1e-3)), xytext=(4, 4), textcoords="offset points", size=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(f"bytes per token, of {results['setting']['tokens']} tokens")
    axes.set_ylabel("perplexity above the dense cache's, % (at least 0.001)")
    axes.set_title(results["model"], loc="left")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    options = arguments()
    lm = jkv.load(options.model)
    setting = Setting(
        options.rows,
        min(options.batch, options.rows),
        options.tokens or lm.config.context,
        options.prompt,
    )
    if not 0 < setting.prompt < setting.tokens - 1:
        raise SystemExit(f"--prompt {setting.prompt} leaves nothing of {setting.tokens} tokens")
    text = options.text.read_text(encoding="utf-8")
    rows = rows_of(lm, text, options.held_out, setting)
    asked = options.cache or list(DEFAULT)
    specs = ["dense", *(spec for spec in dict.fromkeys(asked) if spec != "dense")]
    results = {
        "model": options.model,
        "text": options.text.name,
        "machine": machine.describe(),
        "setting": dataclasses.asdict(setting),
        "kinds": measure(lm, specs, rows, setting),
    }
    # A file has no width of its own.
    Console(width=None if sys.stdout.isatty() else 150).print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
