"""Interrupts at chosen places: a `KeyboardInterrupt` before the n-th line or bytecode."""

from __future__ import annotations

import dis
import sys
from pathlib import Path
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
    """

    def __init__(self, at: int, inside: tuple[str, ...] = ("/engine/",), bytecodes: bool = True):
        self.left, self.count, self.where, self.genuine = at, 0, "", False
        self._inside, self._bytecodes = inside, bytecodes

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
        if event in ("line", "opcode"):
            self.count += 1
            if self.left == 0:
                code = frame.f_code
                self.where = (
                    f"{code.co_filename}:{frame.f_lineno} {code.co_qualname} {frame.f_lasti}"
                )
                self.genuine = _genuine(code, frame.f_lasti)
                sys.settrace(None)
                frame.f_trace = None
                raise KeyboardInterrupt
            self.left -= 1
        return self._passed


def _genuine(code: Any, offset: int) -> bool:
    """Whether Python could have raised a signal's exception before the instruction there.

    It raises at the end of a call, still within the `with` that the call is in, of which the
    instruction after it (SWAP, where the call's value is returned) is no part any more.
    """
    there = [i for i in dis.get_instructions(code) if i.offset <= offset]
    before = there[-2].opname if len(there) > 1 else "RESUME"
    return there[-1].opname != "SWAP" and before.startswith(("CALL", "RESUME"))
