"""Explainers: from a network and its output to maps of chosen classes.

What is compared with these maps belongs to pipeline/losses and pipeline/evaluation.
Read first: explain.py, then gradcam.py.
"""
