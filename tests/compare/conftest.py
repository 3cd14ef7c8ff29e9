"""Live comparisons need torch and transformers; without them this directory is not collected."""

from __future__ import annotations

import importlib.util
import warnings

import pytest

_MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if _MISSING else []


@pytest.fixture(autouse=True)
def _their_warnings():
    """Warnings of torch and transformers are theirs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(torch|transformers)(\..*)?")
        yield
