"""What a TPU stores together: XLA and the kernels for it both go by that."""

from __future__ import annotations

LANES = 128  # numbers beside each other in a tile; of 32 bits there are 8 such lines
