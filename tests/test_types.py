"""What type checkers see of jkv: as much as the interpreter does."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAZY = ["jkv", "jkv.engine", "jkv.store"]  # packages whose names resolve on first use


def seen_by_checkers(package: str) -> dict[str, str]:
    """The name and the full path of each import for type checkers alone, in a package's init."""
    path = ROOT.joinpath(*package.split("."), "__init__.py")
    tree = ast.parse(path.read_text())
    [block] = [
        node
        for node in tree.body
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "TYPE_CHECKING"
        and not any(isinstance(inner, ast.FunctionDef) for inner in node.body)
    ]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        home = package if node.level else node.module
        for name in node.names:
            assert name.asname == name.name, f"{name.name} is re-exported as itself only"
            seen[name.name] = f"{home}.{name.name}"
    return seen


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_see_the_lazy_names(package):
    module = importlib.import_module(package)
    homes = {name: f"{home}.{name}" for name, home in vars(module)["_HOME"].items()}
    assert seen_by_checkers(package) == homes | vars(module).get("_MODULES", {})
