"""A process that was forked after JAX had started: say so, where JAX would hang.

JAX's threads are not in the child, and a program that waits for them waits for ever.
"""

from __future__ import annotations

import os

_started = False  # something here has used JAX
_forked = False  # in a parent of this process


def _in_child() -> None:
    global _forked
    _forked = _forked or _started


os.register_at_fork(after_in_child=_in_child)


def check_fork() -> None:
    """Refuse to run JAX in a child that was forked after its parent had used it.

    Raises:
        RuntimeError: it was.
    """
    global _started
    if _forked:
        raise RuntimeError(
            "this process was forked after JAX had started, and JAX hangs in such a child; start "
            "it by multiprocessing.get_context('spawn'), and load the model there"
        )
    _started = True
