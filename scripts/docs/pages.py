"""The sources of the site: reference pages from docstrings, and the repository's own texts."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from docs.names import PublicName, page_name, public_names
from jkv import CacheKind, _axes

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ("add_a_kind", "add_a_family", "add_a_kernel", "add_a_policy")
PREAMBLE = """\
In the examples `jkv`, `jax`, `jax.numpy as jnp` and `numpy as np` are imported, and `lm` is the
built-in model, `jkv.load("shakespeare")`. The tests run them.
"""
TEXT = """\
.. raw:: html

   <p>All of it as one text: <a href="../llms.txt">llms.txt</a>.</p>
"""


def write_sources(into: Path) -> list[PublicName]:
    """Write the sources of all pages to a directory; the names that they document."""
    names = public_names()
    for page in pages(names):
        write(into / "reference" / f"{page[0].name}.rst", object_page(page))
    modules = list(dict.fromkeys(one.module for one in names))
    for module in modules:
        own = [page for page in pages(names) if page[0].module == module]
        write(into / "modules" / f"{page_name(module)}.rst", module_page(module, own, names))
    write(into / "modules" / "index.rst", reference_page(modules))
    write(into / "glossary.rst", glossary(_axes.__doc__ or ""))
    write(into / "cli.md", command_line())
    for guide in GUIDES:
        shutil.copy(ROOT / "notebooks" / "guides" / f"{guide}.md", into)
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for notebook in notebooks:  # without pictures that only a connection shows
        text = re.sub(r"!\[([^]]*)\]\(https:[^)]*\)", r"\1", notebook.read_text("utf-8"))
        write(into / notebook.name, text)
    for page in ("changelog", "contributing"):
        write(into / f"{page}.md", (ROOT / f"{page.upper()}.md").read_text("utf-8"))
    first = index(readme(), [notebook.stem for notebook in notebooks])
    for picture in re.findall(r"!\[[^]]*\]\((\S+)\)", first):
        shutil.copy(ROOT / picture, into)
        first = first.replace(picture, Path(picture).name)
    write(into / "index.md", first)
    return names


def write(path: Path, text: str) -> None:
    """Write a text, and make its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def repository() -> str:
    """Return the repository's address, which stands in pyproject.toml alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project["urls"]["Repository"]


def readme() -> str:
    """Return the repository's README."""
    return (ROOT / "README.md").read_text("utf-8")


def pages(names: Sequence[PublicName]) -> list[list[PublicName]]:
    """Group names by page: a function and the class that it makes, `top_k` and `TopK`, share one.

    The first is the page's name. File systems that ignore case could not hold two pages.
    """
    groups: dict[str, list[PublicName]] = {}
    for one in names:
        groups.setdefault(one.name.casefold().replace("_", ""), []).append(one)
    return [sorted(group, key=lambda one: one.kind == "class") for group in groups.values()]


def heading(text: str, line: str = "=") -> str:
    """Return a heading of reStructuredText."""
    return f"{text}\n{line * len(text)}\n"


def object_page(page: Sequence[PublicName]) -> str:
    """Return the page of a public name, or of a function and the class that it makes."""
    parts = [heading(page[0].name)]
    for one in page:
        if one.kind == "data":
            parts.append(f".. py:data:: {one.name}\n\n{indent(one.text)}")
            continue
        parts.append(f".. auto{one.kind}:: {one.name}\n")
        if one.kind == "class":
            parts[-1] += "   :members:\n   :member-order: bysource\n"
    return "\n".join(parts)


def indent(text: str) -> str:
    """Indent a text as the content of a directive."""
    return "".join(f"   {line}\n" if line else "\n" for line in text.splitlines())


