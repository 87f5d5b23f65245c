"""Loading of a store as batches in their views: selection, sampler, dataset, loader, geometry and pixels.

Computations on batches are in losses, training and evaluation.
Read first: dataset.py, then geometry.py.
"""
