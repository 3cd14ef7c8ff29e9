"""Codecs: how keys and values are stored in fewer bits, and read without being decoded.

Attention asks two things of what it reads: the products of queries with keys, and the weighted sum
of values. An encoded array answers both for a slice of its slots. Scales that all tokens of a block
share are multiplied into the queries, scales of a token into its score and weight, so that the only
work per number is to unpack and convert it.
"""

from jkv.ops.codecs.affine import Affine
from jkv.ops.codecs.base import Codec, Encoded, all_finite
from jkv.ops.codecs.floats import Cast, Float8
from jkv.ops.codecs.sparse import Sparse

__all__ = ["Affine", "Cast", "Codec", "Encoded", "Float8", "Sparse", "all_finite"]
