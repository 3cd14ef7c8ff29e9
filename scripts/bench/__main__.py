"""Benchmarks, from `scripts/`: python -m bench decode|engine|store|attention|kinds [--help]."""

from __future__ import annotations

import importlib
import sys

BENCHES = ("decode", "engine", "store", "attention", "kinds")


def main() -> int:
    """Run the benchmark that the first argument names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in BENCHES:
        asked = arguments[0] if arguments else "nothing"
        help_wanted = asked in ("-h", "--help")
        text = f"usage: python -m bench {{{','.join(BENCHES)}}} [--help]"
        print(text if help_wanted else f"{text}\nbench got {asked}", file=sys.stderr)
        return 0 if help_wanted else 2
    return importlib.import_module(f"bench.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
