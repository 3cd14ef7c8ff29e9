"""Rotary position embeddings: frequencies by scaling rule, and the rotation."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jkv._axes import Array


def default_frequencies(dims: int, theta: float) -> np.ndarray:
    """Return inverse frequencies ``theta ** (-2i / dims)`` (Su et al., arXiv:2104.09864).

    Computed on the host in float64 and kept in float32: bfloat16 cannot count past 256, and
    inverse frequencies in it are off by whole radians at a few thousand tokens.
    """
    return theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)


def linear_frequencies(inverse: np.ndarray, factor: float) -> np.ndarray:
    """Divide every frequency by `factor`: position interpolation (Chen et al., 2306.15595)."""
    return inverse / factor


def llama3_frequencies(
    inverse: np.ndarray,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context: int,
) -> np.ndarray:
    """Divide the low frequencies by `factor`, keep the high ones, ramp between (Llama 3.1)."""
    wavelength = 2 * math.pi / inverse
    rotations = original_context / wavelength
    keep = np.clip((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return keep * inverse + (1 - keep) * inverse / factor


def yarn_frequencies(
    inverse: np.ndarray,
    *,
    factor: float,
    theta: float,
    original_context: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> np.ndarray:
    """Interpolate low frequencies and keep high ones by YaRN (Peng et al., 2309.00071)."""
    half = len(inverse)

    def dimension(rotations: float) -> float:
        return half * math.log(original_context / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0.0, 1.0)
    return inverse / factor * ramp + inverse * (1 - ramp)


def angles(
    positions: Int[Array, "B T"], inverse: np.ndarray, magnitude: float = 1.0
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Return cosines and sines of each position's angles, R = half the rotated dimensions, float32.

    A padding position (-1) gets the angle of position 0: it is finite and never attended to.
    """
    at = jnp.maximum(positions, 0).astype(jnp.float32)
    angle = at[..., None] * jnp.asarray(inverse, jnp.float32)[None, None, :]
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def rotate(
    x: Float[Array, "B T heads H"],
    cos: Float[Array, "B T R"],
    sin: Float[Array, "B T R"],
    *,
    interleaved: bool = False,
) -> Float[Array, "B T heads H"]:
    """Rotate the first 2R of the H dimensions; the rest are unchanged (partial rotary).

    The pairs are (i, i + R), or (2i, 2i + 1) where `interleaved` (GLM).
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
    else:
        a, b = rotated[..., :half], rotated[..., half:]
    first, second = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        pairs = jnp.stack([first, second], axis=-1).reshape(rotated.shape)
    else:
        pairs = jnp.concatenate([first, second], axis=-1)
    return jnp.concatenate([pairs.astype(x.dtype), rest], axis=-1)
