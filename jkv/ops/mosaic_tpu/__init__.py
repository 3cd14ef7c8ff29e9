"""What the kernels for TPUs share: how operands lie in memory, and the walk over their blocks."""

__all__: list[str] = []
