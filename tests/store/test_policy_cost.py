"""What an operation of a policy costs among many entries."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jkv.store.policy import Policy
from tests.conftest import ROOT
from tests.store.test_policy import every_policy


def cost_ratio(measure: str, policy: Policy, entries: int) -> float:
    """How much more an operation costs with so many entries than with 1000."""
    # In another process: here every call is checked, which takes longer than what it does.
    code = (
        "from tests.store.cost import *; "
        f"print({measure}({policy!r}, {entries}) / {measure}({policy!r}, 1000))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return float(done.stdout)


@every_policy
def test_an_operation_costs_the_same_among_many(policy):
    # A search through all would cost twenty times as much.
    assert cost_ratio("counted", policy, 20_000) < 1.5


@pytest.mark.slow
@every_policy
def test_no_operation_searches_through_all(policy):
    # A search in C takes a hundred times as long as all of it, and no noise does.
    assert cost_ratio("timed", policy, 200_000) < 20
