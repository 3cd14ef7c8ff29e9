"""One layer alone of every kind, in every dtype; and what a pass says of bad ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv.cache import Cache
from jkv.ops import AttentionSpec
from tests.cache import kinds

# A multiple of 3, 15 and 255 times a power of two: beside zero, all codes are exact.
MOST = 255 / 128
# Odd dimensions and every dtype, with steps and with chunks; each is a program for each kind.
SHAPES = [(1, "float16", 1), (7, "float32", 9), (80, "bfloat16", 1)]
# The layers of these two are those of others in all but numbers.
SHAPED = [c for c in kinds.KINDS if c.layered and c.name not in ("dense:grow", "near_far")]


@pytest.mark.parametrize(("dim", "dtype", "size"), SHAPES)
@pytest.mark.parametrize("case", SHAPED, ids=lambda case: case.name)
def test_dtypes_and_head_dimensions(case, dim, dtype, size):
    """One layer alone, token by token or in chunks, of numbers that every kind holds as they are:
    a channel or a token lost or moved is no matter of rounding."""
    rng, count = np.random.default_rng(3), 18
    q = rng.normal(size=(count, 2, 4, dim)).astype(jnp.dtype(dtype))
    k, v = ((rng.random((count, 2, 2, dim)) < 0.5) * MOST for _ in range(2))
    scale, softcap = 1 / np.sqrt(dim), 4.0

    @jax.jit
    def follow(*qkv):
        def chunk(cache, qkv):
            qkv = [x.swapaxes(0, 1) for x in qkv]
            spec = AttentionSpec(scale, case.window, softcap=softcap)

            run = cache.begin(jnp.zeros((2, size), jnp.int32))
            out, layer = run.layers[0].attend(*qkv, run.step, spec)
            out, cache = run.end(out.reshape(2, size, -1), [layer])
            return cache, out.swapaxes(0, 1)

        layer = case.kind.init(2, 20, 2, dim, jnp.dtype(dtype))
        chunks = [x.reshape(-1, size, *x.shape[1:]) for x in qkv]
        return jax.lax.scan(chunk, Cache.empty([layer], 2, 20), chunks)[1]

    got = np.asarray(follow(q, *(x.astype(jnp.dtype(dtype)) for x in (k, v))))
    assert got.dtype == jnp.dtype(dtype)
    got = got.reshape(count, 2, 4, dim).astype(float)
    k, v = (np.repeat(x, 2, axis=2) for x in (k, v))
    scores = np.einsum("tbnh,sbnh->tbns", q.astype(float), k) * scale
    weights = np.exp(softcap * np.tanh(scores / softcap))
    weights *= [[[[case.sees(t, s) for s in range(count)]]] for t in range(count)]
    want = np.einsum("tbns,sbnh->tbnh", weights / weights.sum(-1, keepdims=True), v)
    bound = {"float32": 1e-5 if case.exact else 1e-4, "bfloat16": 1e-2, "float16": 1e-3}[dtype]
    # But for a scale that is no power of two.
    bound = max(bound, 1e-2) if case.name.endswith("fp8") else bound
    np.testing.assert_allclose(got, want, atol=bound)


def test_a_pass_says_what_is_wrong():
    cache = Cache.empty([jkv.dense().init(2, 8, 1, 4, jnp.float32)], 2, 8)
    with pytest.raises(AttributeError, match=r"'advance'; it is run = cache\.begin"):
        getattr(cache, "advance")  # noqa: B009
    with pytest.raises(AttributeError, match=r"no attribute 'layer'$"):
        getattr(cache, "layer")  # noqa: B009
    with pytest.raises(AttributeError, match=r"'tables'; it is cache\.shared"):
        getattr(cache, "tables")  # noqa: B009
    run = cache.begin(jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(
        ValueError, match=r"a pass got 0 layers; expected 1, as the cache was made with 1 layer: "
    ):
        run.end(jnp.zeros((2, 3, 4)), [])
    swapped = jnp.zeros((2, 1, 3, 4))
    with pytest.raises(ValueError, match=r"keys \[2, 1, 3, 4\] in .* \[B, T, heads, head_dim\]"):
        run.layers[0].attend(swapped, swapped, swapped, run.step, AttentionSpec(1.0))
    with pytest.raises(ValueError, match="2 rows and the tokens 1"):
        cache.begin(jnp.zeros((1, 3), jnp.int32))


def test_old_names_say_what_they_are_now():
    for module, old, new in (
        (jkv.cache, "NearFar", r"jkv\.cache\.QuantizedCache"),
        (jkv.scores, "Seen", "ScoreInputs"),
    ):
        with pytest.raises(AttributeError, match=f"{old!r}; it is {new} now"):
            getattr(module, old)
    inputs = jkv.scores.ScoreInputs(*[jnp.zeros(1)] * 7)
    with pytest.raises(AttributeError, match="'fresh'; it is is_new now"):
        getattr(inputs, "fresh")  # noqa: B009
