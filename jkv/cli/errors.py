"""Errors of the user's, told apart from ours, and shown in one line."""

from __future__ import annotations

import sys
import traceback

from jkv.errors import JkvError


def is_ours(error: Exception) -> bool:
    """Tell whether a check of this package raised an error: all else is a bug to be seen."""
    if isinstance(error, JkvError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").split(".")[0] == "jkv"


def complain(message: str) -> int:
    """Write a message as one line on standard error; the exit status that goes with it."""
    print(f"jkv: {' '.join(message.split())}", file=sys.stderr)
    return 2
