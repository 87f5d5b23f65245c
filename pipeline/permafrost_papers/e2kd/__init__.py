"""The shift curve of e2KD (Parchami-Araghi et al. 2024), and the experiments of its tables.

The method itself is a part of permafrost (losses/e2kd.py).
Read first: options.py.
"""
