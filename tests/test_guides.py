"""The guides "how to add ...": their code runs, and their changes to the library pass its tests.

In a guide, a block ```python is run as it stands. With a path behind it, it is a file of the
library; ```diff with a path is a change of one, in hunks that ``@@`` separates.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / "notebooks" / "guides").glob("*.md"))
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.M | re.S)


def blocks(guide: Path, language: str) -> list[tuple[str, str]]:
    """Paths, "" for none, and texts of the blocks in a language."""
    found = FENCE.findall(guide.read_text("utf-8"))
    return [(path, text) for name, path, text in found if name == language]


def changed(text: str, hunk: str) -> str:
    """A file after a hunk, whose old lines must be there once."""
    lines = hunk.splitlines(keepends=True)
    old, new = ("".join(line[1:] or "\n" for line in lines if line[0] in s) for s in (" -", " +"))
    if old == "" or text.count(old) != 1:
        raise AssertionError(f"these lines are in the file {text.count(old)} times:\n{old}")
    return text.replace(old, new)


def apply(guide: Path, tree: Path) -> list[str]:
    """Make a guide's changes in a copy of the library; the new files of tests."""
    for path, text in blocks(guide, "diff"):
        file = tree / path
        for hunk in re.split(r"^@@\n", text, flags=re.M):
            file.write_text(changed(file.read_text("utf-8"), hunk), encoding="utf-8")
    files = [(path, text) for path, text in blocks(guide, "python") if path]
    for path, text in files:
        assert not (tree / path).exists(), f"{path} is there already"
        (tree / path).write_text(text, encoding="utf-8")
    return [path for path, _ in files if path.startswith("tests/")]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A copy of the library with the changes of all guides, and their tests."""
    tree = tmp_path_factory.mktemp("library")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("jkv", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree, [test for guide in GUIDES for test in apply(guide, tree)]


def run_tests(tree: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_the_code_of_a_guide_runs(guide):
    own = [text for path, text in blocks(guide, "python") if not path]
    names: dict[str, object] = {"__name__": "guide"}
    exec(compile("\n".join(own), str(guide), "exec"), names)


def test_the_changes_pass_the_tests_of_what_they_change(tree):
    """Those of the guides, and those that run over the lists into which the guides write."""
    root, own = tree
    assert own
    lists = (
        "tests/store/test_policy.py",
        "tests/store/test_simulate.py::test_the_command_says_what_is_wrong",
        "tests/ops/test_attention.py::test_shapes",
        "tests/cache/test_testing.py::test_every_kind_passes[half]",
        "tests/test_every_kind.py::test_no_kind_is_left_out",
        "tests/test_every_kind.py::test_in_a_conversation_and_on_the_command_line[half]",
    )
    run_tests(root, *own, *lists, "-k", "not searches_through_all")


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
def test_the_changes_are_written_as_the_library_is(tree):
    root, _ = tree
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "jkv"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.compare
def test_the_new_family_is_transformers_(tree):
    root, _ = tree
    run_tests(root, "-m", "compare", "tests/compare/test_models.py", "-k", "stablelm")


def test_a_hunk_must_fit():
    assert changed("a\nb\nc\n", " b\n+d\n") == "a\nb\nd\nc\n"
    assert changed("a\nb\n", "-a\n") == "b\n"
    with pytest.raises(AssertionError, match="0 times"):
        changed("a\n", " b\n+c\n")
    with pytest.raises(AssertionError, match="2 times"):
        changed("a\na\n", " a\n+c\n")
