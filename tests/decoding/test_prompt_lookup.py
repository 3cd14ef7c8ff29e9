"""What prompt lookup proposes, held against the same in plain Python."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jkv


def looked_up(row, ngram, tokens):
    """The same in plain Python."""
    for size in range(min(ngram, len(row) - 1), 0, -1):
        for start in range(len(row) - size - 1, -1, -1):
            if row[start : start + size] == row[-size:]:
                repeated = list(row)
                for i in range(tokens):
                    repeated.append(repeated[start + size + i])
                return repeated[len(row) :]
    return [-1] * tokens


def propose(rows, ngram, tokens, slots=24):
    history = np.full((len(rows), slots), -1, np.int32)
    for i, row in enumerate(rows):
        history[i, : len(row)] = row
    lengths = np.asarray([len(row) for row in rows], np.int32)
    found = jkv.prompt_lookup(ngram, tokens)(jnp.asarray(history), jnp.asarray(lengths))
    return np.asarray(found).tolist()


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], [4, 9, 1]),  # three tokens match
        ([1, 2, 3, 7, 5, 2, 3, 8, 6, 1, 2, 3], [7, 5, 2]),  # three rather than the later two
        ([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], [8, 1, 2]),  # the latest of equals
        ([4, 7, 8, 9, 3, 7], [8, 9, 3]),  # one
        ([5, 5], [5, 5, 5]),  # it goes on into itself
        ([1, 2, 1, 2, 1], [2, 1, 2]),
        ([1, 2, 3], [-1, -1, -1]),
        ([0], [-1, -1, -1]),
        ([0, 0, 1, 0, 0], [1, 0, 0]),
    ],
)
def test_what_is_looked_up(row, want):
    assert propose([row], 3, 3) == [want]
    assert looked_up(row, 3, 3) == want


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=4, max_size=4))
def test_looking_up_equals_plain_python(rows):
    assert propose(rows, 3, 5) == [looked_up(row, 3, 5) for row in rows]


def test_what_is_past_a_rows_end_is_not_looked_at():
    row, lengths = jnp.asarray([[1, 2, 3, 1, 9, 1, 2, 3]]), jnp.asarray([4])
    assert np.asarray(jkv.prompt_lookup(1, 3)(row, lengths)).tolist() == [[2, 3, 1]]
