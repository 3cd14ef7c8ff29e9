"""What all notebooks have in common; that they run on Colab too is tested in test_colab.py."""

from __future__ import annotations

import ast
import copy
import os

import nbformat
import pytest
from nbclient import NotebookClient

import notebooks as script
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = ("04_kernels", "06_store")  # the others: test_colab.py


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook, directory, kernel="python3"):
    """Run it from top to bottom, and check what it shows: no warning, and one picture."""
    where = {"metadata": {"path": str(directory)}}
    NotebookClient(notebook, timeout=300, kernel_name=kernel, resources=where).execute()
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert outputs[0].text.startswith("jkv ")  # what it runs on


def test_there_are_notebooks():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers == [f"{i:02}" for i in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) >= 6


def test_stored_clean(notebook):
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in code_of(notebook))


def test_begins_as_all_do(notebook, path):
    wanted = copy.deepcopy(notebook)
    script.begin(wanted, path)
    found = [cell.source for cell in notebook.cells[:2]]
    assert found == [cell.source for cell in wanted.cells[:2]], "run python scripts/notebooks.py"


def test_the_badge_leads_to_the_notebook(notebook, path):
    target = notebook.cells[0].source.splitlines()[0].rpartition("](")[2].rstrip(")")
    assert target.startswith("https://colab.research.google.com/github/")
    owner, name, blob, branch, *file = target.split("/github/")[1].split("/")
    assert f'"https://github.com/{owner}/{name}"' in (ROOT / "pyproject.toml").read_text()
    assert (blob, branch) == ("blob", "main")
    assert ROOT.joinpath(*file) == path


def test_the_setup_is_short():
    assert len(list(filter(None, script.SETUP.splitlines()))) <= 20


def test_code_is_public_and_draws_one_picture(notebook):
    trees = [ast.parse(cell.source) for cell in code_of(notebook)]  # and no magic of IPython
    nodes = [node for tree in trees for node in ast.walk(tree)]
    attributes = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [
        alias.name
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    private = [name for name in attributes if name.startswith("_")]
    private += [name for name in modules if any(p.startswith("_") for p in name.split("."))]
    assert not private
    assert attributes.count("show") == 1


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem in QUICK], ids=lambda p: p.stem)
def test_notebook_runs(notebook, monkeypatch, tmp_path):
    # The kernel is a process of its own: it must find this repository, and offline at that.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    execute(notebook, tmp_path)
