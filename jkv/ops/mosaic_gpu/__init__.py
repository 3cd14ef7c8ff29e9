"""Split-KV attention over a cache as Pallas kernels for Hopper GPUs.

`tiling` divides the work among programs, `operands` fetches and multiplies keys and values in each
form of storage, `kernel` walks over blocks and merges the programs' partial results, and `launch`
calls it with the operands of `jkv.ops.attention.mosaic_gpu`.
"""

__all__: list[str] = []
