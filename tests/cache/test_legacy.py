"""A dense cache from keys and values that somebody else made, and the words for what is wrong."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv


def pair(b=2, k=1, s=3, h=4, dtype=np.float32):
    values = np.arange(b * k * s * h, dtype=np.float32).reshape(b, k, s, h)
    return values.astype(dtype), (values + 0.5).astype(dtype)


def test_round_trip_to_the_bit():
    layers = [pair(), pair(k=2)]
    cache = jkv.from_legacy(layers, lengths=[3, 1])
    assert cache.lengths.tolist() == [3, 1]
    assert cache.capacity == 3
    for (k, v), (k2, v2) in zip(layers, cache.to_legacy(), strict=True):
        np.testing.assert_array_equal(k, k2)
        np.testing.assert_array_equal(v, v2)


def test_all_slots_are_filled_by_default():
    assert jkv.from_legacy([pair()]).lengths.tolist() == [3, 3]


def test_the_arrays_are_copied():
    """A numpy array may be aliased on the CPU; what is changed in it later must not show."""
    keys, values = pair(s=64)
    cache = jkv.from_legacy([(keys, values)])
    keys[:] = -1
    assert float(cache.layers[0].keys[0, 0, 0, 1]) == 1.0


def test_what_is_longer_than_every_row_is_cut():
    cache = jkv.from_legacy([pair()], lengths=[2, 1])
    assert cache.to_legacy()[0][0].shape == (2, 1, 2, 4)


@pytest.mark.parametrize(
    ("layers", "lengths", "message"),
    [
        ([], None, "no layers"),
        (3, None, r"got 3; expected one \(keys, values\) pair per layer"),
        ([pair()[:1]], None, "as layer 0; expected a pair, its keys and values"),
        ([pair(), 3], None, "got 3 as layer 1; expected a pair"),
        ([(pair()[0], pair(s=2)[1])], None, "layer 0"),
        ([(pair()[0][0], pair()[1][0])], None, "layer 0"),
        ([pair(), pair(s=2)], None, "different"),
        ([pair(), pair(b=1)], None, "different"),
        ([pair()], [1], "lengths"),
        ([pair()], [1, 4], "lengths"),
        ([pair()], [-1, 1], "lengths"),
        ([pair()], np.array([0.5, 1.0]), "integer"),
        ([pair(dtype=np.int32)], None, "int32"),
    ],
    ids=lambda value: None if not isinstance(value, str) else value,
)
def test_bad_input(layers, lengths, message):
    if isinstance(lengths, np.ndarray):
        lengths = list(lengths)
    with pytest.raises(ValueError, match=message):
        jkv.from_legacy(layers, lengths)


def test_half_precision_keeps_its_dtype():
    keys, values = (jnp.asarray(x, jnp.bfloat16) for x in pair())
    assert jkv.from_legacy([(keys, values)]).layers[0].keys.dtype == jnp.bfloat16


def test_traced_lengths_are_bounded_by_the_slots():
    made = jax.jit(lambda lengths: jkv.from_legacy([pair()], lengths).lengths)
    assert made(jnp.array([-1, 4])).tolist() == [0, 3]


def test_lengths_may_be_a_list_of_traced_numbers():
    layers = [pair()]
    lengths = jax.jit(lambda one: jkv.from_legacy(layers, [one, 3]).lengths)(2)
    assert lengths.tolist() == [2, 3]


@pytest.mark.parametrize("missing", ["torch", "transformers.cache_utils"])
def test_without_transformers_its_caches_are_refused_by_name(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    says = f"need {missing.partition('.')[0]}, which is not installed: pip install torch"
    if missing == "torch":
        with pytest.raises(ImportError, match=says):
            jkv.to_transformers(jkv.from_legacy([pair()]))
    else:
        with pytest.raises(ImportError, match=says):
            jkv.from_transformers("a cache")
