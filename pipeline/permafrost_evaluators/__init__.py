"""Evaluators that serve several papers or none: shift curves, targets of views, and predictions from features.

Read first: shift.py.
"""
