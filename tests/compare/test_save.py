"""What `LM.save` writes is what transformers reads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

import jkv
from tests.compare import reference
from tests.models.cases import CASES
from tests.models.conftest import GOLDEN

pytestmark = pytest.mark.compare


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_is_saved(name, own, tmp_path):
    """With the configuration that was read, and with one written from `Config` alone."""
    lm = jkv.load(GOLDEN / name)
    if not own:
        lm = dataclasses.replace(lm, directory=None)
    lm.model.norm.scale[...] = lm.model.norm.scale[...] * 1.5
    lm.save(tmp_path / "x", max_shard_size="5KB")
    theirs = reference.load(tmp_path / "x")
    rows = np.random.default_rng(0).integers(0, 19, (2, 12))
    wanted = reference.logits(theirs, rows)
    logits = np.asarray(nnx.jit(lambda model, tokens: model(tokens)[0])(lm.model, rows))
    assert np.abs(logits - wanted).max() / wanted.std() <= 1e-4
