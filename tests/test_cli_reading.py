"""What the command line shows to people: help that fits, prompts without an option, sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer

import jkv
from jkv.cli import app
from tests.test_cli import NINE, lm, run, tiny  # noqa: F401


def commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The names of all commands, and of what holds them."""
    names = getattr(group, "commands", {})
    return [path, *(c for name in names for c in commands(names[name], (*path, name)))]


COMMANDS = commands(typer.main.get_command(app))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_into_80_columns(run, monkeypatch, path):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(*path, "--help")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines[1:] if line.endswith("...")], "a sentence is cut off"
    assert "\u2026" not in out, "an option is cut off"
    assert len(lines) < 60, "descriptions have no room beside the names"
    assert "<bool>" not in out


def test_all_commands_are_there():
    assert ("generate",) in COMMANDS
    assert ("store", "simulate") in COMMANDS
    assert len(COMMANDS) > 10


def test_prompts_need_no_option(run, tiny):  # noqa: F811
    plain = run("generate", "--model", tiny, "--prompt", "he wo", *NINE)[1]
    for arguments in (["he wo", "--model", tiny, *NINE], ["--model", tiny, *NINE, "he wo"]):
        assert run("generate", *arguments)[1] == plain
    arguments = ["x", "--model", tiny, "--prompt", "he wo", "--prompt", "x", *NINE, "--json", "he"]
    outputs = json.loads(run("generate", *arguments)[1])["outputs"]
    assert [output["prompt"] for output in outputs] == ["x", "he", "he wo", "x"]
    status, out, err = run("generate", "x", "y", "--stream", "--model", tiny)
    assert (status, out) == (2, "")
    assert "--stream shows one text" in err


def test_nothing_is_written_before_the_first_token(run, tiny, monkeypatch, capsys):  # noqa: F811
    """A bar on the same terminal would be drawn over a prompt."""
    written = []
    start = jkv.decoding.run.Run.__init__

    def begun(self: Any, *arguments: Any) -> None:
        written.append(capsys.readouterr().out)
        start(self, *arguments)

    monkeypatch.setattr(jkv.decoding.run.Run, "__init__", begun)
    out = run("generate", "--model", tiny, "he wo", "--stream", *NINE)[1]
    assert written == [""]
    assert out.startswith("he wo")


def test_one_token_is_no_plural(run, tiny):  # noqa: F811
    err = run("generate", "--model", tiny, "x", "--max-new-tokens", "1")[2]
    assert err.startswith("1 prompt token in ")
    assert ", 1 generated in " in err
    out = run("plan", "--model", tiny, "--seq-len", "1", "--cache", "dense")[1]
    assert "1 row of 1 token\n" in out
    assert "1 tokens" not in out


def test_windows_say_how_much_they_have_room_for(run, tiny):  # noqa: F811
    plan = ("plan", "--model", tiny, "--seq-len", "100")
    out = run(*plan, "--cache", "window:60")[1]
    (line,) = [line for line in out.splitlines() if line.startswith("cache  ")]
    assert line.endswith("0 per token, room for 60 from the start")
    out = run(*plan, "--cache", "dense", "--cache", "window:60", "--cache", "window:300")[1]
    assert out.endswith("\n\nroom for more tokens than the rows have:\n  window:300: for 300\n")
    out = run(*plan, "--cache", "dense", "--cache", "window:60")[1]
    assert "room" not in out
    out = run("caches", "--model", tiny)[1]
    assert "\n  window:1024: for 1,024\n" in out
