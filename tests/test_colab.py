"""Colab's Python and JAX: the first cell adds jkv and changes nothing, and every notebook runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile

import nbformat
import pytest

import notebooks
from tests.conftest import ROOT
from tests.test_notebooks import NOTEBOOKS, execute

pytestmark = [pytest.mark.colab, pytest.mark.slow]

# What is there before the first cell runs (Colab, August 2026); others are as new as pip finds.
COLAB = ["jax==0.7.2", "jaxlib==0.7.2", "flax==0.11.2", "numpy==2.1.3", "matplotlib", "ipykernel"]


class Environment:
    """A virtual environment, and the processes that run in it."""

    def __init__(self, path, **variables):
        self.python = path / "bin" / "python"
        without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.variables = without | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | variables

    def run(self, *arguments, cwd=ROOT, check=True):
        done = subprocess.run(
            [self.python, *map(str, arguments)],
            cwd=cwd,
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stderr
        return done

    def setup(self, cwd, check=True):
        """Run the notebooks' first cell."""
        return self.run("-c", notebooks.SETUP, cwd=cwd, check=check)

    def freeze(self):
        """Everything that is installed, without jkv."""
        lines = self.run("-m", "pip", "freeze", "--all", "--exclude", "jkv-jax").stdout.split("\n")
        return {line for line in lines if line}


@pytest.fixture(scope="module")
def python():
    path = os.environ.get("JKV_COLAB_PYTHON") or shutil.which("python3.13")
    if path is None:
        pytest.fail("there is no Python 3.13: set JKV_COLAB_PYTHON=/path/to/python3.13")
    return path


@pytest.fixture(scope="module")
def original(python):
    """Colab's packages; made once, since it takes a minute."""
    path = ROOT / ".venv-colab-original"
    mark, wanted = path / "installed", "\n".join([python, *COLAB])
    if not mark.exists() or mark.read_text() != wanted:
        shutil.rmtree(path, ignore_errors=True)
        subprocess.run([python, "-m", "venv", path], check=True)
        Environment(path).run("-m", "pip", "install", "-q", *COLAB)
        mark.write_text(wanted)
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory, python):
    """A directory with jkv's wheel, as pip finds it on an index."""
    where = tmp_path_factory.mktemp("index")
    build = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", where, ROOT]
    subprocess.run(build, check=True)
    return where


@pytest.fixture(scope="module")
def colab(original, index):
    """Colab to which the first cell added jkv, what was there before, and what the cell printed."""
    yield from added(original, "added", index, PIP_FIND_LINKS=str(index))


def added(original, name, cwd, **variables):
    path = original.with_name(f".venv-colab-{name}")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(original, path, symlinks=True, copy_function=os.link)
    environment = Environment(path, **variables)
    before = environment.freeze()
    yield environment, before, environment.setup(cwd).stdout
    shutil.rmtree(path)


def check_setup(colab):
    """Everything that was installed still is, in the same version, and one line says what runs."""
    environment, before, printed = colab
    assert set(COLAB[:4]) <= before
    assert before <= environment.freeze()
    (line,) = printed.splitlines()
    assert line.startswith("jkv ")
    assert "JAX 0.7.2 on cpu; attention in float32: xla" in line


def test_from_an_index(colab):
    check_setup(colab)
    assert "site-packages" in colab[0].run("-c", "import jkv; print(jkv.__file__)", cwd="/").stdout


def test_from_a_clone(original):
    for cloned in added(original, "cloned", ROOT / "notebooks"):
        check_setup(cloned)
        found = cloned[0].run("-c", "import jkv; print(jkv.__file__)", cwd="/").stdout
        assert found.strip() == str(ROOT / "jkv" / "__init__.py")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, colab, monkeypatch, tmp_path):
    environment = colab[0]
    arguments = [str(environment.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = tmp_path / "kernels" / "colab" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(
        json.dumps({"argv": arguments, "display_name": "Colab", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    execute(nbformat.read(path, as_version=4), tmp_path, kernel="colab")


def test_an_older_jax_is_refused_and_stays(python, index, tmp_path):
    wheel = tmp_path / "jax-0.6.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        about = "jax-0.6.0.dist-info"
        file.writestr("jax/__init__.py", "")
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: jax\nVersion: 0.6.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    subprocess.run([python, "-m", "venv", tmp_path / "old"], check=True)
    old = Environment(tmp_path / "old", PIP_FIND_LINKS=str(index))
    old.run("-m", "pip", "install", "-q", wheel)
    before = old.freeze()
    done = old.setup(tmp_path, check=False)
    assert done.returncode
    assert "RuntimeError: pip cannot add jkv to this JAX" in done.stderr
    assert "jax==0.6.0" in done.stderr
    assert old.freeze() == before
