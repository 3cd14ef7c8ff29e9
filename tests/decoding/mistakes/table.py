"""Tables of mistakes, and what must be true of each: our error, a short message that matches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

PROMPTS = [[1, 2, 3], [4, 5]]

# What is wrong; keywords, or a function of the `world` that makes them or calls; error; message.
Row = tuple[str, Any, type[Exception], str]


def table(rows: list[Row]) -> Any:
    """Parametrise a test by the rows of a table."""
    names = [name for name, *_ in rows]
    assert len(set(names)) == len(names), "each mistake has a name of its own"
    return pytest.mark.parametrize(
        ("how", "error", "message"), [pytest.param(*row, id=name) for name, *row in rows]
    )


def keywords(world: Any, how: Any) -> dict[str, Any]:
    """The keywords of a row."""
    return how(world) if callable(how) else how


def refuse(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """See a call refused."""
    with pytest.raises(error, match=message) as caught:
        call()
    # Ours, and not a subclass by chance from somewhere deep: the last frame is jkv's.
    assert "jkv" in str(caught.traceback[-1].path), caught.traceback[-1]
    assert len(str(caught.value)) < 400
