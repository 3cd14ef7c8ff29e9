"""Rounding: half a step at most, whatever the numbers; codes come back out of their bytes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jkv.ops import quantize

GROUPS, SIZE = 5, 8
every_bits = pytest.mark.parametrize("bits", [8, 4, 2])


@functools.cache
def program(bits):
    return jax.jit(lambda x: quantize.affine(x, -1, bits))


def rounded(x, bits):
    """The numbers that come back and their steps, in float64."""
    codes, steps, zeros = program(bits)(jnp.asarray(x, jnp.float32))
    assert codes.dtype == jnp.uint8
    assert steps.dtype == jnp.bfloat16
    assert zeros.dtype == jnp.int16
    assert codes.shape == x.shape
    assert steps.shape == zeros.shape == (len(x), 1)
    assert int(np.max(codes)) < 2**bits
    steps = np.asarray(steps, np.float64)
    return (np.asarray(codes, np.float64) + np.asarray(zeros, np.float64)) * steps, steps


def check(x, bits):
    """Half a step, and a step no wider than the numbers need; both up to float32's own rounding."""
    x = np.asarray(x, np.float32)
    back, steps = rounded(x, bits)
    wide = x.astype(np.float64)
    slack = np.abs(wide) * 2.0**-21
    assert np.all(np.abs(back - wide) <= steps / 2 + slack), (x, back, steps)
    low, high = wide.min(-1, keepdims=True), wide.max(-1, keepdims=True)
    needed = np.maximum((high - low) / (2**bits - 1), np.abs(wide).max(-1, keepdims=True) / 32767)
    assert np.all(steps <= np.maximum(needed, 2.0**-120) * (1 + 2.0**-6))
    return back, steps


numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-39, 1.1754944e-38, 3.4e38, -3.4e38, 65504.0]),
)


@every_bits
@settings(max_examples=60, deadline=None, derandomize=True)
@given(x=hnp.arrays(np.float32, (GROUPS, SIZE), elements=numbers))
def test_half_a_step_at_most(bits, x):
    check(x, bits)


@every_bits
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    bias=st.sampled_from([0.0, 1.0, -30.0, 1000.0, -1e6]),
    outlier=st.sampled_from([1.0, 1000.0, -1e6]),
)
def test_lopsided_groups_and_outliers(bits, seed, size, bias, outlier):
    x = np.random.default_rng(seed).normal(size=(GROUPS, SIZE)) + bias
    x[:, 0] *= outlier
    check(x * size, bits)


@every_bits
def test_constants_zeros_and_numbers_near_zero(bits):
    x = np.zeros((GROUPS, SIZE), np.float32)
    x[0], x[1], x[2], x[3, ::2] = 7.25, -1e30, 1e-45, 3e-39
    back, steps = check(x, bits)
    np.testing.assert_array_equal(back[4], 0)
    # To 16 bits, as far as a zero point goes.
    np.testing.assert_allclose(back[:2], x[:2], rtol=2e-5)
    assert np.all(np.abs(back[2:4]) <= steps[2:4])


@every_bits
def test_zero_stays_zero(bits):
    x = np.random.default_rng(0).normal(size=(GROUPS, SIZE)) * [[1], [3], [1e-3], [70], [1e5]]
    x[:, 3] = 0
    back, _ = check(x, bits)
    np.testing.assert_array_equal(back[:, 3], 0)


def test_a_bias_costs_nothing():
    """Qwen2.5 has key channels of norm 900 whose differences alone mean something."""
    x = np.random.default_rng(0).normal(size=(GROUPS, SIZE))
    _, plain = rounded(x, 4)
    back, steps = rounded(x + 900, 4)
    np.testing.assert_allclose(steps, plain, rtol=2e-2)
    assert np.max(np.abs(back - 900 - x)) <= plain.max() * 0.52


@every_bits
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_told_of_its_group_alone(bits, bad):
    x = np.random.default_rng(0).normal(size=(GROUPS, SIZE)).astype(np.float32)
    clean, _ = rounded(x, bits)
    dirty = x.copy()
    dirty[2, 5] = bad
    back, steps = rounded(dirty, bits)
    assert np.all(np.isnan(steps[2]))
    assert np.all(np.isnan(back[2]))
    np.testing.assert_array_equal(np.delete(back, 2, 0), np.delete(clean, 2, 0))


def test_padding_widens_no_range():
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32) + 50
    real = np.arange(8)[None] < 6
    filled = jnp.asarray(np.where(real, x, 0))
    _, steps, zeros = quantize.affine(filled, -1, 4, jnp.asarray(real))
    _, steps6, zeros6 = quantize.affine(jnp.asarray(x[:, :6]), -1, 4)
    np.testing.assert_array_equal(steps, steps6)
    np.testing.assert_array_equal(zeros, zeros6)
    _, wider, _ = quantize.affine(filled, -1, 4)
    assert np.all(np.asarray(wider, np.float32) > 2 * np.asarray(steps, np.float32))


def test_round_up_is_the_next_bfloat16():
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(-80, 80, 2000)).astype(np.float32)
    x[:3] = 1.0, 2.0**-120, 1 + 2.0**-7
    found = np.asarray(jax.jit(quantize.round_up)(x), np.float32)
    assert np.all(found >= x)
    np.testing.assert_array_equal(found[:3], x[:3])
    below = (found.view(np.uint32) - np.uint32(1 << 16)).view(np.float32)
    assert np.all(below < x)


@every_bits
@pytest.mark.parametrize("size", [1, 7, 8, 64, 80, 128])
def test_codes_come_back_out_of_their_bytes(bits, size):
    codes = np.random.default_rng(0).integers(0, 2**bits, (2, 3, size)).astype(np.uint8)
    packed = quantize.pack(jnp.asarray(codes), bits)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (2, 3, quantize.width(size, bits))
    np.testing.assert_array_equal(quantize.unpack(packed, size, bits), codes)


def test_bytes_counted_by_hand():
    sizes = {(1, 8): 1, (7, 8): 7, (1, 4): 1, (7, 4): 4, (80, 4): 40, (128, 4): 64}
    sizes |= {(1, 2): 1, (7, 2): 2, (64, 2): 16, (80, 2): 20, (128, 2): 32}
    for (size, bits), want in sizes.items():
        assert quantize.width(size, bits) == want


def test_the_layout_of_a_byte():
    """What a kernel relies on: the lowest bits of all bytes are the first part of the channels."""
    codes = jnp.arange(8, dtype=jnp.uint8)
    np.testing.assert_array_equal(quantize.pack(codes, 4), [0 | 64, 1 | 80, 2 | 96, 3 | 112])
    np.testing.assert_array_equal(
        quantize.pack(codes % 4, 2), [0 | 2 << 2 | 0 << 4 | 2 << 6, 1 | 3 << 2 | 1 << 4 | 3 << 6]
    )
    low, high = quantize.parts(quantize.pack(codes, 4), 4)
    np.testing.assert_array_equal(low, [0, 1, 2, 3])
    np.testing.assert_array_equal(high, [4, 5, 6, 7])


def test_a_zero_point_far_below_fits():
    """As far from zero as a zero point can be: a step made for the nearer end is too small."""
    x = np.linspace(-1e6, -1e6 * (1 - 1 / 129), 64, dtype=np.float32)[None]
    codes, step, zero = quantize.affine(jnp.asarray(x), axis=-1, bits=8)
    step = np.asarray(step, np.float32)
    assert np.abs(1e6 / step).max() < 2**15
    back = (np.asarray(codes, np.float32) + np.asarray(zero, np.float32)) * step
    assert np.abs(back - x).max() <= 0.51 * step
