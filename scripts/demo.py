"""Generate text with the built-in model, without a cache and with one, and show both speeds.

    bash scripts/demo.sh

which makes the environment first. The first run of each is not timed: it compiles.
"""

from __future__ import annotations

import argparse
import sys
import time

import jax
import numpy as np

import jkv
from jkv.decoding.arguments import CacheLike


def timed(lm: jkv.LM, kind: CacheLike, args: argparse.Namespace) -> tuple[jkv.Result, float]:
    """A generation and the seconds it took, programs compiled beforehand."""

    def run() -> jkv.Result:
        return jkv.generate(
            lm,
            [args.prompt],
            max_new_tokens=args.tokens,
            cache=kind,
            sampler=jkv.sampling.temperature(args.temperature),
            key=jax.random.key(args.seed),
            stop=(),
        )

    run()
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def main() -> int:
    """Both runs, one under the other; fails where their tokens differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", default="ROMEO:\n", help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=240, help="how many to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="another one says something else")
    args = parser.parse_args()

    lm = jkv.load("shakespeare")
    results, seconds = {}, {}
    for name, kind in (("without a cache", jkv.none()), ("with a cache", jkv.dense())):
        print(f"{name}: {args.tokens} tokens ...", end="", flush=True)
        results[name], seconds[name] = timed(lm, kind, args)
        print(f" {seconds[name]:.2f} s, {args.tokens / seconds[name]:.0f} tokens/s")

    plain, cached = results.values()
    slow, fast = seconds.values()
    print(f"\n{args.prompt}{cached.text}\n")
    if not np.array_equal(plain.tokens, cached.tokens):
        print("The two runs said different things: that is a fault of jkv.", file=sys.stderr)
        return 1
    print(f"The same {args.tokens} tokens both times; with a cache {slow / fast:.1f}x as fast.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
