"""Who sees whom: the rule against a loop that spells it out."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jkv.ops import visible


def sees(query, slot, window, sinks):
    if slot < 0 or query < 0 or slot > query:
        return False
    return window is None or query - slot < window or slot < sinks


@settings(max_examples=60, deadline=None)
@given(
    # Shapes from a small set: each new one is compiled.
    queries=st.lists(st.integers(-1, 40), min_size=4, max_size=4),
    slots=st.lists(st.integers(-1, 40), min_size=6, max_size=6),
    window=st.sampled_from([None, 1, 2, 7, 40, 41, 100]),
    sinks=st.sampled_from([0, 1, 4]),
)
def test_the_rule(queries, slots, window, sinks):
    got = visible(
        jnp.array([queries, queries[::-1]]),
        jnp.array([slots, slots[::-1]]),
        window=window,
        sinks=sinks,
    )
    for b, (row, held) in enumerate([(queries, slots), (queries[::-1], slots[::-1])]):
        want = [[sees(p, s, window, sinks) for s in held] for p in row]
        np.testing.assert_array_equal(got[b], np.array(want))


@pytest.mark.parametrize("window", [7, 8, 9])
def test_the_window_counts_the_query_itself(window):
    seen = visible(jnp.array([[8]]), jnp.arange(9)[None], window=window)
    assert int(seen.sum()) == min(window, 9)
    assert bool(seen[0, 0, 8])


def test_padding_sees_nothing_and_is_not_seen():
    seen = visible(jnp.array([[-1, 3]]), jnp.array([[-1, 0, 3]]), window=2, sinks=1)
    np.testing.assert_array_equal(seen[0], [[False] * 3, [False, True, True]])
