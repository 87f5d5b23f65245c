"""Evaluators, one per module or folder: each evaluates a frozen network on one split and returns its metrics.

The forward pass that several of them share is in evaluation/forward.py.
Read first: evaluator.py, then localization.py.
"""
