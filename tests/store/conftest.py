"""What stands on no JAX need not be tested with each version of it."""

from __future__ import annotations

from pathlib import Path

import pytest

BOTH = ("test_tiers.py", "test_store.py", "test_store_prefix.py")  # a sample, for the newer Python


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The others are slow ones: run once, in the whole suite."""
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name not in BOTH:
            item.add_marker(pytest.mark.slow)
