"""Checks of arguments: what they take, what they return, and what they say of the rest."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jkv import _checks
from jkv.errors import UnsupportedError


@pytest.mark.parametrize(
    ("value", "least", "most", "message"),
    [
        (0, 1, None, "x got 0; expected an integer of at least 1$"),
        (9, 1, 8, "x got 9; expected an integer from 1 to 8$"),
        (9, None, 8, "x got 9; expected an integer of at most 8$"),
        ("1", None, None, "x got '1'; expected an integer$"),
        (True, 0, None, "x got True"),
        (np.bool_(True), 0, None, "x got"),
        (1.0, 0, None, "x got 1.0"),
        (np.float32(1), 0, None, "x got"),
        (np.ones(1, int), 0, None, r"x got ndarray int64\[1\]"),
        (math.nan, 0, None, "x got nan"),
        (None, 0, None, "x got None"),
    ],
)
def test_integers(value, least, most, message):
    with pytest.raises(ValueError, match=message):
        _checks.check_integer("x", value, least, most)


def test_values_come_back_as_pythons():
    assert type(_checks.check_integer("x", np.int64(3), 1, 3)) is int
    assert type(_checks.check_number("x", np.float32(2))) is float
    assert _checks.check_flag("x", np.bool_(True)) is True
    assert _checks.check_token("x", np.int32(4), 5) == 4
    assert _checks.check_text("x", "a") == "a"
    assert _checks.check_one_of("x", 4, (8, 4, 2)) == 4
    _checks.check_function("x", None, "nothing")
    _checks.check_function("x", print, "texts")


@pytest.mark.parametrize("value", [math.inf, math.nan, "1", True, None, 1j, [0.5], -1.0])
def test_numbers(value):
    with pytest.raises(ValueError, match=r"f got x=.*; expected a number of at least 0"):
        _checks.check_number("x", value, "a number of at least 0", lambda n: n >= 0, of="f")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _checks.check_flag("x", 1), TypeError, "x got 1; expected True or False"),
        (lambda: _checks.check_text("x", b"a", of="f"), TypeError, "f got x=b'a'; expected a text"),
        (lambda: _checks.check_function("x", 3, "(a, b)"), TypeError, r"function of \(a, b\)"),
        (lambda: _checks.check_one_of("x", True, (1, 2)), ValueError, "True; expected 1 or 2"),
        (lambda: _checks.check_one_of("x", np.ones(2), ("a",)), ValueError, "expected 'a'"),
        (
            lambda: _checks.check_one_of("x", "d", ("a", "b", "c"), error=UnsupportedError),
            UnsupportedError,
            "x got 'd'; expected 'a', 'b' or 'c'",
        ),
        (lambda: _checks.check_token("x", 1.0), TypeError, "1.0 as a token; expected an id"),
        (lambda: _checks.check_token("x", -1), ValueError, "token -1; expected ids of at least 0"),
        (lambda: _checks.check_token("x", 5, 5), ValueError, "token 5; expected ids from 0 to 4"),
    ],
)
def test_other_checks(call, error, message):
    with pytest.raises(error, match=message):
        call()
