"""One fresh process: load a checkpoint, ask for text, say how long everything took, as JSON."""

import json
import sys
import time

start = time.perf_counter()


def main() -> None:
    """Times in seconds; those of tokens count from the call."""
    import jkv

    lm = jkv.load(sys.argv[1])
    loaded = time.perf_counter()
    took = [0.0, 0.0]
    for i, _ in enumerate(jkv.stream(lm.model, [list(range(24))], max_new_tokens=64, stop=())):
        took[min(i, 1)] = time.perf_counter() - loaded
    print(json.dumps({"load": loaded - start, "first token": took[0], "64 tokens": took[1]}))


if __name__ == "__main__":
    main()
