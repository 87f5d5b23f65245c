"""B-cos networks (Boehle et al. 2022, 2024): layers, architectures and their classifier.

Their explanations are in models/explanations.py.
Read first: layers.py.
"""
