"""Search for superfeatures (KED, Algorithm 1): dependency, grouping and the artifact that stores the result.

The partition itself is in permafrost/models/additive.
Read first: search.py.
"""
