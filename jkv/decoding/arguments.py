"""Types of what generation works with; what users pass is checked at run time by each function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jkv._axes import Array
from jkv.cache.base import Cache
from jkv.cache.protocol import CacheKind
from jkv.decoding.transform import Transform
from jkv.models.config import Config
from jkv.models.decoder import Decoder
from jkv.models.lm import LM

Model = LM | Decoder
Ids = Sequence[int] | np.ndarray | jax.Array  # [T]
Prompts = str | Sequence[str | Ids] | np.ndarray | jax.Array  # one text, or rows; arrays [B, T]
# One, or several for all rows, or a list of them for each row.
Stop = int | str | Sequence[int | str | Sequence[int | str]] | np.ndarray | jax.Array
CacheLike = CacheKind | str  # a kind, or its text such as "int4"
Sampler = Transform | Callable[[jax.Array], jax.Array]  # a function of the logits [B, V]
Progress = Callable[[int, int], object]  # of the longest prompt's tokens done, and in all


@runtime_checkable
class DecoderLike(Protocol):
    """What the decode loops call of a model: a pytree that runs as `jkv.Decoder` does."""

    @property
    def config(self) -> Config:
        """Its configuration."""
        ...

    def hidden(
        self, tokens: Array, cache: Cache, counts: Array | None = None
    ) -> tuple[Array, Cache]:
        """Compute hidden states ``[B, T, D]`` of new tokens, and the cache with them."""
        ...

    def logits(self, hidden: Array) -> Array:
        """Compute logits ``[..., V]`` of hidden states ``[..., D]``."""
        ...


@runtime_checkable
class CachedModel(Protocol):
    """A model of your own, of any library: tokens and a cache in, logits and the next cache out.

    A pure function of its arguments, such as a module of `flax.nnx`, whose weights are leaves, or
    ``jax.tree_util.Partial(module.apply, variables)`` of `flax.linen`: either can be an argument
    of a jitted function. It goes through its layers between `Cache.begin` and `Run.end`, as the
    example of `jkv.attention_cache` does, so that every kind of cache will do:

    * it embeds ``run.tokens`` at ``run.step.positions``, which are -1 for padding;
    * layer i calls ``run.layers[i].attend(q, k, v, run.step, spec)``, and keeps what that returns;
    * it returns what ``run.end(x, layers)`` makes of the last layer's output.

    Example:
        >>> def model(tokens, cache, counts):  # without layers: a table of what follows what
        ...     run = cache.begin(tokens, counts)
        ...     x, cache = run.end(jnp.eye(8)[run.tokens], run.layers)
        ...     return x, cache
        >>> cache = jkv.attention_cache(batch=1, slots=8, layers=1, kv_heads=1, head_dim=1)
        >>> logits, cache = jkv.prefill(model, jnp.array([[5, 6, 7]]), cache)
        >>> logits.argmax().item()
        7
    """

    def __call__(self, tokens: Array, cache: Cache, counts: Array | None, /) -> tuple[Array, Cache]:
        """Return logits ``[B, T, V]`` after each new token, and the cache with all of them.

        Args:
            tokens: new ones, ``[B, T]``.
            cache: of the tokens before them.
            counts: how many of each row's T tokens are real, ``[B]``, None for all.
        """
        ...


@runtime_checkable
class TokenizerLike(Protocol):
    """What generation calls of a tokenizer; `jkv.models` has one."""

    def encode(self, text: str) -> list[int]:
        """Encode a text, with the special tokens that come before one."""
        ...

    def encode_continuation(self, text: str) -> list[int]:
        """Encode a text that goes on from another one."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids, without special tokens."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text."""
        ...

    def is_special(self, token: int) -> bool:
        """Tell whether a token is no text."""
        ...


@runtime_checkable
class ChatTokenizerLike(TokenizerLike, Protocol):
    """What `jkv.Chat` calls of a tokenizer besides: a chat template."""

    def template_source(self, template: str | None = None, *, tools: bool = False) -> str:
        """Return the template that `chat_ids` renders."""
        ...

    def chat_ids(self, messages: Sequence[Mapping[str, object]], **options: Any) -> list[int]:
        """Encode a conversation."""
        ...

    def without_special(self, text: str) -> str:
        """Remove the texts of special tokens from a text."""
        ...
