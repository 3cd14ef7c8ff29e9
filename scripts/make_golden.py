"""Write tests/golden/: tiny random models of each family, and what transformers computes with them.

    python scripts/make_golden.py [--shared DIRECTORY] [CASE ...]

Needs the `compare` extra. Each case is a directory that transformers saved (config.json and
model.safetensors, weights in float32) with `golden.npz` beside it: prompts, their logits, and the
greedy tokens after them. With --shared (the directory that holds models/stories260k), the greedy
tokens of a trained model for many prompts are written too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.compare import reference  # noqa: E402
from tests.models.cases import CASES, STORIES_PROMPTS  # noqa: E402

PROMPT, NEW = 14, 12  # tokens


def main() -> None:
    """Write all cases, or those named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help="all by default")
    parser.add_argument("--shared", type=Path, help="holds models/stories260k")
    args = parser.parse_args()
    for name in args.cases or CASES:
        directory = ROOT / "tests" / "golden" / name
        write_case(directory, CASES[name])
        size = sum(path.stat().st_size for path in directory.iterdir())
        print(f"{name}: {size / 1000:.1f} kB")
    if args.shared is not None:
        write_stories(args.shared / "models" / "stories260k")


def write_case(directory: Path, case: dict[str, Any]) -> None:
    """One tiny model and its numbers."""
    for seed in range(100):
        shutil.rmtree(directory, ignore_errors=True)
        reference.save(reference.random_model(case, seed), directory, case)
        # Read again: what is on disk is what jkv will see.
        model = reference.load(directory)
        prompts = reference.random_prompts(model, rows=2, length=PROMPT, seed=seed)
        tokens = reference.greedy(model, prompts, NEW)
        if telling(model, prompts, tokens):
            break
    else:
        raise SystemExit(f"{directory.name}: no seed gives tokens worth comparing")
    np.savez_compressed(
        directory / "golden.npz",
        prompts=prompts,
        logits=reference.logits(model, prompts),
        tokens=tokens,
    )


def telling(model: Any, prompts: np.ndarray, tokens: np.ndarray) -> bool:
    """Whether greedy tokens vary, and none of them hangs on the last bits of its logit."""
    logits = reference.logits(model, np.concatenate([prompts, tokens], axis=1))[:, PROMPT - 1 :]
    best = np.sort(logits, axis=-1)
    margin = (best[..., -1] - best[..., -2]).min() / logits.std()
    return all(len(np.unique(row)) > 3 for row in tokens) and margin > 0.003


def write_stories(directory: Path) -> None:
    """Greedy tokens of stories260k after many prompts."""
    model = reference.load(directory)
    tokenizer = reference.load_tokenizer(directory)
    rows = []
    for prompt in STORIES_PROMPTS:
        ids = tokenizer.encode(prompt)
        rows.append(
            {
                "prompt": prompt,
                "ids": ids,
                "tokens": reference.greedy(model, np.asarray([ids]), 48)[0].tolist(),
            }
        )
    path = ROOT / "tests" / "golden" / "stories260k.json"
    path.write_text(json.dumps(rows, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(rows)} prompts, {path.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
