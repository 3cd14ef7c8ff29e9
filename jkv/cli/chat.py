"""`jkv chat`: turns from the terminal or a pipe."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from jkv._text import brief
from jkv.cli import options, process
from jkv.cli.errors import complain, is_ours
from jkv.errors import UnsupportedError

if TYPE_CHECKING:
    from jkv import Chat


def chat(
    model: options.Model = "shakespeare",
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Per reply; by default 256, or half the context.")
    ] = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.Penalty = None,
    presence_penalty: options.Presence = None,
    frequency_penalty: options.Frequency = None,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    cache: options.CacheSpec = "dense",
    dtype: options.Dtype = None,
    ignore: options.Ignore = None,
    on_full: Annotated[
        str, typer.Option(help="When the context is full: drop the oldest turns, or raise.")
    ] = "drop",
) -> None:
    """Talk to a model, one line per turn; /help lists the commands.

    Ctrl-C stops a reply; the conversation is then as it was before that turn, without the half
    reply. At the empty prompt Ctrl-C ends, as /quit and Ctrl-D do. From a pipe each line is a turn,
    and Ctrl-C ends.
    """
    import jkv
    from jkv.cache.spec import parse

    kind = parse(cache)
    drawing = options.drawing(
        temperature=temperature,
        seed=seed,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    lm = process.load(model, dtype, ignore)
    if max_new_tokens is None:
        max_new_tokens = min(256, max(1, lm.config.context // 2))
    if lm.tokenizer is not None and "default" not in lm.tokenizer.templates:
        raise UnsupportedError(
            f"{model} has no chat template, so it was not made for turns; "
            f"`jkv generate --model {model} TEXT` continues a plain prompt"
        )
    talk = jkv.Chat(
        lm,
        system=system,
        max_new_tokens=max_new_tokens,
        cache=kind,
        stop=stop or None,
        on_full=cast(Literal["raise", "drop"], on_full),  # Chat refuses others
        **drawing,
    )
    if isinstance(sys.stdin, io.TextIOWrapper):
        # What its encoding lacks is told apart line by line, and need not end the conversation.
        sys.stdin.reconfigure(errors="surrogateescape")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        note(f"{lm.source}, cache {cache}. {_HELP}")
    for line in _lines(terminal):
        if line == "/quit":
            return
        try:
            if line == "/reset":
                talk.reset()
            elif line == "/help":
                note(_HELP)
            else:
                _reply(talk, _parse(line))
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(flush=True)
            note("stopped; the conversation goes on from before this turn")
        except ValueError as error:
            # On a terminal the user can say it in other words; the conversation is as it was.
            if not terminal or not is_ours(error):
                raise
            complain(str(error))


_HELP = (
    "/reset begins anew, /help shows this, /quit or Ctrl-D ends, Ctrl-C stops a reply; "
    "a message that begins with / is written with //"
)


def note(text: str) -> None:
    """Write a note to the terminal; standard output is for replies alone."""
    print(text, file=sys.stderr, flush=True)


def _parse(line: str) -> str:
    """Return the message that a line stands for.

    Raises:
        ValueError: a command that there is not, or a line that is no text.
    """
    try:
        # As UTF-8 where standard input has an encoding that lacks what was written to it.
        line = line.encode(errors="surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"got a line that is no text in UTF-8: {error}") from error
    if re.fullmatch(r"/\w*(\s.*)?", line):
        raise ValueError(f"got {brief(line)}; expected one of these commands: {_HELP}")
    return line.removeprefix("/") if line.startswith("//") else line


def _reply(talk: Chat, text: str) -> None:
    """Print the reply as it comes."""
    pieces = talk.stream(text)
    first = not any(message["role"] == "assistant" for message in talk.messages)
    with process.spinner("compiling" if first else "reading"):
        # In the first turn also until the second piece: the program for it is compiled after the
        # first, and a line that has begun leaves no room for a spinner.
        begin = list(itertools.islice(pieces, 2 if first else 1))
    for piece in itertools.chain(begin, pieces):
        print(piece, end="", flush=True)
    print(flush=True)


def _lines(terminal: bool) -> Iterator[str]:
    """Yield what is typed, without empty lines, until the input ends.

    Raises:
        KeyboardInterrupt: Ctrl-C at an empty prompt; on a line that has begun it drops the line.
    """
    typed: Callable[[], str] = str
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # input() edits lines with it

            typed = readline.get_line_buffer
    while True:
        try:
            line = input("> ") if terminal else next(sys.stdin)
        except (EOFError, StopIteration):
            if terminal:
                note("")
            return
        except KeyboardInterrupt:
            if terminal:
                note("")
            if not typed():
                raise
            continue
        if line.strip():
            yield line.strip()
