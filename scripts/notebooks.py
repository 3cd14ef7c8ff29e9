"""Give all notebooks the same beginning: a badge for Colab, and a cell that installs jkv.

python scripts/notebooks.py   # after a change here or of pyproject's address, and for new notebooks
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
COLAB = "https://colab.research.google.com/github"

SETUP = """\
# Install jkv where it is missing. The JAX that is here, and with it its GPU, stays as it is.
import importlib.util, re, subprocess, sys
from importlib.metadata import distributions
from pathlib import Path

missing = [name for name in ("jkv", "matplotlib") if not importlib.util.find_spec(name)]
if missing:  # pip takes up to a minute
    above = (Path.cwd(), *Path.cwd().parents)
    clone = next((str(d) for d in above if (d / "jkv" / "_version.py").is_file()), None)
    wanted = ["-e", clone + "[plot]"] if clone else ["jkv-jax[plot]"]
    here = {(d.metadata["Name"] or "").lower(): d.version for d in distributions()}
    fixed = re.compile("jax|jaxlib|(jax|nvidia)[-_].*|flax|numpy|libtpu").fullmatch
    wanted += [f"{name}=={version}" for name, version in here.items() if fixed(name)]
    pip = [sys.executable, "-m", "pip", "install", "-q", *wanted]
    if (done := subprocess.run(pip, capture_output=True, text=True)).returncode:
        hint = 'To let pip change JAX, which may cost its GPU: %pip install "jkv-jax[plot]"'
        raise RuntimeError(f"pip cannot add jkv to this JAX:\\n{done.stderr}\\n{hint}")
    sys.path += [clone] if clone else []  # where the kernel looks from its next start on
import jkv

print(jkv.about())"""


def badge(path: Path) -> str:
    """Return the line that opens the notebook on Colab, from the repository's address."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    repository = project["urls"]["Repository"].removeprefix("https://github.com/").rstrip("/")
    where = f"{COLAB}/{repository}/blob/main/notebooks/{path.name}"
    return f"[![Open in Colab]({BADGE})]({where})"


def begin(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Set the badge, above the title in the first cell, and the second cell."""
    title = notebook.cells[0].source
    notebook.cells[0].source = f"{badge(path)}\n\n{title[title.index('# ') :]}"
    notebook.cells[1].source = SETUP


def main() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        begin(notebook, path)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
