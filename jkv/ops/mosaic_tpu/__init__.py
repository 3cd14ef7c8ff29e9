"""Kernels for TPUs: attention over blocks of slots or pages, its two products, and writes."""

__all__: list[str] = []
