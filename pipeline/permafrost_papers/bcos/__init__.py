"""B-cos networks (Boehle et al. 2022, 2024): layers, architectures, their classifier, and its own explanations.

A plug-in of the models: options.py registers its networks and its explainer.
Read first: options.py, then layers.py and weight_maps.py.
"""
