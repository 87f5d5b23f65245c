"""Explainers at the pixels: gradients of a class's logit, of one pass of the network or of several.

Read first: pixel_gradients.py.
"""
