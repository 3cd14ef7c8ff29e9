"""Split-KV attention over a cache as Pallas kernels for Hopper GPUs.

`plan` says which part of the work each program does, `forms` how keys and values are fetched and
multiplied in each form that they are stored in, and `kernel` walks over them and merges what the
programs found. `jkv.ops.attention.mosaic_gpu` calls them.
"""

__all__: list[str] = []
