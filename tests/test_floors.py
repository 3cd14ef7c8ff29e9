"""The house: imports point down, the words need no JAX, and what is public is there and described.

Read from the sources, so that a module nobody imports is checked too.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jkv

PACKAGE = Path(jkv.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOTS = ("jkv", "jkv.__main__")

# From the ground up; a package counts with all that is in it. What a floor may import is every
# floor below it and itself; the root names things for others and imports on first use only.
FLOORS = {
    "jkv._axes": 0,
    "jkv._bytes": 0,
    "jkv._checks": 0,
    "jkv._compat": 0,
    "jkv._description": 0,
    "jkv._fork": 0,
    "jkv._interop": 0,
    "jkv._probe": 0,
    "jkv._pytree": 0,
    "jkv._stored_names": 0,
    "jkv._tensorfile": 0,
    "jkv._tables": 0,
    "jkv._text": 0,
    "jkv._transfer": 0,
    "jkv._version": 0,
    "jkv.errors": 0,
    "jkv.ops": 1,
    "jkv.cache": 2,
    "jkv.models": 3,
    "jkv.testing": 3,
    "jkv.store": 3,
    "jkv.decoding": 4,
    "jkv.planning": 4,
    "jkv.engine": 5,
    "jkv.cli": 6,
}

# Where the bare class is caught, because a library raises nothing narrower.
BROAD = {
    "jkv.models.tokenizer_files": "tokenizers raises Exception itself",
    "jkv.engine.core": "whatever a device raises ends the requests of that step only",
    "jkv.engine.outputs": "a callback may raise anything, and ends its own request only",
    "jkv.engine.runner": "whatever a device raises ends the requests of that step only",
    "jkv.engine.scheduler": "a store may raise anything, and ends one request only",
    "jkv.engine.swap": "a store may raise anything, and what it keeps can be computed again",
}

# Where objects are of others' classes, and may lack what is looked for.
FOREIGN = {
    "jkv.cache.sharding": "whatever runs like a decoder is a model",
    "jkv.cache.fingerprint": "a configuration may hold a callable of any class",
    "jkv.cache.init": "a configuration may be a bare shape of any class",
    "jkv.cache.protocol": "what is no kind is asked what it would be, for the message",
    "jkv.cache.scores": "a score is a function, which may have an attribute",
    "jkv.cache.window": "a configuration may be a bare shape of any class",
    "jkv.cli.requests": "standard input may be any stream",
    "jkv.decoding.apply": "a user's transform may return anything",
    "jkv.decoding.draft": "a user's draft may return anything",
    "jkv.decoding.loop": "what is no decoder may have one, for the message",
    "jkv.decoding.prompts": "what has a decoder and perhaps a tokenizer is a model",
    "jkv.decoding.sampling": "a sampler may be any function",
    "jkv.decoding.transform": "a sampler may be any function",
    "jkv.planning.plan": "what has a configuration is a model",
    "jkv.store.entry": "a store of a user's own may be of any class",
}

# Where a panic of Rust is caught, which is no Exception; all else is raised again.
PANICS = ("jkv.models.tokenizer_files",)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_of(path: Path) -> str:
    parts = ("jkv", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int | None:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (floor := FLOORS.get(".".join(parts[:end]))) is not None:
            return floor
    return None


def imports_of(path: Path) -> set[str]:
    """Modules of jkv that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative
                package = module_of(path).split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([base] if base else [])])
            # `from jkv import ops` imports jkv.ops; `from jkv.ops import merge` jkv.ops only.
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name == "jkv" or name.startswith("jkv.")}


# The root and `python -m jkv` stand above all floors.
@pytest.mark.parametrize("path", [p for p in FILES if module_of(p) not in ROOTS], ids=module_of)
def test_every_module_stands_on_a_floor(path):
    assert floor_of(module_of(path)) is not None, f"say in FLOORS where {module_of(path)} stands"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    here = floor_of(module_of(path))
    above = {
        name: floor
        for name in imports_of(path)
        if (floor := floor_of(name)) is not None and here is not None and floor > here
    }
    assert not above, f"{module_of(path)} is on floor {here} and imports {above}"


def test_the_import_parser_sees_all_forms(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    file = tmp_path / "ops" / "bad.py"
    file.write_text(
        "import jkv.cli\nfrom jkv import models\nfrom jkv.cache.base import Step\n"
        "def f():\n    from ..decoding import loop\n"
    )
    seen = {floor_of(name) for name in imports_of(file)} - {None}
    assert seen == {2, 3, 4, 6}


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["jkv", "jkv.errors"])
def test_imports_without_jax(module):
    code = f"import sys, {module}; print('jax' in sys.modules, 'numpy' in sys.modules)"
    assert run_python(code) == "False False"


