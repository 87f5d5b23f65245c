"""UniCAM: what one network's features carry beyond another's, as numbers (FSS, RS) and as maps.

A plug-in of the evaluation: options.py registers its evaluators.
Read first: distance_correlation.py, then residual_maps.py.
"""
