"""Metrics of a frozen network: the shared forward pass, metrics, records and results.

Pages and figures are made in permafrost/reports.
Read first: results.py, then forward.py and evaluator.py.
"""
