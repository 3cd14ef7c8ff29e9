"""The configuration of a decoder, one frozen value for every family."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

from jkv._text import brief, plural
from jkv.ops import rope as _rope

Norm = Literal["layer", "rms"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeRule = Literal["default", "linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions of a model: which dimensions are rotated, and how fast.

    Attributes:
        theta: base of the wavelengths.
        dims: leading dimensions of each head that are rotated; the rest have no position.
        interleaved: pairs are (2i, 2i + 1) rather than (i, i + dims / 2).
        rule: how the frequencies are scaled past the trained context.
        factor: of the scaling.
        original_context: tokens that the model was trained on before scaling.
        low_freq_factor: llama3's slow end.
        high_freq_factor: llama3's fast end.
        beta_fast: YaRN's fast end, in turns over the original context.
        beta_slow: YaRN's slow end.
        magnitude: multiplies cosines and sines (YaRN's attention factor).
        truncate: YaRN rounds the dimensions between which it ramps.

    Example:
        >>> jkv.Rope(dims=4).frequencies().tolist()
        [1.0, 0.01]
    """

    theta: float = 10000.0
    dims: int = 64
    interleaved: bool = False
    rule: RopeRule = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0
    truncate: bool = True

    def frequencies(self) -> np.ndarray:
        """Return inverse frequencies ``[dims // 2]``, float64 on the host."""
        plain = _rope.default_frequencies(self.dims, self.theta)
        if self.rule == "linear":
            return _rope.linear_frequencies(plain, self.factor)
        if self.rule == "llama3":
            return _rope.llama3_frequencies(
                plain,
                factor=self.factor,
                low_freq_factor=self.low_freq_factor,
                high_freq_factor=self.high_freq_factor,
                original_context=self.original_context,
            )
        if self.rule == "yarn":
            return _rope.yarn_frequencies(
                plain,
                factor=self.factor,
                theta=self.theta,
                original_context=self.original_context,
                beta_fast=self.beta_fast,
                beta_slow=self.beta_slow,
                truncate=self.truncate,
            )
        return plain


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder's shape and mathematics. `jkv.models.families` makes one from a `config.json`.

    Attributes:
        family: name for people ("llama").
        vocab: V, rows of the embedding.
        layers: L.
        width: D.
        heads: N, query heads.
        kv_heads: K, key/value heads.
        head_dim: H.
        feed_forward: F.
        context: tokens that the model was made for.
        norm: RMSNorm or LayerNorm.
        norm_eps: added to the variance.
        norm_offset: the norm multiplies by ``offset + weight`` (1 in Gemma).
        rope: rotary positions; None means a learned table of `context` rows.
        activation: of the feed-forward layer.
        gated: two input projections, one through the activation (SwiGLU and kin).
        qkv_bias: biases on the projections of queries, keys and values.
        out_bias: a bias on the attention's output projection.
        mlp_bias: biases on the feed-forward projections.
        qk_norm: RMSNorm over each head of the queries and keys before rotation (Qwen3).
        post_norms: norms after them, before the residual is added (Gemma 2, GLM-4).
        tied: the output projection is the embedding.
        embed_scale: multiplies the embedding.
        windows: for each layer the sliding window, or None; empty means none anywhere.
        attention_scale: of the scores; 1 / sqrt(H) where None.
        attention_softcap: of the scores.
        logit_softcap: of the logits.
        end_ids: tokens at which generation stops by default.
        dtype: of weights and activations.

    Raises:
        ValueError: sizes that are no positive integers, or do not fit together.

    Example:
        >>> config = jkv.Config(vocab=11, layers=2, width=16, heads=4, kv_heads=2, head_dim=4,
        ...                     feed_forward=24, context=64, rope=jkv.Rope(dims=4))
        >>> config.scale, config.window(0)
        (0.5, None)
    """

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    context: int
    family: str = "custom"
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    rope: Rope | None = None
    activation: Activation = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    tied: bool = False
    embed_scale: float = 1.0
    windows: tuple[int | None, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    end_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        sizes = ("vocab", "layers", "width", "heads", "kv_heads", "head_dim", "feed_forward")
        for name in (*sizes, "context"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"Config got {name}={brief(value)}; expected an integer of at least 1"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"Config got {plural(self.heads, 'head')} over {self.kv_heads} kv_heads; "
                "expected a multiple"
            )
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(
                f"Config got {plural(len(self.windows), 'window')} for "
                f"{plural(self.layers, 'layer')}; expected one each"
            )
        if self.rope is not None and (self.rope.dims % 2 or self.rope.dims > self.head_dim):
            raise ValueError(
                f"Config got rope over {self.rope.dims} dimensions of heads of {self.head_dim}; "
                "expected an even number, at most the head's"
            )

    @property
    def scale(self) -> float:
        """The scale of the attention scores."""
        if self.attention_scale is not None:
            return self.attention_scale
        return 1 / math.sqrt(self.head_dim)

    def window(self, layer: int) -> int | None:
        """Return the sliding window of a layer, None for none."""
        return self.windows[layer] if self.windows else None
