"""What a user meets first: the README's examples, the metadata, what is in the package."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jkv
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_readme_has_an_example_of_a_screen():
    assert EXAMPLES
    assert all(len(example.splitlines()) <= 30 for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_readme_example_runs_as_written(example, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # it keeps caches in a directory
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["out"].tokens.shape == (2, 32)
    assert names["more"].tokens.shape == (2, 16)
    assert names["rolled"].tokens.shape == (1, 8)
    assert [len(request.tokens) for request in names["requests"]] == [32, 32]
    written = capsys.readouterr().out
    story = names["lm"].decode(names["more"].history[0])
    assert story in written  # the results' texts join to it
    assert all(repr(request.text) in written for request in names["requests"])
    assert repr(names["lm"].decode(names["rolled"].tokens)) in written


def test_files_that_the_readme_names_are_there():
    named = set(re.findall(r"`((?:jkv|scripts|notebooks)/[\w/.]+)`", README))
    named |= set(re.findall(r"\]\(([\w/.]+)\)", README))
    named |= set(re.findall(r"bash (\S+)", README))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_version_is_one_and_the_changelog_has_it():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["version"]
    assert f'"{jkv.__version__}"' in (ROOT / build["path"]).read_text()
    assert f"## {jkv.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_import_is_light():
    """`import jkv` must not wait for JAX."""
    code = "import sys, jkv; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_comparisons_are_no_dependency():
    """What is there to compare with is in an extra of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["test"]]
    compared = ("torch", "transformers", "cachetools", "diskcache")
    assert not [name for name in needed if name.startswith(compared)]
    assert {re.split("[>=]", name)[0] for name in extras["compare"]} == set(compared)
    assert {"test", "dev", "plot", "cuda13", "tpu", "compare"} <= extras.keys()
    imports = re.compile(rf"^\s*(?:import|from) ({'|'.join(compared)})\b", re.MULTILINE)
    assert not [p for p in Path(jkv.__file__).parent.rglob("*.py") if imports.search(p.read_text())]


def test_package_data_is_small():
    """The built-in model is in the package, within its limit."""
    data = ROOT / "jkv" / "data" / "shakespeare"
    sizes = {path.name: path.stat().st_size for path in data.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= sizes.keys()
    assert sum(sizes.values()) <= 8 << 20
    assert (ROOT / "jkv" / "py.typed").exists()
