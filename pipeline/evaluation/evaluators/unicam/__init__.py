"""UniCAM maps: where a student's features explain what its teacher's leave (and the reverse).

Distances and partial correlation belong to evaluators/distance_correlation.
Read first: evaluator.py.
"""