def test_errors_need_no_jax_at_all():
    # Not merely unused: importing JAX fails here.
    code = (
        "import sys; sys.modules['jax'] = None; import jkv.errors as e; print(e.JkvError.__name__)"
    )
    assert "JkvError" in run_python(code)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_assert_and_no_swallowing(path):
    for node in ast.walk(parse(path)):
        where = f"{module_of(path)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: users get errors, not assertions"
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            for kind in caught:
                name = "everything" if kind is None else ast.unparse(kind)
                if name == "Exception" and module_of(path) in BROAD:
                    continue
                if name == "BaseException" and module_of(path) in PANICS:
                    continue
                assert name not in ("everything", "Exception", "BaseException"), (
                    f"{where} catches {name}"
                )


def declared(package: str) -> list[Path]:
    return [path for path in FILES if module_of(path).startswith(f"{package}.")]


ASKED = [
    path
    for package in ("cache", "cli", "decoding", "engine", "planning", "store")
    for path in declared(f"jkv.{package}")
]


@pytest.mark.parametrize("path", ASKED, ids=module_of)
def test_what_is_asked_of_an_object_is_declared(path):
    """No `hasattr`, and no `getattr` with a default, on objects of our own."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            asked = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) > 2)
            where = f"{module_of(path)}:{node.lineno}"
            assert not asked or module_of(path) in FOREIGN, f"{where}: declare it in a base class"


# The libraries that differ between the versions that jkv runs on.
VERSIONED = ("jax", "jnp", "lax", "nnx", "flax", "pl", "plgpu", "pltpu", "mosaic_gpu")


def versions_asked(tree: ast.Module) -> list[int]:
    """Lines that ask for the version of a library, or whether it has an attribute."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("__version__", "__version_info__"):
            lines.append(node.lineno)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        of = ast.unparse(node.args[0]).split(".")[0].strip("'\"") if node.args else ""
        if name in ("metadata.version", "importlib.metadata.version", "version") or (
            (name == "hasattr" or (name == "getattr" and len(node.args) > 2)) and of in VERSIONED
        ):
            lines.append(node.lineno)
    return sorted(lines)


@pytest.mark.parametrize("path", [p for p in FILES if module_of(p) != "jkv._compat"], ids=module_of)
def test_versions_are_told_apart_in_one_module(path):
    lines = versions_asked(parse(path))
    assert not lines, f"{module_of(path)}:{lines}: what differs between versions is in jkv._compat"


def test_the_search_for_versions_sees_all_forms():
    forms = (
        "jax.__version_info__ < (0, 8)",
        "flax.__version__",
        "hasattr(nnx, 'List')",
        "getattr(jax.nn, 'x', None)",
        "importlib.metadata.version('jax')",
    )
    assert versions_asked(ast.parse("\n".join(forms))) == [1, 2, 3, 4, 5]
    assert versions_asked(ast.parse("hasattr(kind, 'init')\ngetattr(nnx, 'List')")) == []


# Errors form a tree, for `except`. Of the name of `jkv.ops.encoded` there is only a hint.
TREES = ("jkv.errors",)
NO_MODULES = ("jkv.__main__", "jkv.ops.encoded")


@pytest.mark.parametrize(
    "path", [p for p in FILES if module_of(p) not in NO_MODULES], ids=module_of
)
def test_classes_are_abstract_or_final(path):
    """What a class shares with another it has, or both implement: it inherits no implementation."""
    module = importlib.import_module(module_of(path))
    if module.__name__ in TREES:
        return
    for cls in vars(module).values():
        if isinstance(cls, type) and cls.__module__ == module.__name__:
            concrete = [
                base.__name__
                for base in cls.__bases__
                if base.__module__.startswith("jkv.")
                and not inspect.isabstract(base)
                and not getattr(base, "_is_protocol", False)
            ]
            assert not concrete, f"{cls.__name__} inherits from {concrete}, which is not abstract"


# The most parameters without a type, in percent; each may only go down.
UNTYPED = {
    "jkv": 3,
    "jkv.cache": 2,
    "jkv.cli": 2,
    "jkv.decoding": 2,
    "jkv.engine": 2,
    "jkv.models": 3,
    "jkv.ops": 3,
    "jkv.planning": 5,
    "jkv.store": 4,
}


