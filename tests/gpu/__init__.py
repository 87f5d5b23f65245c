"""Checks and measurements of a CUDA machine, run by `make gpu` (docs/howto/cluster.md). Read `__main__.py` first."""
