"""Trackers of trainings besides TensorBoard: Weights & Biases, MLflow and Trackio (`logger=`).

Read first: clients.py.
"""