@pytest.mark.parametrize("package", UNTYPED)
def test_parameters_have_types(package):
    """`Any` is for what is truly any, which an alias names."""
    typed, untyped = 0, []
    for path in FILES if package == "jkv" else declared(package):
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            for one in every:
                if one is None or one.arg in ("self", "cls"):
                    continue
                if one.annotation is None or ast.unparse(one.annotation) == "Any":
                    untyped.append(f"{module_of(path)}:{node.lineno} {node.name}({one.arg})")
                else:
                    typed += 1
    share = 100 * len(untyped) / (typed + len(untyped))
    assert share <= UNTYPED[package], f"{share:.1f} % of parameters have no type: {untyped}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_class_does_everything(path):
    """At most 30 methods: a larger class has parts that could be objects of their own."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ClassDef):
            methods = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            assert len(methods) <= 30, f"{node.name} has {len(methods)} methods"


def test_no_two_classes_share_a_name():
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module_of(path))
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


@pytest.mark.parametrize("name", jkv.__all__)
def test_public_names_resolve(name):
    assert getattr(jkv, name) is not None
    assert name in dir(jkv)


def test_unknown_names_raise():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jkv.nothing  # noqa: B018


# What is meant to be looked at: `dir` and completion show the public names, and nothing else.
LISTED = [
    "jkv",
    "jkv.cache",
    "jkv.cache.scores",
    "jkv.cache.spec",
    "jkv.decoding",
    "jkv.decoding.sampling",
    "jkv.engine",
    "jkv.errors",
    "jkv.models",
    "jkv.ops",
    "jkv.ops.attention",
    "jkv.planning",
    "jkv.store",
    "jkv.testing",
]


@pytest.mark.parametrize("name", LISTED)
def test_dir_shows_public_names(name):
    module = importlib.import_module(name)
    assert dir(module) == sorted(module.__all__)
    assert not [n for n in dir(module) if n.startswith("_") and n != "__version__"]
    assert not {"Any", "np", "jnp", "jax", "annotations"} & set(dir(module))


def test_errors_are_public():
    errors = jkv.errors
    raised = {
        n
        for n, v in vars(errors).items()
        if isinstance(v, type) and v.__module__ == errors.__name__
    }
    assert raised == set(errors.__all__)
    # Those of a store are its own; the others are what calls of `jkv` itself raise.
    assert raised - set(jkv.__all__) == {"CorruptError", "TierError"}


def test_names_in_texts_resolve_after_import_jkv():
    """Docstrings and messages tell of `jkv.testing.check_kind`: one import must do."""
    told = {
        name
        for path in [*FILES, PACKAGE.parent / "README.md"]
        for name in re.findall(r"`(jkv(?:\.\w+)+)[`(]", path.read_text())
    }
    modules = {module_of(path) for path in FILES}  # comments name inner ones, which stay inner
    told -= modules - set(LISTED)
    assert len(told) > 20
    code = (
        "import functools, jkv\nmissing = []\n"
        f"for name in {sorted(told | {'jkv.testing.check_kind', 'jkv.cache.spec.parse'})}:\n"
        "    try: functools.reduce(getattr, name.split('.')[1:], jkv)\n"
        "    except AttributeError: missing.append(name)\n"
        "print(missing)"
    )
    assert run_python(code) == "[]"


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=module_of)
def test_packages_list_what_is_public(path):
    module = importlib.import_module(module_of(path))
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_everything_public_is_described(path):
    """Every module, and every function, class and method whose name has no underscore."""
    tree = parse(path)
    assert ast.get_docstring(tree), f"{module_of(path)} has no docstring"

    def walk(node: ast.AST, prefix: str) -> list[str]:
        missing = []
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}{child.name}"
                public = not child.name.startswith("_")
                overload = any(ast.unparse(d).endswith("overload") for d in child.decorator_list)
                stated = any(
                    "D102" in line
                    for line in lines[child.lineno - 1 : child.body[0].end_lineno or child.lineno]
                )
                if public and not overload and not stated and not ast.get_docstring(child):
                    missing.append(name)
                if isinstance(child, ast.ClassDef) and public:
                    missing += walk(child, f"{name}.")
        return missing

    lines = path.read_text().splitlines()
    assert walk(tree, "") == []


def test_public_functions_describe_their_arguments():
    """What a user calls says what it raises, or cannot raise; the listed functions take input."""
    for name in ("generate", "init_cache", "from_legacy", "concat"):
        assert "Raises:" in (inspect.getdoc(getattr(jkv, name)) or ""), name
