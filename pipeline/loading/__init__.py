"""From a store to batches in their views: selection, sampler, dataset, loader, geometry and pixels.

What is computed from a batch belongs to losses, training and evaluation.
Read first: dataset.py, then geometry.py.
"""
