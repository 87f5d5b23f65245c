"""DiffROAR: retraining on images in which the most or least attributed pixels are masked.

Read first: evaluator.py.
"""
