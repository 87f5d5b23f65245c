"""Papers, a package for each: e2KD's tables, B-cos networks, KED, UniCAM, and the interpretability study of Han et al.

They enter permafrost as anyone's package does, by the entry points of the group `permafrost` (docs/howto/plug-ins.md).
Read first: unicam/options.py.
"""
