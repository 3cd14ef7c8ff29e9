"""Count operations instead of seconds: the same number on a busy machine as on an idle one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def bytecodes(run: Callable[[], object]) -> int:
    """Return how many bytecodes of Python `run` executes; what runs in C counts as one."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # from 3.12 on a trace begins with opcodes or has none
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count
