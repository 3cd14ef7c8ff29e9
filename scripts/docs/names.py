"""The public names: all that modules of jkv list in `__all__`, each once."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import types
from collections.abc import Iterator
from pathlib import Path

import jkv

PACKAGE = Path(jkv.__file__).parent
# The command line has its own help, which is a page.
OTHERS = ("jkv.cli",)


@dataclasses.dataclass(frozen=True)
class PublicName:
    """A public function, class or value.

    Attributes:
        name: the shortest under which it is found, such as "jkv.dense".
        module: the public module on whose page it stands.
        value: what it names.
        source: the module that defines it, None where that is unknown.
    """

    name: str
    module: str
    value: object
    source: str | None

    @property
    def kind(self) -> str:
        """The directive of Sphinx that documents it: "class", "function" or "data"."""
        if isinstance(self.value, type):
            return "class"
        return "function" if inspect.isroutine(self.value) else "data"

    @property
    def first_line(self) -> str:
        """What it is, in one line."""
        return self.text.split("\n", 1)[0]

    @property
    def text(self) -> str:
        """Its docstring; that of a value stands below its assignment."""
        if self.kind != "data":
            return inspect.getdoc(self.value) or ""
        found = assigned(self.name.rsplit(".", 1)[1], self.module)
        return "" if found is None else found[1]


def module_of(path: Path) -> str:
    """Return the module in a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def public_modules() -> list[str]:
    """Return the modules with a list of public names, outer ones first."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        targets = [
            ast.unparse(target)
            for node in ast.parse(path.read_text("utf-8")).body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        ]
        name = module_of(path)
        if "__all__" in targets and name not in OTHERS and importlib.import_module(name).__all__:
            found.append(name)
    return sorted(found, key=lambda name: (name.count("."), name))


def page_name(module: str) -> str:
    """Return the name that people write for a module: `jkv.sampling` is in `jkv.decoding`."""
    shown = {v.__name__: f"jkv.{n}" for n, v in listed("jkv") if isinstance(v, types.ModuleType)}
    return shown.get(module, module)


def listed(module: str) -> Iterator[tuple[str, object]]:
    """List the names of a module's `__all__`, with their values."""
    home = importlib.import_module(module)
    for name in home.__all__:
        yield name, getattr(home, name)


def public_names() -> list[PublicName]:
    """Return every public name once, in the order of the pages."""
    modules = public_modules()
    homes: dict[int, list[str]] = {}  # by identity: values need not be hashable
    values: dict[int, object] = {}
    for module in modules:
        for name, value in listed(module):
            if not isinstance(value, types.ModuleType):
                values[id(value)] = value
                homes.setdefault(id(value), []).append(f"{module}.{name}")
    names = []
    for number, value in values.items():
        full = homes[number]
        inner = [name.rsplit(".", 1)[0] for name in full if name.count(".") > 1]
        source = source_of(full[-1], value)
        # What only the root lists belongs to the module around its definition.
        around = [name for name in modules if f"{source}.".startswith(f"{name}.")]
        module = inner[0] if inner else around[-1]
        first = full[0]
        if first.startswith(f"{module}."):
            first = page_name(module) + first.removeprefix(module)
        names.append(PublicName(first, module, value, source))
    return sorted(names, key=lambda one: (modules.index(one.module), one.name.lower()))


def source_of(name: str, value: object) -> str | None:
    """Return the module that defines a public value."""
    if isinstance(value, type) or inspect.isroutine(value):
        return value.__module__
    module, _, attribute = name.rpartition(".")
    found = assigned(attribute, module)
    return None if found is None else found[0]


def assigned(name: str, module: str) -> tuple[str, str] | None:
    """Find where a package assigns a name, and the docstring below."""
    inside = importlib.import_module(module).__file__ or ""
    root = Path(inside).parent if inside.endswith("__init__.py") else Path(inside)
    for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
        body = ast.parse(path.read_text("utf-8")).body
        for node, below in zip(body, [*body[1:], ast.Pass()], strict=True):
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if name in map(ast.unparse, targets):
                text = ""
                if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                    text = inspect.cleandoc(str(below.value.value))
                return module_of(path), text
    return None
