"""The notebooks' first cell: where it gets jkv from, what it leaves alone, and what it says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import jax
import jaxlib
import numpy
import pytest

import jkv
import notebooks
from tests.conftest import ROOT

HERE = {f"{m.__name__}=={m.__version__}" for m in (jax, jaxlib, numpy)}


class Pip:
    """Stands in for the process that installs."""

    def __init__(self, returncode=0):
        self.wanted, self.returncode = None, returncode
        self.stderr = "Cannot install jkv-jax and jax==0.6.0" if returncode else ""

    def __call__(self, arguments, **_):
        assert self.wanted is None
        assert arguments[:4] == [sys.executable, "-m", "pip", "install"]
        self.wanted = arguments[5:]
        return self


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the cell in a directory where modules are missing; gives what it prints."""
    there = importlib.util.find_spec

    def run(directory, pip=None, missing=()):
        monkeypatch.chdir(directory)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name in missing else there(name)
        )
        if pip is not None:
            monkeypatch.setattr(subprocess, "run", pip)
        exec(notebooks.SETUP, {})
        return capsys.readouterr().out

    return run


def test_nothing_is_installed_where_jkv_is(run, tmp_path):
    pip = Pip()
    assert run(tmp_path, pip) == jkv.about() + "\n"
    assert pip.wanted is None


@pytest.mark.parametrize("missing", ["jkv", "matplotlib"])
def test_in_a_clone(run, missing):
    pip = Pip()
    assert run(ROOT / "notebooks", pip, [missing]) == jkv.about() + "\n"
    assert pip.wanted[:2] == ["-e", f"{ROOT}[plot]"]
    assert set(pip.wanted) >= HERE
    assert sys.path[-1] == str(ROOT)


def test_from_the_index(run, tmp_path):
    pip = Pip()
    assert run(tmp_path, pip, ["jkv"]) == jkv.about() + "\n"
    assert pip.wanted[0] == "jkv-jax[plot]"
    assert set(pip.wanted) >= HERE
    pinned = {name.partition("==")[0] for name in pip.wanted[1:]}
    assert "flax" in pinned
    assert not pinned & {"jaxtyping", "optax", "matplotlib"}  # these may get newer


def test_a_refusal_says_why(run, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)Cannot install .*jax==0\.6\.0.*let pip change"):
        run(tmp_path, Pip(returncode=1), ["jkv"])


def test_an_unused_gpu_is_said(run, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho Tesla T4\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert "UNUSED: Tesla T4" in run(tmp_path)
