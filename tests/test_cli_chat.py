"""`jkv chat` on a terminal: what stops a reply, what ends, and the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import jkv
from jkv.cli import process
from jkv.decoding.generation import Generation
from tests.test_cli import lm, mute, run, say, tiny  # noqa: F401

EIGHT = ("--max-new-tokens", "8")


@pytest.fixture
def terminal(run, tiny, monkeypatch) -> Callable[..., tuple[Any, str, str]]:  # noqa: F811
    """Runs the command on a terminal at which these lines are typed; exceptions are raised."""

    def typed(*lines: str | type[BaseException]) -> tuple[Any, str, str]:
        waiting: Iterator[Any] = iter([*lines, EOFError])

        def read(prompt: str) -> str:
            assert prompt == "> "
            line = next(waiting)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        return run("chat", "--model", tiny, *EIGHT)

    return typed


@pytest.fixture
def interrupt(monkeypatch) -> Callable[[int], None]:
    """Ctrl-C in one of the next turns, when its first token is there."""
    dispatch, waiting = Generation.dispatch, []

    def dispatched(self: Generation, steps: int) -> Any:
        if waiting and waiting.pop() == "now":
            raise KeyboardInterrupt
        return dispatch(self, steps)

    monkeypatch.setattr(Generation, "dispatch", dispatched)
    return lambda turn: waiting.extend(["now", *["later"] * (turn - 1)])


@pytest.fixture
def replies(lm) -> Callable[..., list[str]]:  # noqa: F811
    """What the model answers in one conversation."""

    def replies(*texts: str) -> list[str]:
        chat = jkv.Chat(lm, max_new_tokens=8)
        return [chat.send(text) for text in texts]

    return replies


def test_ctrl_c_stops_the_reply_and_keeps_the_rest(terminal, interrupt, replies):
    first, third = replies("he who", "why")
    interrupt(2)
    status, out, err = terminal("he who", "not this", "why")
    assert status == 0
    begun = out.removeprefix(f"{first}\n").removesuffix(f"{third}\n")
    assert out == f"{first}\n{begun}{third}\n"
    assert begun.endswith("\n")
    assert "stopped; the conversation goes on from before this turn" in err


def test_ctrl_c_in_the_first_turn(terminal, interrupt, replies):
    interrupt(1)
    status, out, _ = terminal("not this", "he who")
    assert (status, out.endswith(f"\n{replies('he who')[0]}\n")) == (0, True)


def test_ctrl_c_at_the_empty_prompt_ends(terminal, interrupt):
    status, out, err = terminal(KeyboardInterrupt, "he who")
    assert (status, out) == (130, "")
    assert err.endswith("\n")
    interrupt(1)
    assert terminal("he who", KeyboardInterrupt, "why")[0] == 130


def test_ctrl_c_drops_a_line_that_has_begun(terminal, monkeypatch, replies):
    readline = pytest.importorskip("readline")
    monkeypatch.setattr(readline, "get_line_buffer", lambda: "half a")
    status, out, _ = terminal(KeyboardInterrupt, "he who")
    assert (status, out) == (0, f"{replies('he who')[0]}\n")


def test_the_banner_and_help_are_no_part_of_the_replies(terminal, tiny):  # noqa: F811
    status, out, err = terminal("/help")
    assert (status, out) == (0, "")
    banner, help, *end = err.split("\n")
    assert tiny in banner
    for command in ("/reset", "/help", "/quit", "Ctrl-C", "Ctrl-D"):
        assert command in banner
        assert command in help
    assert help in banner
    assert end == ["", ""], "the prompt's line is ended"


def test_unknown_commands_are_refused(terminal, run, tiny, say, replies):  # noqa: F811
    status, out, err = terminal("/rest", "/quit now", "/", "he who")
    assert (status, out) == (0, f"{replies('he who')[0]}\n")
    for line in ("/rest", "/quit now", "/"):
        assert f"jkv: got '{line}'; expected one of these commands: /reset begins anew" in err
    say("/rest\nhe who\n")
    status, out, err = run("chat", "--model", tiny, *EIGHT)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "got '/rest'" in err


def test_a_message_may_begin_with_a_slash(terminal, replies):
    want = "".join(f"{reply}\n" for reply in replies("/he", "/etc/he is what"))
    assert terminal("//he", "/etc/he is what")[1] == want


def test_a_pipe_gets_replies_alone(run, tiny, say, replies):  # noqa: F811
    say("/help\nhe who\n")
    status, out, err = run("chat", "--model", tiny, *EIGHT)
    assert (status, out) == (0, f"{replies('he who')[0]}\n")
    assert err.startswith("/reset begins anew")
    assert err.count("\n") == 1, "no banner, no spinner"


def test_a_spinner_turns_while_programs_compile(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = terminal("he who", "why")
    assert status == 0
    assert err.index("compiling") < err.index("reading")
    assert "compiling" not in out


def test_nothing_turns_where_nobody_looks(capsys):
    with process.spinner("compiling") as stop:
        stop()
    assert capsys.readouterr() == ("", "")


def test_without_a_template_the_command_for_plain_prompts_is_named(run, mute):  # noqa: F811
    status, out, err = run("chat", "--model", mute)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"`jkv generate --model {mute} TEXT` continues a plain prompt" in err
