"""The search for superfeatures (KED, Algorithm 1): dependency, grouping and the artifact that keeps the result.

The partition itself belongs to pipeline/models/additive.
Read first: search.py.
"""
