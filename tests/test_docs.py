"""The reference: its pages and its text hold every public name, and docstrings name the errors."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import jkv
from docs import __main__ as site
from docs import hooks, llms, pages
from docs.names import PublicName, module_of, public_names

NAMES = public_names()
CALLABLE = [name for name in NAMES if name.kind != "data"]


def listed() -> dict[str, object]:
    """What the modules list, read from them and not by the code that makes the site."""
    found = {}
    for path in Path(jkv.__file__).parent.rglob("*.py"):
        module = module_of(path)
        if "\n__all__" in path.read_text("utf-8") and not module.startswith("jkv.cli"):
            home = importlib.import_module(module)
            found |= {f"{module}.{name}": getattr(home, name) for name in home.__all__}
    return found


def test_every_public_name_is_documented_once():
    public = {id(v): n for n, v in listed().items() if not isinstance(v, types.ModuleType)}
    documented = [id(name.value) for name in NAMES]
    assert [public[key] for key in public.keys() - set(documented)] == []
    assert len(documented) == len(set(documented)) == len(public)
    assert len({name.name for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("public", NAMES, ids=lambda public: public.name)
def test_the_shortest_name_works_and_says_what_it_is(public):
    path, home = public.name.split(".")[1:], jkv
    if public.module == "jkv.cache.dense":  # `jkv.cache.dense` without an import is the function
        path, home = path[2:], importlib.import_module(public.module)
    value = functools.reduce(getattr, path, home)
    assert value is public.value
    assert re.match(r"\S.*[.:]$", public.first_line)


def test_sources_of_pages(tmp_path):
    """A page for each name, on paths that differ for file systems which ignore case too."""
    pages.write_sources(tmp_path)
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")]
    assert len({name.casefold() for name in files}) == len(files)
    reference = "\n".join(p.read_text("utf-8") for p in (tmp_path / "reference").glob("*.rst"))
    directives = re.findall(r"^\.\. (?:auto|py:)(?:function|class|data):: (\S+)$", reference, re.M)
    assert sorted(directives) == sorted(name.name for name in NAMES)
    glossary = (tmp_path / "glossary.rst").read_text("utf-8")
    assert {"   G", "   block table", "   lse", "   promote"} <= set(glossary.splitlines())
    assert {f"{guide}.md" for guide in pages.GUIDES} < set(files)
    assert {path.name for path in (pages.ROOT / "notebooks").glob("*.ipynb")} < set(files)


def test_a_site_that_lacks_a_name_is_refused():
    every = [name.name for name in NAMES]
    assert site.missing(NAMES, every) == []
    assert site.missing(NAMES, every[1:]) == every[:1]


def test_the_text_for_language_models():
    readme = pages.readme()
    text = llms.text(NAMES, readme)
    for name in CALLABLE:
        assert re.search(rf"^- {re.escape(name.name)}(\(|: )", text, re.M), name.name
        assert name.first_line in text
    assert "- jkv.dense(grow: bool = False) -> DenseKind: Keep every token" in text
    assert "  - .crop(lengths: Lengths) -> Cache: Roll rows back" in text
    assert "0x" not in text  # addresses differ from run to run
    assert text == llms.text(public_names(), readme)
    assert readme.split("\n\n")[1] in text


def test_fields_and_their_comments():
    assert hooks.fields(jkv.Step)["positions"] == ("Array", "[B, T] int32")
    assert hooks.fields(jkv.ops.AttentionSpec)["scale"][0] == "float"
    assert hooks.fields(jkv.Chat) == {}


def test_a_name_that_leads_nowhere_is_a_broken_link():
    there = ["jkv.testing.check_kind", "jkv.cache.paged.Paged.pool", "jkv.ops.masks"]
    assert [name for name in there if not hooks.exists(name)] == []
    assert not hooks.exists("jkv.cache.nothing")
    assert not hooks.exists("jkv.nothing.here")


def callables() -> Iterator[tuple[str, str, ast.FunctionDef]]:
    """Public functions, and the own public methods and constructors of public classes."""
    for public in CALLABLE:
        path = Path(importlib.import_module(public.source or "").__file__ or "")
        for node in ast.parse(path.read_text("utf-8")).body:
            name = getattr(node, "name", None)
            if name != getattr(public.value, "__qualname__", None):
                continue
            if isinstance(node, ast.FunctionDef):
                yield public.name, ast.get_docstring(node) or "", node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef):
                        made = inner.name in ("__init__", "__post_init__")
                        text = ast.get_docstring(inner) or ""
                        if made:
                            text = f"{ast.get_docstring(node)}\n{text}"
                        if made or not inner.name.startswith("_"):
                            yield f"{public.name}.{inner.name}", text, inner


def raised(function: ast.FunctionDef) -> set[str]:
    """The errors that a function's own statements raise, those that it catches left out."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try):
            return
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(ast.unparse(node.exc.func))
        for child in ast.iter_child_nodes(node):
            walk(child)

    for statement in function.body:
        walk(statement)
    return found


def error(name: str) -> type | None:
    return getattr(jkv.errors, name, None) or getattr(builtins, name, None)


def silent() -> list[str]:
    """Functions that raise errors of which their docstrings say nothing.

    An error that another function makes, or that a statement around it may catch, does not count.
    """
    found = []
    for name, text, function in callables():
        section = " ".join(part.partition("Example:")[0] for part in text.split("Raises:")[1:])
        for kind in raised(function):
            known = error(kind)
            bases = [] if known is None else [cls.__name__ for cls in inspect.getmro(known)[:-3]]
            if bases and not any(base in section for base in bases):
                found.append(f"{name}: {kind}")
    return found


def test_docstrings_name_the_errors_that_functions_raise():
    assert silent() == []


def test_errors_of_a_function_are_seen(monkeypatch):
    own = "if x:\n        raise ValueError('a')"
    caught = "try:\n        raise OSError('a')\n    except OSError: ..."
    parsed = ast.parse(f"def f():\n    {own}\n    {caught}\n    def g(): raise TypeError").body[0]
    assert isinstance(parsed, ast.FunctionDef)
    assert raised(parsed) == {"ValueError"}
    here = [("f", "", parsed), ("g", "Raises:\n    ValueError: a.", parsed)]
    monkeypatch.setattr(sys.modules[__name__], "callables", lambda: here)
    assert silent() == ["f: ValueError"]


def test_one_page_for_a_function_and_the_class_that_it_makes():
    class TopK: ...

    names = [PublicName(f"jkv.s.{n}", "jkv.s", v, None) for n, v in [("TopK", TopK), ("top_k", id)]]
    assert [[name.name for name in page] for page in pages.pages(names)] == [
        ["jkv.s.top_k", "jkv.s.TopK"]
    ]
