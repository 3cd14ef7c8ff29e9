"""The command `jkv`: text from a checkpoint, a conversation, and what things take.

Everything heavy is imported inside the commands: `jkv --help` does not wait for JAX.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from jkv._version import __version__
from jkv.cli.caches import caches
from jkv.cli.chat import chat
from jkv.cli.engine import engine
from jkv.cli.errors import complain, is_ours
from jkv.cli.generate import generate
from jkv.cli.info import info
from jkv.cli.plan import plan
from jkv.cli.score import score
from jkv.cli.store import store
from jkv.errors import JkvError

app = typer.Typer(
    name="jkv", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
for command in (generate, chat, score, engine, info, plan, caches):
    app.command()(command)
app.add_typer(store)

# Some versions of typer bring a copy of click; this is the base of usage errors in either.
_UsageError: type[Exception] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)


def _show_version(wanted: bool) -> bool:
    if wanted:
        print(f"jkv {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _jkv(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Text from decoders, with the key/value cache of your choice."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0, 2 after an error of the user's, 130 after Ctrl-C."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _replace_what_cannot_be_written()
    try:
        return app(args=arguments or ["--help"], prog_name="jkv", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except _UsageError as error:
        return complain(_advice(error))
    except (JkvError, ValueError, TypeError) as error:
        if not is_ours(error):
            raise
        return complain(str(error))


def _replace_what_cannot_be_written() -> None:
    """Have standard output write "?" for characters that its encoding lacks.

    Anything else would lose a text that has been computed. Standard error does so by itself.
    """
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and out.errors in ("strict", "surrogateescape"):
        out.reconfigure(errors="replace")


def _advice(error: Any) -> str:
    """Return a usage error's message, and where to read on."""
    path = "jkv" if error.ctx is None else error.ctx.command_path
    message = error.format_message()
    end = "" if message.endswith((".", "?")) else "."
    return f"{message}{end} See '{path} --help'."


__all__ = ["app", "main"]
