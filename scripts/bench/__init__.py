"""Benchmarks: `python -m bench decode|engine|store|attention|kinds` from `scripts/`."""
