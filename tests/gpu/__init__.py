"""Checks and measurements of a CUDA machine, run by `make gpu` (docs/howto/gpu.md). Read `__main__.py` first."""
