"""Interrupts at chosen places: a `KeyboardInterrupt` before the n-th line or bytecode."""

from __future__ import annotations

import dis
import functools
import sys
from itertools import pairwise
from pathlib import Path
from types import CodeType
from typing import Any

import jkv

PACKAGE = str(Path(jkv.__file__).parent)


class Interrupt:
    """Raise `KeyboardInterrupt` before the n-th event in the watched files, once.

    Python itself delivers a signal between two bytecodes, at fewer places than these: `genuine`
    says whether this was one, the end of a call or the beginning of a function.

    Args:
        at: which event, from 0; negative for none, to count them.
        inside: parts of what is watched: of files' names or, after them, of functions'.
        bytecodes: every bytecode is an event, and not only every line.
        signals: of the bytecodes only those before which Python delivers a signal.
    """

    def __init__(
        self,
        at: int,
        inside: tuple[str, ...] = ("/engine/",),
        bytecodes: bool = True,
        signals: bool = False,
    ):
        self.left, self.count, self.where, self.genuine = at, 0, "", False
        self._inside, self._bytecodes, self._signals = inside, bytecodes, signals

    def __enter__(self) -> Interrupt:
        if not self.where:
            # From Python 3.12 on a trace begins with opcodes or has none.
            sys._getframe().f_trace_opcodes = self._bytecodes
            sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _called(self, frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        full = f"{name}:{frame.f_code.co_qualname}"
        if not name.startswith(PACKAGE) or not any(part in full for part in self._inside):
            return None
        frame.f_trace_opcodes = self._bytecodes
        frame.f_trace_lines = not self._bytecodes
        return self._passed

    def _passed(self, frame: Any, event: str, argument: Any) -> Any:
        code, offset = frame.f_code, frame.f_lasti
        if event not in ("line", "opcode"):
            return self._passed
        if self._signals and offset not in _signalled(code):
            return self._passed
        self.count += 1
        if self.left == 0:
            self.where = f"{code.co_filename}:{frame.f_lineno} {code.co_qualname} {offset}"
            self.genuine = offset in _signalled(code)
            sys.settrace(None)
            frame.f_trace = None
            raise KeyboardInterrupt
        self.left -= 1
        return self._passed


@functools.cache
def _signalled(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions before which Python may raise a signal's exception.

    It raises at a jump backwards, and at the end of a call: still within the `with` that the call
    is in, of which the instruction after it (SWAP, where the call's value is returned) is no part
    any more.
    """
    return frozenset(
        this.offset
        for before, this in pairwise(dis.get_instructions(code))
        if "JUMP_BACKWARD" in this.opname
        or (this.opname != "SWAP" and before.opname.startswith(("CALL", "RESUME")))
    )
