"""What the command line shows to people: help that fits, prompts without an option, sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer

import jkv
from jkv import _tables as tables
from jkv.cli import app, options, process
from tests.cli.commands import NINE


def commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The names of all commands, and of what holds them."""
    names = getattr(group, "commands", {})
    return [path, *(c for name in names for c in commands(names[name], (*path, name)))]


COMMANDS = commands(typer.main.get_command(app))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_into_80_columns(run, monkeypatch, path):
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


def test_prompts_need_no_option(run, tiny):
    plain = run("generate", "--model", tiny, "--prompt", "he wo", *NINE)[1]
    for arguments in (["he wo", "--model", tiny, *NINE], ["--model", tiny, *NINE, "he wo"]):
        assert run("generate", *arguments)[1] == plain
    arguments = ["x", "--model", tiny, "--prompt", "he wo", "--prompt", "x", *NINE, "--json", "he"]
    outputs = json.loads(run("generate", *arguments)[1])["outputs"]
    assert [output["prompt"] for output in outputs] == ["x", "he", "he wo", "x"]
    status, out, err = run("generate", "x", "y", "--stream", "--model", tiny)
    assert (status, out) == (2, "")
    assert "--stream shows one text" in err


def test_nothing_is_written_before_the_first_token(run, tiny, monkeypatch, capsys):
    """A bar on the same terminal would be drawn over a prompt."""
    written = []
    start = jkv.decoding.generation.Generation.__init__

    def begun(self: Any, *arguments: Any) -> None:
        written.append(capsys.readouterr().out)
        start(self, *arguments)

    monkeypatch.setattr(jkv.decoding.generation.Generation, "__init__", begun)
    out = run("generate", "--model", tiny, "he wo", "--stream", *NINE)[1]
    assert written == [""]
    assert out.startswith("he wo")


def test_one_token_is_no_plural(run, tiny):
    err = run("generate", "--model", tiny, "x", "--max-new-tokens", "1")[2]
    assert err.startswith("1 prompt token in ")
    assert ", 1 generated in " in err
    out = run("plan", "--model", tiny, "--seq-len", "1", "--cache", "dense")[1]
    assert "1 row of 1 token\n" in out
    assert "1 tokens" not in out


def test_windows_say_how_much_they_have_room_for(run, tiny):
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


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1024.0 KiB"),
        (1024**2, "1.0 MiB"),
        (5 * 1024**5, "5120.0 TiB"),
    ],
)
def test_sizes_for_people(count, shown):
    assert process.size(count) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (1234567, "1.23 M")],
)
def test_operations_for_people(count, shown):
    assert tables.operations(count) == shown


def test_columns():
    rows = [["key", "of", "size"], ["a", "you", "10"], ["long one", "anybody"]]
    assert tables.columns(rows, left=2) == ["key  of   size", "a    you    10", "long one  anybody"]
    assert tables.columns(rows)[1] == "a    you    10"
    assert tables.columns([["a", "b"], ["xx", "1"], ["x", "22"]]) == ["a    b", "xx   1", "x   22"]
    assert tables.columns([["a", "b"], ["x", "22"]], left=2) == ["a  b", "x  22"]


def test_penalties_come_before_what_scales_logits():
    sampling = jkv.sampling
    made = options.drawing(1.5, 3, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2)[
        "sampler"
    ]
    assert made == sampling.chain(
        sampling.repetition_penalty(1.2),
        sampling.temperature(1.5),
        sampling.top_k(40),
        sampling.top_p(0.9),
        sampling.min_p(0.01),
    )


def test_a_chat_leaves_half_the_context_to_the_prompt(run, tiny, monkeypatch):
    asked = {}

    def chat(_: Any, **keywords: Any) -> Any:
        asked.update(keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(jkv, "Chat", chat)
    assert run("chat", "--model", tiny)[0] == 130
    assert asked["max_new_tokens"] == 64
