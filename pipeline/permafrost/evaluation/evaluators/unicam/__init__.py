"""UniCAM maps of the features that one network has beyond another, such as a student beyond its teacher.

Distances and partial correlation are in evaluators/distance_correlation.
Read first: evaluator.py.
"""
