"""What the tests of the command line share: a tiny checkpoint, and the command in this process."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

import jkv
from jkv.cli import main
from tests.cli.commands import write_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="session")
def mute(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Without a chat template."""
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "mute", template=None)


@pytest.fixture(scope="session")
def lm(tiny: str) -> jkv.LM:
    return jkv.load(tiny)


@pytest.fixture
def run(capsys: Any, monkeypatch: Any) -> Any:
    """Runs the command: its status, standard output and standard error."""
    # The command keeps compiled programs on disk; that setting must not outlive it in this process.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")

    def run(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(list(arguments))
        heard = capsys.readouterr()
        return exit.value.code, heard.out, heard.err

    return run


@pytest.fixture
def say(monkeypatch: Any) -> Any:
    """Sets what comes through the pipe."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))
