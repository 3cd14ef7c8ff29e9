"""The notebooks run from top to bottom, and are stored without outputs that could grow stale."""

from __future__ import annotations

import os

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == [
        "01_quickstart.ipynb",
        "02_cache_zoo.ipynb",
        "03_long_context.ipynb",
        "04_kernels.ipynb",
        "05_pages_and_prefixes.ipynb",
        "06_store.ipynb",
        "07_your_own_model.ipynb",
    ]


def test_notebook_is_stored_clean_and_installs_itself(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert "find_spec" in code[0].source
    assert "%pip install" in code[0].source


@pytest.mark.slow
def test_notebook_runs(notebook, monkeypatch, tmp_path):
    # The kernel is a process of its own: it must find this repository, and offline at that.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert not any(out.get("name") == "stderr" for out in outputs)
    assert "image/png" in outputs[-1]["data"]
