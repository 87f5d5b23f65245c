"""Evaluators, one per module or folder: each evaluates a frozen network on one split and returns its metrics.

The forward pass that several of them share is in evaluation/forward.py.
Read first: build.py, then class_similarity.py.
"""
