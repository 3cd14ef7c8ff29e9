"""What stands on no JAX need not be tested with each version of it; what long runs found is kept.

``JKV_SOAK=1 JKV_SOAK_JSON=file.json pytest tests/store -m soak`` writes down what they counted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# A sample, for the newer Python.
BOTH = ("test_tiers.py", "test_store.py", "test_tiering.py", "test_store_prefix.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The others are slow ones: run once, in the whole suite."""
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name not in BOTH:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def found(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Figures of a test, added to the file that JKV_SOAK_JSON names."""
    file = os.environ.get("JKV_SOAK_JSON")
    begun = time.monotonic()

    def keep(**figures: Any) -> None:
        if file is None:
            return
        from bench import machine

        path = Path(file)
        said = json.loads(path.read_text()) if path.exists() else {"machine": machine.describe()}
        took = round(time.monotonic() - begun, 1)
        said[request.node.name] = {"seconds": took, **figures}
        path.write_text(json.dumps(said, indent=2) + "\n")

    return keep
