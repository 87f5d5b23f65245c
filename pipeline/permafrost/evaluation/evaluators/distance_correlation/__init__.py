"""Feature similarity and relevance scores (FSS, RS) by distance correlation of two networks' features.

Read first: evaluator.py, then estimators.py.
"""
