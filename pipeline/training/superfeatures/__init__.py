"""Search for superfeatures (KED, Algorithm 1): dependency, grouping and the artifact that stores the result.

The partition itself is in pipeline/models/additive.
Read first: search.py.
"""
