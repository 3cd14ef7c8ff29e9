"""Keys and values in other forms than arrays of numbers, which take part in products as they are.

Attention asks two things of what it reads: the products of queries with keys, and the weighted sum
of values. An encoded array answers both for a block of slots. What can be moved out of the block
is: steps that channels share are multiplied into the queries, steps that tokens share into the
scores and weights, so that the only work per number is to unpack and convert it.
"""

from jkv.ops.encoded.affine import Affine
from jkv.ops.encoded.base import Codec, Encoded, finite
from jkv.ops.encoded.floats import Cast, Float8
from jkv.ops.encoded.sparse import Sparse

__all__ = ["Affine", "Cast", "Codec", "Encoded", "Float8", "Sparse", "finite"]
