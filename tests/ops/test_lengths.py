"""What is filled and what is asked for are two things, in every implementation for a CPU."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops import calls
from tests.ops.cached import Case, close, drawn

CASES = {
    "fewer filled than asked": Case((5, 63, 130), ahead=(7, 1, 40), new=2),
    "more filled than asked": Case((130, 192, 100), ahead=(-70, -129, -1)),
    "codes": Case((63, 129), form="int8", ahead=(2, -30)),
}


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_lengths_are_not_positions(name, implementation):
    case = CASES[name]
    arguments, out, lse = drawn(case)
    got = calls.attention(**arguments, **case.options, implementation=implementation)
    close(case, got, out, lse)
    assert np.isfinite(np.asarray(got.out)).all()
