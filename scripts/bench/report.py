"""What a benchmark measured, in one format for all: written as it comes, and shown at the end."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import machine


class Report:
    """The sections that one benchmark has measured, and where.

    As JSON: ``{"bench": name, "machine": {...}, "settings": {...}, "sections": {name: ...}}``.

    Args:
        bench: the benchmark's name.
        options: of its command line; ``json`` says where the report is written, if anywhere.
    """

    def __init__(self, bench: str, options: argparse.Namespace) -> None:
        given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        self._path: Path | None = options.json
        self.sections: dict[str, Any] = {}
        self.results: dict[str, Any] = {
            "bench": bench,
            "machine": machine.describe(),
            "settings": {k: v for k, v in given.items() if k not in ("json", "plot")},
            "sections": self.sections,
        }

    def add(self, section: str, found: Any) -> None:
        """Set a section, and write the report: an interrupted run leaves what it has."""
        self.sections[section] = found
        if self._path is not None:
            self._path.write_text(json.dumps(self.results, indent=2) + "\n")


def show_machine(results: dict[str, Any], console: Console) -> None:
    """Print where and with what a report was made."""
    about = results["machine"]
    console.print(
        f"\n{about['processor']}, {about['cores']} cores, {about['device']}, {about['date']}, "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    )


def parser(bench: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option that all benchmarks have."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench {bench}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    return made
