"""Rotary positions: frequencies against closed forms, the rotation against complex numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkv.models import Rope
from jkv.ops import rope

DIMS, THETA = 16, 10000.0
PLAIN = np.array([THETA ** (-2 * i / DIMS) for i in range(DIMS // 2)])


def test_plain_frequencies():
    got = Rope(dims=DIMS).frequencies()
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, PLAIN, rtol=1e-15)


def test_linear():
    np.testing.assert_allclose(
        Rope(dims=DIMS, rule="linear", factor=4.0).frequencies(), PLAIN / 4, rtol=1e-15
    )


def test_llama3():
    """The rule as Meta published it, one frequency at a time."""
    factor, low, high, context = 8.0, 1.0, 4.0, 512

    def scaled(frequency):
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            return frequency
        if wavelength > context / low:
            return frequency / factor
        smooth = (context / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    want = np.array([scaled(f) for f in PLAIN])
    assert (want == PLAIN).any()
    assert ((want < PLAIN) & (want > PLAIN / factor)).any()
    assert np.isclose(want, PLAIN / factor, rtol=1e-12).any()
    got = Rope(
        dims=DIMS,
        rule="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=context,
    ).frequencies()
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn(truncate):
    """The ends are untouched and fully interpolated, and between them the paper's ramp."""
    factor, context = 16.0, 1024
    got = Rope(
        dims=64, rule="yarn", factor=factor, original_context=context, truncate=truncate
    ).frequencies()
    plain = np.array([THETA ** (-2 * i / 64) for i in range(32)])

    def dimension(turns):  # where a pair makes `turns` turns over the context
        return 64 * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = dimension(32), dimension(1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    for i in range(32):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        want = plain[i] * ((1 - ramp) + ramp / factor)
        assert got[i] == pytest.approx(want, rel=1e-12)
    assert got[0] == plain[0]
    assert got[-1] == pytest.approx(plain[-1] / factor)


def complex_rotation(x, positions, inverse, interleaved):
    """x [B, T, heads, 2R] in float64, each pair turned as a complex number."""
    x = np.asarray(x, np.float64)
    half = len(inverse)
    turn = np.exp(1j * np.asarray(positions, np.float64)[..., None] * inverse)[:, :, None, :]
    if interleaved:
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def turn(x, positions, inverse, interleaved):
    cos, sin = rope.angles(jnp.asarray(positions, jnp.int32), inverse)
    return rope.rotate(x, cos, sin, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rotation_far_from_zero(interleaved, dtype):
    """Position 4095, where angles in 16 bits are off by radians."""
    positions = np.array([[0, 1, 255, 256, 257], [4091, 4092, 4093, 4094, 4095]])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 3, DIMS)), dtype)
    got = turn(x, positions, PLAIN, interleaved)
    assert got.dtype == dtype
    want = complex_rotation(np.asarray(x, np.float64), positions, PLAIN, interleaved)
    # One ulp of float32 at 4095 radians is 2.4e-4; half of it, times values of up to 4.
    bound = {"float32": 1e-3, "float16": 4e-3, "bfloat16": 2e-2}[jnp.dtype(dtype).name]
    assert np.max(np.abs(np.asarray(got, np.float64) - want)) < bound


def test_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, DIMS)), jnp.float32) for _ in range(2))

    def score(p, s):
        return float(
            jnp.sum(turn(q, [[p]], PLAIN, False) * turn(k, [[s]], PLAIN, False)).astype(float)
        )

    assert score(7, 3) == pytest.approx(score(1004, 1000), abs=1e-3)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-2)


def test_padding_is_finite_and_unturned():
    x = jnp.ones((1, 2, 1, DIMS))
    got = turn(x, [[-1, -1]], PLAIN, False)
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotation_leaves_the_rest_to_the_bit(interleaved):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(1, 3, 2, 24)), jnp.float32)
    positions = [[5, 6, 7]]
    got = turn(x, positions, PLAIN, interleaved)
    np.testing.assert_array_equal(got[..., DIMS:], x[..., DIMS:])
    want = complex_rotation(x[..., :DIMS], positions, PLAIN, interleaved)
    np.testing.assert_allclose(got[..., :DIMS], want, atol=1e-5)


def test_magnitude_scales_both():
    cos, sin = rope.angles(jnp.array([[3]]), PLAIN, 1.5)
    np.testing.assert_allclose(cos**2 + sin**2, np.full((1, 1, DIMS // 2), 2.25), rtol=1e-6)


def test_rotation_is_differentiable():
    x = jnp.ones((1, 1, 1, DIMS))
    gradient = jax.grad(lambda x: jnp.sum(turn(x, [[9]], PLAIN, False) ** 2))(x)
    # A rotation keeps lengths: the gradient of |x|² is 2x.
    np.testing.assert_allclose(gradient, 2 * x, rtol=1e-5)


def test_yarn_may_slow_down_past_the_half():
    """A ramp that ends past the frequencies there are is not steeper for it."""
    half, factor, theta, context = 4, 2.0, 1e4, 2**17
    inverse = theta ** (-np.arange(half) / half)

    def dimension(turns: float) -> float:
        return half * np.log(context / (turns * 2 * np.pi)) / np.log(theta)

    assert (np.floor(dimension(32.0)), np.ceil(dimension(1.0))) == (2, 5)
    ramp = np.asarray([0, 0, 0, 1 / 3])
    got = rope.yarn_frequencies(inverse, factor=factor, theta=theta, original_context=context)
    np.testing.assert_allclose(got, inverse / factor * ramp + inverse * (1 - ramp))
