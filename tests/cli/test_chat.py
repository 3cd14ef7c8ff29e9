"""`jkv chat` on a terminal: what stops a reply, what ends, and the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import jkv
from jkv.cli import process
from jkv.decoding.generation import Generation

EIGHT = ("--max-new-tokens", "8")


@pytest.fixture
def terminal(run, tiny, monkeypatch) -> Callable[..., tuple[Any, str, str]]:
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
def replies(lm) -> Callable[..., list[str]]:
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


def test_the_banner_and_help_are_no_part_of_the_replies(terminal, tiny):
    status, out, err = terminal("/help")
    assert (status, out) == (0, "")
    banner, help, *end = err.split("\n")
    assert tiny in banner
    for command in ("/reset", "/help", "/quit", "Ctrl-C", "Ctrl-D"):
        assert command in banner
        assert command in help
    assert help in banner
    assert end == ["", ""], "the prompt's line is ended"


def test_unknown_commands_are_refused(terminal, run, tiny, say, replies):
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


def test_a_pipe_gets_replies_alone(run, tiny, say, replies):
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


def test_without_a_template_the_command_for_plain_prompts_is_named(run, mute):
    status, out, err = run("chat", "--model", mute)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"`jkv generate --model {mute} TEXT` continues a plain prompt" in err


def test_chat_from_a_pipe(run, tiny, lm, say):
    arguments = ["chat", "--model", tiny, "--system", "Hear.", "--max-new-tokens", "8"]
    say("he who\n\nwhy\n/reset\nhe who\n/quit\nnot any more\n")
    status, out, err = run(*arguments)
    chat = jkv.Chat(lm, system="Hear.", max_new_tokens=8)
    first, second = chat.send("he who"), chat.send("why")
    assert (status, err) == (0, "")
    assert out == f"{first}\n{second}\n{first}\n"


def test_chat_samples_with_the_seed(run, tiny, lm, say):
    heard = []
    for seed in ("3", "3", "4"):
        say("he who\nwhy\n")
        arguments = ["--max-new-tokens", "8", "--temperature", "2", "--seed", seed]
        heard.append(run("chat", "--model", tiny, *arguments)[1])
    assert heard[0] == heard[1] != heard[2]


def test_chat_with_a_full_context(run, tiny, say):
    many = "".join(f"{i}\n" for i in range(12))
    arguments = ["chat", "--model", tiny, "--max-new-tokens", "30"]
    say(many)
    assert run(*arguments)[0] == 0
    say(many)
    status, _, err = run(*arguments, "--on-full", "raise")
    assert status == 2
    assert "more than the context of 128" in err
    assert err.count("\n") == 1


def test_chat_on_a_terminal_survives_what_cannot_be_said(run, tiny, monkeypatch):
    lines = iter(["x" * 200, "he who"])

    def typed(prompt: str) -> str:
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status, out, err = run("chat", "--model", tiny, "--max-new-tokens", "8")
    assert status == 0
    assert "shorten the text" in err
    assert out.count("\n") == 1


def test_chat_without_a_template(run, mute, say):
    say("hello\n")
    status, out, err = run("chat", "--model", mute)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "no chat template" in err
    assert run("generate", "--model", mute, "--prompt", "x", "--max-new-tokens", "2")[0] == 0
