"""Fixtures of the kernels' tests."""

from __future__ import annotations

import functools

import pytest

from jkv.ops import dispatch
from jkv.ops.attention import mosaic_tpu
from jkv.ops.mosaic_tpu import write as mosaic_write


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels in the place of what runs on a CPU."""
    run = functools.partial(mosaic_tpu.attention, interpret=True)
    monkeypatch.setattr(mosaic_tpu, "attention", run)
    for name in ("write_run", "write_pages"):
        put = functools.partial(getattr(mosaic_write, name), interpret=True)
        monkeypatch.setattr(mosaic_write, name, put)
    monkeypatch.setattr(dispatch, "platforms", lambda: ("tpu",))
