"""Explainers: functions from a network and its output to explanation maps of chosen classes.

Comparisons of these maps are in permafrost/losses and permafrost/evaluation.
Read first: explain.py, then gradcam.py.
"""
