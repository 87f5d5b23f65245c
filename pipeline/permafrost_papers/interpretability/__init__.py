"""Evaluators of the study of Han et al. (2023): is a distilled student more interpretable than a plain one?

A plug-in of the evaluation: options.py registers its evaluators.
Read first: options.py, then dissection.py.
"""
