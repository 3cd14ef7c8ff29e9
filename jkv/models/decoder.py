"""One decoder for every family: embedding, blocks, norm, head, as `Config` says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jkv import _compat
from jkv._axes import Array
from jkv._text import plural
from jkv.cache import sharding
from jkv.cache.base import Cache, on_device
from jkv.cache.none import NoCache
from jkv.cache.protocol import LayerCache, Step
from jkv.models.config import Config
from jkv.ops import dispatch
from jkv.ops.masks import AttentionSpec
from jkv.ops.rope import angles, rotate

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}

# What a training loop does to the embedding (index 0) and to the output of each residual branch
# (from 1 on), dropout for one; nothing otherwise.
Branch = Callable[[Array, int], Array]


def _unchanged(x: Array, index: int) -> Array:
    del index
    return x


class Linear(nnx.Module):
    """``x @ kernel.T + bias``.

    The kernel is ``[outputs, inputs]``, as checkpoints and embeddings have it: a decode step reads
    each output's weights as one stream, up to 1.25 times as fast on the CPU as the transpose.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        scale = inputs**-0.5
        kernel = jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32) * scale
        self.shape = (inputs, outputs)
        self.kernel = nnx.Param(self.layout(kernel.astype(dtype)))  # [outputs, inputs]
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None  # [outputs]

    @staticmethod
    def layout(matrix: Any) -> Any:
        """Return the map ``[inputs, outputs]`` in the layout of `kernel`.

        Args:
            matrix: a jax or numpy array. Axes are moved, nothing is copied or cast.
        """
        return matrix.T

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Project the last axis."""
        # One matrix of all rows: the gradient of a product with two leading axes is transposed on
        # its way by XLA's CPU compiler, and a training step takes 1.5 times as long.
        y = jnp.einsum("ri,oi->ro", x.reshape(-1, x.shape[-1]), self.kernel[...])
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...][None, None, :]


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis, in float32."""

    def __init__(self, size: int, config: Config, *, rms: bool | None = None):
        self.rms = config.norm == "rms" if rms is None else rms
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.scale = nnx.Param(jnp.full((size,), 1 - config.norm_offset, config.dtype))
        self.bias = None if self.rms else nnx.Param(jnp.zeros((size,), config.dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        wide = x.astype(jnp.float32)
        if not self.rms:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        line = (1,) * (x.ndim - 1) + (-1,)
        wide = wide * (self.offset + self.scale[...].astype(jnp.float32)).reshape(line)
        if self.bias is not None:
            wide = wide + self.bias[...].astype(jnp.float32).reshape(line)
        return wide.astype(x.dtype)


class Attention(nnx.Module):
    """Projections around `LayerCache.attend`; the cache decides what it stores, and how."""

    def __init__(self, config: Config, window: int | None, rngs: nnx.Rngs):
        self.configure(config, window)
        self.mesh: Mesh | None = None  # of the devices that have the heads, see `jkv.shard`
        width, dim, dtype = config.width, config.head_dim, config.dtype
        queries, keys = config.heads * dim, config.kv_heads * dim
        bias = config.qkv_bias
        self.q = Linear(width, queries, bias=bias, dtype=dtype, rngs=rngs)
        self.k = Linear(width, keys, bias=bias, dtype=dtype, rngs=rngs)
        self.v = Linear(width, keys, bias=bias, dtype=dtype, rngs=rngs)
        self.o = Linear(queries, width, bias=config.out_bias, dtype=dtype, rngs=rngs)
        self.q_norm = Norm(dim, config, rms=True) if config.qk_norm else None
        self.k_norm = Norm(dim, config, rms=True) if config.qk_norm else None

    def configure(self, config: Config, window: int | None) -> None:
        """Set the configuration and the layer's window."""
        self.config = config
        self.spec = AttentionSpec(config.scale, window, softcap=config.attention_softcap)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache,
        step: Step,
        rope: tuple[Array, Array] | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Return the attention output and the layer's next cache; `rope` is (cos, sin)."""
        config = self.config
        batch, new, _ = x.shape
        q = self.q(x).reshape(batch, new, config.heads, config.head_dim)
        k = self.k(x).reshape(batch, new, config.kv_heads, config.head_dim)
        v = self.v(x).reshape(batch, new, config.kv_heads, config.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None and config.rope is not None:
            q = rotate(q, *rope, interleaved=config.rope.interleaved)
            k = rotate(k, *rope, interleaved=config.rope.interleaved)
        out, cache = sharding.attend(
            cache,
            self.mesh,
            q,
            k,
            v,
            step,
            self.spec,
        )
        return self.o(out.reshape(batch, new, -1)), cache


class FeedForward(nnx.Module):
    """The MLP of a block, gated or not."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.activation = config.activation
        width, inner, dtype = config.width, config.feed_forward, config.dtype
        bias = config.mlp_bias
        self.up = Linear(width, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.gate = (
            Linear(width, inner, bias=bias, dtype=dtype, rngs=rngs) if config.gated else None
        )
        self.down = Linear(inner, width, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the MLP."""
        act = _ACTIVATIONS[self.activation]
        inner = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(inner)


class DecoderBlock(nnx.Module):
    """Attention and MLP, each a normalised branch added to the residual stream."""

    def __init__(self, config: Config, window: int | None, rngs: nnx.Rngs):
        self.attention_norm = Norm(config.width, config)
        self.attention = Attention(config, window, rngs)
        self.attention_post_norm = Norm(config.width, config) if config.post_norms else None
        self.mlp_norm = Norm(config.width, config)
        self.mlp = FeedForward(config, rngs)
        self.mlp_post_norm = Norm(config.width, config) if config.post_norms else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache,
        step: Step,
        rope: tuple[Array, Array] | None,
        first: Callable[[Array], Array],
        second: Callable[[Array], Array],
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Return the residual stream after both branches, and the layer's next cache."""
        out, cache = self.attention(self.attention_norm(x), cache, step, rope)
        if self.attention_post_norm is not None:
            out = self.attention_post_norm(out)
        x = x + first(out)
        out = self.mlp(self.mlp_norm(x))
        if self.mlp_post_norm is not None:
            out = self.mlp_post_norm(out)
        return x + second(out), cache


class Decoder(nnx.Module):
    """A decoder-only transformer: ``logits, cache = model(tokens, cache)``, a pure function.

    Being an NNX module it is a pytree: pass it through `jax.jit`, differentiate with respect to
    it, or close over it. The cache is an argument and a result, never a variable of the module.

    Example:
        >>> from flax import nnx
        >>> shapes = nnx.eval_shape(lambda: jkv.Decoder(lm.config, rngs=nnx.Rngs(0)))
        >>> cache = jkv.init_cache(lm.config, batch=1, slots=8)
        >>> logits, cache = lm.model(jnp.array([[5, 6, 7]]), cache)
        >>> logits.shape, cache.lengths.tolist()
        ((1, 3, 1024), [3])
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        table = jax.random.normal(rngs.params(), (config.vocab, config.width), jnp.float32)
        self.embedding = nnx.Param((table * 0.02).astype(config.dtype))  # [V, D]
        # Assigned once: an attribute of an NNX module that was None cannot become a parameter.
        places = None
        if config.rope is None:
            table = jax.random.normal(rngs.params(), (config.context, config.width), jnp.float32)
            places = nnx.Param((table * 0.02).astype(config.dtype))  # [context, D]
        self.positions = places
        self.blocks = _compat.module_list(
            [DecoderBlock(config, config.window(i), rngs) for i in range(config.layers)]
        )
        self.norm = Norm(config.width, config)
        self.head = (
            None
            if config.tied
            else Linear(config.width, config.vocab, bias=False, dtype=config.dtype, rngs=rngs)
        )

    @property
    def mesh(self) -> Mesh | None:
        """The mesh over which heads are sharded, or None; see `jkv.shard`."""
        return self.blocks[0].attention.mesh

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache | None = None,
        counts: Int[Array, " B"] | None = None,
        *,
        branch: Branch = _unchanged,
    ) -> tuple[Float[Array, "B T V"], Any]:
        """Return logits (float32) of the token after each new one, and the next cache.

        Args:
            tokens: new ones; ids outside the vocabulary are undefined.
            cache: of the tokens before them. None: there are none, and nothing is kept.
            counts: how many of each row's T tokens are real, all by default; the rest, at the
                end, is padding: nothing of it is stored, its logits mean nothing.
            branch: applied to the embedding and to each residual branch, for training.
        """
        hidden, cache = self.hidden(tokens, cache, counts, branch=branch)
        return self.logits(hidden), cache

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache | None = None,
        counts: Int[Array, " B"] | None = None,
        *,
        branch: Branch = _unchanged,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Return the last layer's output, before the head: for when only some logits are wanted."""
        if cache is None:
            zeros = jnp.zeros(tokens.shape[:1], jnp.int32)
            new = tokens.shape[1]
            step = Step.after(zeros, zeros + new if counts is None else counts, new)
            layers = (NoCache(),) * self.config.layers
            return self._run_layers(tokens, step, layers, branch)[0], None
        run = on_device(cache).begin(tokens, counts)
        return run.end(*self._run_layers(run.tokens, run.step, run.layers, branch))

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Return the logits of every token of the vocabulary, float32."""
        x = self.norm(hidden)
        table = self.embedding[...] if self.head is None else self.head.kernel[...]
        logits = jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _run_layers(
        self, tokens: Array, step: Step, layers: tuple[LayerCache, ...], branch: Branch
    ) -> tuple[Array, list[LayerCache]]:
        """Return the last layer's output, and each layer's next cache."""
        config = self.config
        if len(layers) != config.layers:
            raise ValueError(
                f"the cache has {plural(len(layers), 'layer')} and the model {config.layers}; "
                "expected a cache made from this model's configuration"
            )
        x = self.embedding[...][tokens]
        if config.embed_scale != 1.0:
            # Rounded to the weights' dtype first, as the models that scale were trained.
            x = x * jnp.asarray(config.embed_scale, x.dtype)
        rope = None
        if config.rope is not None:
            rope = angles(step.positions, config.rope.frequencies(), config.rope.magnitude)
        elif self.positions is not None:
            x = x + self.positions[...][jnp.maximum(step.positions, 0)]
        x = branch(x, 0)
        after = []
        shared = branch is _unchanged and isinstance(x, Tracer)
        for i, (block, layer) in enumerate(zip(self.blocks, layers, strict=True)):
            if shared:
                x, layer = _traced_once(block, x, layer, step, rope, dispatch.tracing())
            else:
                x, layer = block(
                    x,
                    layer,
                    step,
                    rope,
                    lambda y, i=i: branch(y, 2 * i + 1),
                    lambda y, i=i: branch(y, 2 * i + 2),
                )
            after.append(layer)
        return x, after


@functools.partial(jax.jit, static_argnums=5)
def _traced_once(
    block: DecoderBlock,
    x: Array,
    layer: LayerCache,
    step: Step,
    rope: tuple[Array, Array] | None,
    how: Hashable,
) -> tuple[Array, LayerCache]:
    """Run a block within a trace; blocks that differ in nothing but numbers are traced once.

    Of a model's 32 layers 31 are then neither traced nor lowered. XLA inlines the calls before
    anything else, so that the compiled program is the same.

    Args:
        how: whatever else the trace depends on, see `dispatch.tracing`.
    """
    del how
    return block(x, layer, step, rope, _same, _same)


def _same(x: Array) -> Array:
    return x
