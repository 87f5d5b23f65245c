"""DiffROAR: retraining on inputs whose most or least attributed pixels are masked.

Read first: evaluator.py.
"""
