"""What one pass of a model computes and moves, from its configuration alone.

A product of matrices ``[m, k] @ [k, n]`` counts ``2 m k n`` operations, as XLA counts it; norms,
activations, rotations and the softmax, which XLA counts too, are left out: beside the products they
are small in any model worth planning for.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jkv.models.config import Config


@dataclasses.dataclass(frozen=True)
class Work:
    """One pass over B rows, or several, one after the other.

    Attributes:
        tokens: that went through the blocks, of all rows.
        projections: operations of the maps to queries, keys and values, and back.
        scores: of queries times keys, masked ones that are computed anyway included.
        values: of weights times values, likewise.
        mlp: of the feed-forward layers.
        logits: of the last token of each row.
        between_blocks: bytes of the stream ``[B, T, D]`` that a pass hands from block to block.
        read: bytes of weights and cache that come from memory.
        written: bytes of new keys and values.

    Example:
        >>> step = jkv.plan("gpt2", seq_len=1024).step  # a decode step at that length
        >>> step.tokens, step.flops > 2 * 124e6
        (1, True)
    """

    tokens: int = 0
    projections: int = 0
    scores: int = 0
    values: int = 0
    mlp: int = 0
    logits: int = 0
    between_blocks: int = 0
    read: int = 0
    written: int = 0

    PARTS = ("projections", "scores", "values", "mlp", "logits")

    @property
    def flops(self) -> int:
        """Operations in all."""
        return sum(getattr(self, part) for part in self.PARTS)

    def to_dict(self) -> dict[str, int]:
        """Return plain numbers, the sum included."""
        return dataclasses.asdict(self) | {"flops": self.flops}


def work(
    config: Config, batch: int, new: int, looks: int, *, widest: int, read: int, written: int
) -> Work:
    """Return the work of T new tokens in each of B rows, and of the last logits.

    Args:
        config: of the model.
        batch: B.
        new: T.
        looks: products of a query with a key, in one row, for one head, in all layers.
        widest: tokens that go through together.
        read: bytes.
        written: bytes.
    """
    width, heads, dim = config.width, config.heads, config.head_dim
    tokens = batch * new
    maps = width * (heads + 2 * config.kv_heads) * dim + heads * dim * width
    inner = width * config.feed_forward * (3 if config.gated else 2)
    scores = 2 * batch * heads * dim * looks
    return Work(
        tokens=tokens,
        projections=2 * tokens * maps * config.layers,
        scores=scores,
        values=scores,
        mlp=2 * tokens * inner * config.layers,
        logits=2 * batch * width * config.vocab,
        between_blocks=batch * widest * width * itemsize(config.dtype),
        read=read,
        written=written,
    )


def itemsize(dtype: str) -> int:
    """Return the bytes of one number."""
    return jnp.dtype(dtype).itemsize
