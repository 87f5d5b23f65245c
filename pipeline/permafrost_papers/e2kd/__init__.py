"""Guided teachers of e2KD (Parchami-Araghi et al. 2024), ReviewKD, and the experiments of its tables.

The method itself is a part of permafrost (losses/e2kd.py), and its shift curve of permafrost_evaluators (shift.py).
Read first: options.py.
"""