def module_page(
    module: str, own: Sequence[Sequence[PublicName]], names: Sequence[PublicName]
) -> str:
    """Return the page of a module: its docstring, and tables of what it lists."""
    docstring = inspect.getdoc(importlib.import_module(module)) or ""
    parts = [heading(page_name(module)), docstring, ""]
    listed = [one for page in own for one in page]
    if module == "jkv":  # whose names have their pages with the modules that define them
        listed = [one for one in names if one.name.count(".") == 1]
    for title, holds in SECTIONS.items():
        held = [one for one in listed if holds(one)]
        if held:
            rows = [(f":py:obj:`{one.name}`", one.first_line) for one in held]
            parts += [heading(title, "-"), table(rows)]
    parts += [".. toctree::\n   :hidden:\n"]
    parts += [f"   ../reference/{page[0].name}" for page in own]
    return "\n".join(parts) + "\n"


def makes_kind(one: PublicName) -> bool:
    """Whether it is a function that returns a kind of cache."""
    if one.kind != "function":
        return False
    returned = inspect.signature(one.value, eval_str=True).return_annotation  # pyright: ignore
    made = typing.get_args(returned) or (returned,)
    return all(isinstance(kind, type) and issubclass(kind, CacheKind) for kind in made)


SECTIONS: dict[str, Callable[[PublicName], bool]] = {
    "Kinds of cache": makes_kind,
    "Functions": lambda one: one.kind == "function" and not makes_kind(one),
    "Classes": lambda one: one.kind == "class",
    "Values": lambda one: one.kind == "data",
}


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of names and what they are."""
    cells = [f"   * - {name}\n     - {told}\n" for name, told in rows]
    return ".. list-table::\n   :widths: 35 65\n\n" + "".join(cells)


def reference_page(modules: Sequence[str]) -> str:
    """Return the page above all modules."""
    names = [page_name(module) for module in modules]
    told = [(importlib.import_module(module).__doc__ or "").split("\n", 1)[0] for module in modules]
    rows = [(f":doc:`{name}`", line) for name, line in zip(names, told, strict=True)]
    tree = ".. toctree::\n   :hidden:\n\n" + "".join(f"   {name}\n" for name in names)
    return "\n".join([heading("Reference"), PREAMBLE, TEXT, table(rows), tree])


def glossary(text: str) -> str:
    """Return the glossary: the tables of `jkv._axes`, each row a term that can be found."""
    terms = []
    parts = [heading("Glossary")]
    for line in text.splitlines()[2:]:
        row = re.fullmatch(r"(\S.*?)  +(\S.*)", line)
        if row is not None:
            names = [name.strip("` ") for name in row[1].split(",")]
            terms += [*(f"   {name}" for name in names), f"      {row[2]}", ""]
            continue
        if terms and not line.startswith("="):
            parts += [".. glossary::", "", *terms]
            terms = []
        if not line.startswith("="):
            parts.append(line)
    return "\n".join([*parts, ".. glossary::", "", *terms])


def command_line() -> str:
    """Return what every command and option of `jkv` does, from typer."""
    command = [sys.executable, "-m", "typer", "jkv.cli", "utils", "docs", "--name", "jkv"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    told = re.sub(r"\A# `jkv`", "# Command line", told).replace("[default: ", "[by default: ")
    # Options in sentences are code, of which the two dashes stay two.
    return re.sub(r"(`+[^`]*`+)|(--[a-z][\w-]*)", lambda m: m[1] or f"`{m[2]}`", told)


def index(told: str, notebooks: Sequence[str]) -> str:
    """Return the first page: how README begins and what it shows of use, and where all else is."""
    opening = told.split("\n## ")[0]
    use = told.partition("\n## Use it\n")[2].partition("\n| ")[0].rpartition("\n\n")[0]
    trees = {
        "Reference": ["modules/index", "cli", "glossary"],
        "Guides": GUIDES,
        "Notebooks": notebooks,
        "Project": ["contributing", "changelog", f"Repository <{repository()}>"],
    }
    parts = [opening.strip(), use.strip()]
    for caption, entries in trees.items():
        listed = "\n".join(entries)
        parts.append(f"```{{toctree}}\n:caption: {caption}\n:maxdepth: 1\n\n{listed}\n```")
    return "\n\n".join(parts) + "\n"
