"""A trained model from disk to text: the tokens that transformers chose, after many prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest

import jkv
from tests.models.conftest import GOLDEN

ROWS = json.loads((GOLDEN / "stories260k.json").read_text("utf-8"))
KINDS = {"dense": jkv.dense(), "none": jkv.none()}


@pytest.fixture(scope="module")
def lm(shared):
    path = shared / "models" / "stories260k"
    return jkv.load(path)


def test_ids(lm):
    assert lm.encode([row["prompt"] for row in ROWS]) == [row["ids"] for row in ROWS]


def _decode(lm, rows, kind):
    wanted = [row["tokens"] for row in rows]
    out = jkv.generate(
        lm.model, [row["ids"] for row in rows], max_new_tokens=len(wanted[0]), cache=kind, stop=()
    )
    np.testing.assert_array_equal(np.asarray(out.tokens), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batch(lm, kind):
    """All prompts at once, from one token to many."""
    assert len({len(row["ids"]) for row in ROWS}) > 5
    _decode(lm, ROWS, KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_alone(lm, kind):
    for row in ROWS[:: 5 if kind == "dense" else 8]:
        _decode(lm, [row], KINDS[kind])


def test_text(lm):
    """What is read back is a story."""
    row = ROWS[0]
    text = lm.decode(row["ids"] + row["tokens"])
    assert text.startswith("Once upon a time, there was")
    assert lm.decode([row["ids"], row["tokens"]])[0] == "Once upon a time"
