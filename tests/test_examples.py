"""The examples in docstrings run, print what they say, and everything public has one."""

from __future__ import annotations

import ast
import doctest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from docs.names import PACKAGE, module_of, public_names

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.REPORT_ONLY_FIRST_FAILURE
PUBLIC = [name for name in public_names() if name.kind != "data"]


def examples() -> list[tuple[str, str, Path, int]]:
    """Name, docstring, file and line of everything in the library with an example.

    Read from the sources: `doctest.DocTestFinder` does not see what a decorator wraps.
    """
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
                text = ast.get_docstring(node)
                if text and ">>>" in text:
                    inner = getattr(node, "name", "")
                    line = node.body[0].lineno
                    found.append((f"{module_of(path)}.{inner}", text, path, line))
    return found


EXAMPLES = examples()


@pytest.fixture(scope="module")
def lm() -> jkv.LM:
    return jkv.load("shakespeare")


def run(name: str, text: str, names: dict[str, Any], path: Path | str = "", line: int = 0) -> str:
    """Run a docstring's examples; what did not do what it says."""
    test = doctest.DocTestParser().get_doctest(text, names, name, str(path), line)
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=failures.append)
    return "".join(failures)


@pytest.mark.parametrize(("name", "text", "path", "line"), EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_an_example_does_what_it_says(name, text, path, line, lm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some keep caches in a directory
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"jkv": jkv, "jax": jax, "jnp": jnp, "np": np, "lm": lm}
    assert run(name, text, names, path, line) == ""


def test_an_example_that_lies_is_told_of():
    assert run("right", ">>> 1 + 1\n2\n", {}) == ""
    assert "Expected:\n    3" in run("wrong", ">>> 1 + 1\n3\n", {})
    assert "ZeroDivisionError" in run("raises", ">>> 1 / 0\n", {})


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.name)
def test_what_is_public_has_an_example(public):
    assert ">>> " in public.text
