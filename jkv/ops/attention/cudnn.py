"""Attention among a prefill's own tokens by cuDNN, through `jax.nn`.

Only a chunk's own tokens: cuDNN takes keys as `[B, T, K, H]`, to which a cache of `[B, K, S, H]`
would have to be transposed, and its "causal" mask counts queries and keys from the first. Tokens
before the chunk are another part, and the two are merged.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp

from jkv._axes import Array, Shaped
from jkv.ops import dispatch
from jkv.ops.codecs import Encoded
from jkv.ops.kv import KV, ContiguousKV
from jkv.ops.masks import AttentionSpec
from jkv.ops.partial import Partial

FEW = 16  # new tokens for which it is not worth a call of its own
DTYPES = ("bfloat16", "float16")
IMPLEMENTATION: Any = "cudnn"  # of `jax.nn.dot_product_attention`; tests have another


def attention(q: Array, kv: ContiguousKV, positions: Array, spec: AttentionSpec) -> Partial:
    """Attend from a chunk to itself, see `jkv.ops.attention`."""
    # Padding comes after all that is real: no real query looks so far, and what padding sees is
    # not used. But a weight of zero leaves NaN what it is.
    real = (positions >= 0)[..., None]
    k, v = (jnp.where(real[..., None], jnp.swapaxes(x, 1, 2), 0) for x in (kv.k, kv.v))  # pyright: ignore[reportArgumentType]
    window = spec.window
    within = None if window is None or window >= q.shape[1] else (window - 1, 0)
    out, lse = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=spec.scale,
        is_causal=True,
        local_window_size=within,
        implementation=IMPLEMENTATION,
        return_residual=True,
    )
    # `jax.nn` gives the lse in the dtype of q, eight bits of it for bfloat16, and a merge would be
    # off by as much. Widened at once, the compiler takes the two conversions for none: it may keep
    # more than is asked for (xla_allow_excess_precision, which is so unless it is turned off).
    lse = lse.astype(jnp.float32)
    return Partial(
        out=jnp.where(real[..., None], out.astype(jnp.float32), 0.0),
        lse=jnp.where(real, lse, -jnp.inf),
    )


def unsupported(q: Shaped, kv: KV, positions: Shaped | None, spec: AttentionSpec) -> str | None:
    """Return why this implementation cannot do this, or None."""
    del positions
    if not isinstance(kv, ContiguousKV) or not kv.chunk:
        return "tokens of a cache (it is for a chunk's attention among itself)"
    if q.shape[1] <= FEW:
        return f"{q.shape[1]} new tokens (it is for more than {FEW})"
    if isinstance(kv.k, Encoded) or isinstance(kv.v, Encoded):
        return "keys or values in a codec's form"
    names = [str(x.dtype) for x in (q, kv.k, kv.v)]
    if names[0] not in DTYPES or len(set(names)) > 1:
        return f"{', '.join(names)} (cuDNN takes {' or '.join(DTYPES)}, one for all)"
    if spec.softcap is not None:
        return "a softcap (cuDNN has none)"
    if spec.sinks and spec.window is not None and spec.window < q.shape[1]:
        return "sinks beside a window (cuDNN has none)"
    return _refused(q.shape[-1])


def _refused(dim: int) -> str | None:
    """Return why cuDNN does not take heads of this size on the target, or None."""
    if not installed():
        return "no JAX for NVIDIA GPUs is installed, which brings cuDNN"
    if "xla_allow_excess_precision=false" in os.environ.get("XLA_FLAGS", "").lower():
        return "xla_allow_excess_precision is off, with which its lse comes rounded"
    found = dispatch.capability()
    major = 0 if found is None else int(found.split(".")[0])
    if found is not None and major < 8:
        return f"a GPU of compute capability {found} (cuDNN's is for 8.0 and later)"
    most = 256 if major >= 9 else 128  # without a GPU, `jax.nn` allows what all can do
    if dim % 8 or dim > most:
        return f"{dim} channels (cuDNN takes multiples of 8 up to {most})"
    return None


@functools.cache
def installed() -> bool:
    """Return whether a JAX with cuDNN is installed: tracing alone needs it."""
    return any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
